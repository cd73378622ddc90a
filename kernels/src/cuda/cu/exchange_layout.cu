// The start of a round: DP ranks signal, EP ranks lay out what they must compute.
#include "exchange.cuh"

struct SignalParams {
    u64 context;
    u64 state;
    u64 own;     // own heap
    u64 tokens;  // u32: rows of this rank in this step
    u32 tokens_max;
};

extern "C" __global__ void __launch_bounds__(RANKS_MAX) exchange_signal(const __grid_constant__ SignalParams p) {
    const Context* c = reinterpret_cast<const Context*>(p.context);
    State* s = reinterpret_cast<State*>(p.state);
    let_next_start();
    wait_for_previous();
    if (s->failed != NONE) return;
    const u64 round = s->dp_round + 1;
    const u32 tokens = min(*reinterpret_cast<const u32*>(p.tokens), p.tokens_max);
    __syncthreads();
    if (threadIdx.x == 0) {
        s->dp_round = round;
        *reinterpret_cast<u32*>(p.own + HEADER) = tokens;
    }
    if (c->flags) raise(c, DISPATCH, round, tokens);
}

// The layout kernel is one cluster: its CTAs share the entries (DP rank, token, choice), in this order, 32 to a step.
constexpr u32 LAYOUT_THREADS = 512;
constexpr u32 LAYOUT_WARPS = LAYOUT_THREADS / 32;
// Below this, another CTA costs more than it does.
constexpr u32 STEPS_PER_CTA = 8;

struct LayoutParams {
    Geometry g;
    u64 context;
    u64 state;
    u64 plan;           // Plan
    u64 place;          // u32 [dp][tokens_max][top_k]: the permuted row of an entry, IDLE if it is not for this rank
    u64 segment_start;  // u32 [slots_max + 1]
    u64 segment_rows;   // u32 [slots_max]
    u64 source;         // u64 [rows_max]: token | DP rank << 32 | choice << 48
    u64 destination;    // u64 [rows_max]: address of the owner's combined row
    u64 push;           // Push [rows_max]: the real rows, without gaps
    u64 own_place;      // u32 [tokens_max][top_k]: what `place` has of this rank's own tokens
    u32 slots_max;
};

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ u32 cluster_rank() {
    u32 r;
    asm("mov.u32 %0, %cluster_ctarank;" : "=r"(r));
    return r;
}

__device__ __forceinline__ u32 cluster_size() {
    u32 r;
    asm("mov.u32 %0, %cluster_nctarank;" : "=r"(r));
    return r;
}

// The word of another CTA that lies where `mine` does in this one.
__device__ __forceinline__ u32 load_cluster(const u32* mine, u32 cta) {
    u32 address, v;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(mine)), "r"(cta));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}

// Exclusive prefix sum of value(i) over i < count into base[0..=count], by one warp.
template <class Value>
__device__ __forceinline__ void prefix(u32* base, u32 count, Value value) {
    const u32 lane = threadIdx.x & 31;
    u32 before = 0;
    for (u32 first = 0; first < count; first += 32) {
        const u32 i = first + lane;
        const u32 own = i < count ? value(i) : 0;
        u32 sum = own;
#pragma unroll
        for (u32 step = 1; step < 32; step <<= 1) {
            const u32 other = __shfl_up_sync(FULL, sum, step);
            if (lane >= step) sum += other;
        }
        if (i < count) base[i] = before + sum - own;
        before += __shfl_sync(FULL, sum, 31);
    }
    if (lane == 0) base[count] = before;
}

// Leaves tables that mean "no rows". By one CTA.
__device__ void layout_nothing(const LayoutParams& p) {
    Plan* plan = reinterpret_cast<Plan*>(p.plan);
    for (u32 i = threadIdx.x; i <= p.slots_max; i += LAYOUT_THREADS) {
        reinterpret_cast<u32*>(p.segment_start)[i] = 0;
        if (i < p.slots_max) reinterpret_cast<u32*>(p.segment_rows)[i] = 0;
    }
    for (u32 i = threadIdx.x; i <= RANKS_MAX; i += LAYOUT_THREADS) plan->token_base[i] = plan->group_base[i] = 0;
    if (threadIdx.x == 0) plan->rows = 0;
}

// Waits for the round and notes every DP rank's number of tokens. By one warp. False: there is nothing to do.
__device__ __forceinline__ bool layout_await(const LayoutParams& p, const Context* c, State* s, u32* tokens) {
    const u32 lane = threadIdx.x & 31, failed = s->failed;
    const u64 round = s->ep_round + 1;
    bool malformed = false;
    for (u32 d = lane; d < c->dp; d += 32) {
        const bool ready = !c->flags && c->dp_rank[d] != IDLE;
        tokens[d] = ready ? load_system_u32(c->dp_heap[d] + HEADER) : 0;
    }
    __syncwarp();
    if (failed != NONE) return false;
    if (lane == 0) s->ep_round = round;
    if (c->flags && !wait_all(c, s, DISPATCH, round, tokens)) return false;
    for (u32 d = lane; d < c->dp; d += 32) {
        if (tokens[d] <= p.g.tokens_max) continue;
        malformed = true;
        fail(c, s, MALFORMED, DISPATCH, 1ull << c->dp_rank[d], round);
    }
    return !__any_sync(FULL, malformed);
}

// The tables of one CTA, in shared memory; `slots` words each, one more where they hold sums.
struct Tables {
    u32* count;  // [LAYOUT_WARPS][slots] rows of each warp, then how many come before them in the segment
    u32* mine;   // rows of this CTA; the other CTAs read it
    u32* rows;   // rows of all CTAs
    u32* start;  // first row of each segment, and the end of the last
    u32* dense;  // likewise without padding
    const u32* first_step;  // [dp + 1] first step of each DP rank
    const u32* tokens;      // [dp]
    u32 slots;
    u32 ctas;  // that have a share
    u32 at;    // the warp's steps
    u32 end;
};

// Where a lane's entry of a step lies: DP rank and index; the index is IDLE past the rank's last entry.
struct Entry {
    u32 dp;
    u32 index;
};

__device__ __forceinline__ Entry entry_of(const LayoutParams& p, const Context* c, const Tables& t, u32 step) {
    const u32 d = find(t.first_step, c->dp, step);
    const u32 i = (step - t.first_step[d]) * 32 + (threadIdx.x & 31);
    return {d, i < t.tokens[d] * p.g.top_k ? i : IDLE};
}

// Steps whose routing is fetched at once: peers are far away.
constexpr u32 AHEAD = 4;

// Reads the local slots of the lane's entries in AHEAD steps, IDLE where there is none, and counts them.
__device__ __forceinline__ void layout_count(const LayoutParams& p, const Context* c, const Tables& t, u32 at,
                                             u32 (&local)[AHEAD]) {
    u32* count = t.count + threadIdx.x / 32 * t.slots;
    const u32 first_slot = c->my_ep * t.slots;
#pragma unroll
    for (u32 a = 0; a < AHEAD; a++) {
        local[a] = IDLE;
        if (at + a >= t.end) continue;
        const Entry e = entry_of(p, c, t, at + a);
        if (e.index != IDLE) local[a] = load_system_u32(c->dp_heap[e.dp] + p.g.slots_at + u64(e.index) * 4);
    }
#pragma unroll
    for (u32 a = 0; a < AHEAD; a++) {
        const bool mine = local[a] != IDLE && local[a] - first_slot < t.slots;
        local[a] = mine ? local[a] - first_slot : IDLE;
        if (mine) atomicAdd(&count[local[a]], 1);
    }
}

// Turns the counts of all warps into what comes before each warp's rows in each segment, and makes the segments.
__device__ __forceinline__ void layout_scan(const Tables& t) {
    const u32 cta = cluster_rank(), warp = threadIdx.x / 32;
    for (u32 s = threadIdx.x; s < t.slots; s += LAYOUT_THREADS) {
        u32 own[LAYOUT_WARPS], sum = 0;
#pragma unroll
        for (u32 w = 0; w < LAYOUT_WARPS; w++) own[w] = t.count[w * t.slots + s];
#pragma unroll
        for (u32 w = 0; w < LAYOUT_WARPS; w++) {
            t.count[w * t.slots + s] = sum;
            sum += own[w];
        }
        t.mine[s] = t.rows[s] = sum;
    }
    if (t.ctas > 1) {
        cluster_sync();
        for (u32 s = threadIdx.x; s < t.slots; s += LAYOUT_THREADS) {
            u32 rows = 0, before = 0;
            for (u32 other = 0; other < t.ctas; other++) {
                const u32 theirs = load_cluster(&t.mine[s], other);
                if (other < cta) before += theirs;
                rows += theirs;
            }
            for (u32 w = 0; w < LAYOUT_WARPS; w++) t.count[w * t.slots + s] += before;
            t.rows[s] = rows;
        }
    }
    __syncthreads();
    if (warp == 0) prefix(t.start, t.slots, [&](u32 s) { return (t.rows[s] + 127) / 128 * 128; });
    if (warp == 1) prefix(t.dense, t.slots, [&](u32 s) { return t.rows[s]; });
    __syncthreads();
}

// Gives the entries of one step their rows.
__device__ __forceinline__ void layout_place(const LayoutParams& p, const Context* c, const Tables& t, u32 step,
                                             u32 local) {
    const u32 lane = threadIdx.x & 31;
    u32* next = t.count + threadIdx.x / 32 * t.slots;
    const Entry e = entry_of(p, c, t, step);
    const u32 alike = __match_any_sync(FULL, local), before = __popc(alike & ((1u << lane) - 1));
    u32 row = IDLE;
    if (local != IDLE) {
        const u32 in_segment = next[local] + before;
        row = t.start[local] + in_segment;
        const u64 token = e.index / p.g.top_k, choice = e.index % p.g.top_k;
        const u64 to = c->dp_heap[e.dp] + p.g.combined_at + u64(e.index) * p.g.hidden * 2;
        reinterpret_cast<u64*>(p.source)[row] = token | u64(e.dp) << 32 | choice << 48;
        reinterpret_cast<u64*>(p.destination)[row] = to;
        reinterpret_cast<Push*>(p.push)[t.dense[local] + in_segment] = Push{to, row, e.dp};
    }
    if (e.index != IDLE) {
        reinterpret_cast<u32*>(p.place)[e.dp * p.g.tokens_max * p.g.top_k + e.index] = row;
        if (e.dp == c->my_dp) reinterpret_cast<u32*>(p.own_place)[e.index] = row;
    }
    __syncwarp();
    if (local != IDLE && before == 0) next[local] += __popc(alike);
    __syncwarp();
}

// Everything beside the entries: segments and the plan.
__device__ __forceinline__ void layout_finish(const LayoutParams& p, const Context* c, const Tables& t) {
    if (cluster_rank() != 0) return;
    // Slots that this membership does not have are empty segments at the end.
    for (u32 s = threadIdx.x; s <= p.slots_max; s += LAYOUT_THREADS) {
        reinterpret_cast<u32*>(p.segment_start)[s] = t.start[min(s, t.slots)];
        if (s < p.slots_max) reinterpret_cast<u32*>(p.segment_rows)[s] = s < t.slots ? t.rows[s] : 0;
    }
    Plan* plan = reinterpret_cast<Plan*>(p.plan);
    const u32 warp = threadIdx.x / 32;
    if (warp == 2) prefix(plan->token_base, c->dp, [&](u32 d) { return t.tokens[d]; });
    if (warp == 3) prefix(plan->group_base, c->dp, [&](u32 d) { return (t.tokens[d] + 31) / 32; });
    if (threadIdx.x == 128) plan->rows = t.dense[t.slots];
}

// All that follows the wait, on the CTAs that have a share.
__device__ __forceinline__ void layout_rows(const LayoutParams& p, const Context* c, State* s, const Tables& t) {
    u32* place = reinterpret_cast<u32*>(p.place);
    const u32 stride = p.g.tokens_max * p.g.top_k;
    u32 first[AHEAD];
    layout_count(p, c, t, t.at, first);
    // What does not stay in registers waits in `place`.
    for (u32 at = t.at + AHEAD; at < t.end; at += AHEAD) {
        u32 local[AHEAD];
        layout_count(p, c, t, at, local);
#pragma unroll
        for (u32 a = 0; a < AHEAD; a++) {
            if (at + a >= t.end) continue;
            const Entry e = entry_of(p, c, t, at + a);
            if (e.index != IDLE) place[e.dp * stride + e.index] = local[a];
        }
    }
    __syncthreads();
    layout_scan(t);
    if (t.start[t.slots] > p.g.rows_max) {
        if (cluster_rank() != 0) return;
        layout_nothing(p);
        if (threadIdx.x == 0) fail(c, s, OVERFLOW, DISPATCH, 0, s->ep_round);
        return;
    }
#pragma unroll
    for (u32 a = 0; a < AHEAD; a++) {
        if (t.at + a < t.end) layout_place(p, c, t, t.at + a, first[a]);
    }
    for (u32 at = t.at + AHEAD; at < t.end; at++) {
        const Entry e = entry_of(p, c, t, at);
        layout_place(p, c, t, at, e.index != IDLE ? place[e.dp * stride + e.index] : IDLE);
    }
    layout_finish(p, c, t);
}

extern "C" __global__ void __launch_bounds__(LAYOUT_THREADS)
    exchange_layout(const __grid_constant__ LayoutParams p) {
    extern __shared__ u32 shared[];
    __shared__ u32 first_step[RANKS_MAX + 1], tokens[RANKS_MAX], go;
    const Context* c = reinterpret_cast<const Context*>(p.context);
    State* s = reinterpret_cast<State*>(p.state);
    const u32 cta = cluster_rank(), slots = min(c->slots, p.slots_max), dp = c->dp;
    for (u32 i = threadIdx.x; i < LAYOUT_WARPS * slots; i += LAYOUT_THREADS) shared[i] = 0;
    wait_for_previous();
    if (cta == 0 && threadIdx.x < 32) {
        const bool ready = layout_await(p, c, s, tokens);
        if (threadIdx.x == 0) go = ready;
        prefix(first_step, dp, [&](u32 d) { return (tokens[d] * p.g.top_k + 31) / 32; });
    }
    cluster_sync();
    let_next_start();
    // All take the first CTA's word: the other half of this rank may fail at any time, on another stream.
    const bool nothing = !load_cluster(&go, 0);
    const u32 steps = load_cluster(&first_step[dp], 0);
    // More CTAs have more room for their scattered stores, and more to tell each other.
    const u32 ctas = max(1, min(cluster_size(), (steps + STEPS_PER_CTA - 1) / STEPS_PER_CTA));
    // A CTA without a share is done; those that end count as arrived in what follows.
    if (cta >= (nothing ? 1 : ctas)) return;
    if (nothing) {
        layout_nothing(p);
    } else {
        if (cta != 0) {
            for (u32 d = threadIdx.x; d <= dp; d += LAYOUT_THREADS) {
                first_step[d] = load_cluster(&first_step[d], 0);
                if (d < dp) tokens[d] = load_cluster(&tokens[d], 0);
            }
            __syncthreads();
        }
        u32* mine = shared + LAYOUT_WARPS * slots;
        const u32 share = (steps + ctas * LAYOUT_WARPS - 1) / (ctas * LAYOUT_WARPS);
        const u32 at = min((cta * LAYOUT_WARPS + threadIdx.x / 32) * share, steps);
        const Tables t{shared, mine, mine + slots, mine + 2 * slots, mine + 3 * slots + 1, first_step,
                       tokens, slots, ctas, at, min(at + share, steps)};
        layout_rows(p, c, s, t);
    }
    // A CTA's tables must outlive the reads of the others.
    cluster_sync();
}
