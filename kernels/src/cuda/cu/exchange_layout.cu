// The start of a round: DP ranks signal, EP ranks lay out what they must compute.
#include "exchange.cuh"

struct SignalParams {
    u64 context;
    u64 state;
    u64 tokens;  // u32: rows of this rank in this step
    u32 tokens_max;
};

extern "C" __global__ void __launch_bounds__(RANKS_MAX) exchange_signal(const __grid_constant__ SignalParams p) {
    wait_for_previous();
    const Context* c = reinterpret_cast<const Context*>(p.context);
    State* s = reinterpret_cast<State*>(p.state);
    if (s->failed != NONE) return;
    const u64 round = s->dp_round + 1;
    const u32 tokens = min(*reinterpret_cast<const u32*>(p.tokens), p.tokens_max);
    __syncthreads();
    if (threadIdx.x == 0) {
        s->dp_round = round;
        *reinterpret_cast<u32*>(c->own + HEADER) = tokens;
    }
    if (c->flags) raise(c, DISPATCH, round, tokens);
    let_next_start();
}

// The layout kernel is one cluster: its CTAs share the entries (DP rank, token, choice), in this order, 32 to a step.
constexpr u32 LAYOUT_THREADS = 512;
constexpr u32 LAYOUT_WARPS = LAYOUT_THREADS / 32;

struct LayoutParams {
    Geometry g;
    u64 context;
    u64 state;
    u64 plan;           // Plan
    u64 place;          // u32 [dp][tokens_max][top_k]: the permuted row of an entry, IDLE if it is not for this rank
    u64 segment_start;  // u32 [slots_max + 1]
    u64 segment_rows;   // u32 [slots_max]
    u64 source;         // u64 [rows_max]: token | DP rank << 32 | choice << 48, all ones between segments
    u64 destination;    // u64 [rows_max]: address of the owner's combined row, 0 between segments
    u64 push;           // Push [rows_max]: the real rows, without gaps
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

// Waits for the round and puts every DP rank's number of tokens into the plan. By one warp of the cluster.
__device__ void layout_await(const LayoutParams& p, const Context* c, State* s) {
    const u32 lane = threadIdx.x & 31;
    u32* tokens = reinterpret_cast<Plan*>(p.plan)->tokens;
    if (s->failed != NONE) return;
    const u64 round = s->ep_round + 1;
    __syncwarp();
    if (lane == 0) s->ep_round = round;
    for (u32 d = lane; d < c->dp; d += 32) {
        const bool ready = !c->flags && c->dp_rank[d] != IDLE;
        tokens[d] = ready ? load_system_u32(c->dp_heap[d] + HEADER) : 0;
    }
    if (c->flags && !wait_all(c, s, DISPATCH, round, tokens)) return;
    for (u32 d = lane; d < c->dp; d += 32) {
        if (tokens[d] > p.g.tokens_max) fail(c, s, MALFORMED, DISPATCH, 1ull << c->dp_rank[d], round);
    }
}

// The tables of the cluster's CTAs, in shared memory; `slots` words each, one more where they hold sums.
struct Tables {
    u32* count;  // [LAYOUT_WARPS][slots] rows of each warp, then each warp's next free row
    u32* mine;   // rows of this CTA; the other CTAs read it
    u32* rows;   // rows of all CTAs
    u32* start;  // first row of each segment, and the end of the last
    u32* dense;  // likewise without padding
    const u32* first_step;  // [dp + 1] first step of each DP rank
    const u32* tokens;      // [dp]
    u32 slots;
    u32 at;   // the warp's steps
    u32 end;
};

// Counts the warp's rows of each slot, and leaves each entry's local slot in `place`.
__device__ __forceinline__ void layout_count(const LayoutParams& p, const Context* c, const Tables& t) {
    const u32 lane = threadIdx.x & 31, first_slot = c->my_ep * t.slots, stride = p.g.tokens_max * p.g.top_k;
    u32* count = t.count + threadIdx.x / 32 * t.slots;
    u32* place = reinterpret_cast<u32*>(p.place);
    // Peers are far away: four loads are under way at a time.
    constexpr u32 AHEAD = 4;
    for (u32 at = t.at; at < t.end; at += AHEAD) {
        u32 slot[AHEAD], index[AHEAD];
#pragma unroll
        for (u32 a = 0; a < AHEAD; a++) {
            slot[a] = index[a] = IDLE;
            if (at + a >= t.end) continue;
            const u32 d = find(t.first_step, c->dp, at + a);
            const u32 i = (at + a - t.first_step[d]) * 32 + lane;
            if (i >= t.tokens[d] * p.g.top_k) continue;
            slot[a] = load_system_u32(c->dp_heap[d] + p.g.slots_at + u64(i) * 4);
            index[a] = d * stride + i;
        }
#pragma unroll
        for (u32 a = 0; a < AHEAD; a++) {
            const u32 local = slot[a] - first_slot;
            const bool mine = slot[a] != IDLE && local < t.slots;
            if (mine) atomicAdd(&count[local], 1);
            if (index[a] != IDLE) place[index[a]] = mine ? local : IDLE;
        }
    }
}

// Turns the counts of all warps of the cluster into the first row of each warp in each slot.
__device__ __forceinline__ void layout_scan(const Tables& t) {
    const u32 cta = cluster_rank(), ctas = cluster_size();
    for (u32 s = threadIdx.x; s < t.slots; s += LAYOUT_THREADS) {
        u32 sum = 0;
        for (u32 w = 0; w < LAYOUT_WARPS; w++) {
            const u32 own = t.count[w * t.slots + s];
            t.count[w * t.slots + s] = sum;
            sum += own;
        }
        t.mine[s] = sum;
    }
    cluster_sync();
    for (u32 s = threadIdx.x; s < t.slots; s += LAYOUT_THREADS) {
        u32 rows = 0, before = 0;
        for (u32 other = 0; other < ctas; other++) {
            const u32 theirs = load_cluster(&t.mine[s], other);
            if (other < cta) before += theirs;
            rows += theirs;
        }
        for (u32 w = 0; w < LAYOUT_WARPS; w++) t.count[w * t.slots + s] += before;
        t.rows[s] = rows;
    }
    __syncthreads();
    const u32 warp = threadIdx.x / 32;
    if (warp == 0) prefix(t.start, t.slots, [&](u32 s) { return (t.rows[s] + 127) / 128 * 128; });
    if (warp == 1) prefix(t.dense, t.slots, [&](u32 s) { return t.rows[s]; });
    __syncthreads();
    for (u32 i = threadIdx.x; i < LAYOUT_WARPS * t.slots; i += LAYOUT_THREADS) t.count[i] += t.start[i % t.slots];
    __syncthreads();
}

// Gives the warp's entries their rows.
__device__ __forceinline__ void layout_place(const LayoutParams& p, const Context* c, const Tables& t) {
    const u32 lane = threadIdx.x & 31, stride = p.g.tokens_max * p.g.top_k;
    u32* next = t.count + threadIdx.x / 32 * t.slots;
    u32* place = reinterpret_cast<u32*>(p.place);
    for (u32 at = t.at; at < t.end; at++) {
        const u32 d = find(t.first_step, c->dp, at);
        const u32 i = (at - t.first_step[d]) * 32 + lane;
        const u32 local = i < t.tokens[d] * p.g.top_k ? place[d * stride + i] : IDLE;
        const u32 alike = __match_any_sync(FULL, local);
        const u32 before = __popc(alike & ((1u << lane) - 1));
        if (local != IDLE) {
            const u32 row = next[local] + before;
            const u64 token = i / p.g.top_k, choice = i % p.g.top_k;
            const u64 to = c->dp_heap[d] + p.g.combined_at + u64(i) * p.g.hidden * 2;
            place[d * stride + i] = row;
            reinterpret_cast<u64*>(p.source)[row] = token | u64(d) << 32 | choice << 48;
            reinterpret_cast<u64*>(p.destination)[row] = to;
            reinterpret_cast<Push*>(p.push)[row - t.start[local] + t.dense[local]] = Push{to, row, d};
        }
        __syncwarp();
        if (local != IDLE && before == 0) next[local] += __popc(alike);
        __syncwarp();
    }
}

// Everything beside the entries: segments, the gaps between them, the plan.
__device__ __forceinline__ void layout_finish(const LayoutParams& p, const Context* c, const Tables& t) {
    const u32 cta = cluster_rank(), threads = cluster_size() * LAYOUT_THREADS;
    for (u32 i = cta * LAYOUT_THREADS + threadIdx.x; i < t.slots * 128; i += threads) {
        const u32 row = t.start[i / 128] + t.rows[i / 128] + i % 128;
        if (row >= t.start[i / 128 + 1]) continue;
        reinterpret_cast<u64*>(p.source)[row] = ~0ull;
        reinterpret_cast<u64*>(p.destination)[row] = 0;
    }
    if (cta != 0) return;
    // Slots that this membership does not have are empty segments at the end.
    for (u32 s = threadIdx.x; s <= p.slots_max; s += LAYOUT_THREADS) {
        reinterpret_cast<u32*>(p.segment_start)[s] = t.start[min(s, t.slots)];
        if (s < p.slots_max) reinterpret_cast<u32*>(p.segment_rows)[s] = s < t.slots ? t.rows[s] : 0;
    }
    Plan* plan = reinterpret_cast<Plan*>(p.plan);
    const u32 warp = threadIdx.x / 32;
    if (warp == 0) prefix(plan->token_base, c->dp, [&](u32 d) { return t.tokens[d]; });
    if (warp == 1) prefix(plan->group_base, c->dp, [&](u32 d) { return (t.tokens[d] + 31) / 32; });
    if (threadIdx.x == 64) plan->rows = t.dense[t.slots];
}

extern "C" __global__ void __launch_bounds__(LAYOUT_THREADS)
    exchange_layout(const __grid_constant__ LayoutParams p) {
    extern __shared__ u32 shared[];
    __shared__ u32 first_step[RANKS_MAX + 1], tokens[RANKS_MAX], failed;
    wait_for_previous();
    const Context* c = reinterpret_cast<const Context*>(p.context);
    State* s = reinterpret_cast<State*>(p.state);
    const u32 cta = cluster_rank(), slots = min(c->slots, p.slots_max);
    Tables t{};
    t.slots = slots;
    t.count = shared;
    t.mine = t.count + LAYOUT_WARPS * slots;
    t.rows = t.mine + slots;
    t.start = t.rows + slots;
    t.dense = t.start + slots + 1;
    t.first_step = first_step;
    t.tokens = tokens;
    for (u32 i = threadIdx.x; i < LAYOUT_WARPS * slots; i += LAYOUT_THREADS) t.count[i] = 0;
    if (cta == 0 && threadIdx.x < 32) layout_await(p, c, s);
    if (threadIdx.x == 0) failed = *reinterpret_cast<volatile u32*>(&s->failed);
    cluster_sync();
    // All take the first CTA's word: the other half of this rank may fail at any time, on another stream.
    if (load_cluster(&failed, 0) != NONE) {
        if (cta == 0) layout_nothing(p);
        cluster_sync();
        return;
    }
    // Written by the first CTA just now: not to be taken from this one's cache.
    for (u32 d = threadIdx.x; d < c->dp; d += LAYOUT_THREADS) tokens[d] = load_system_u32(p.plan + d * 4);
    __syncthreads();
    if (threadIdx.x < 32) prefix(first_step, c->dp, [&](u32 d) { return (tokens[d] * p.g.top_k + 31) / 32; });
    __syncthreads();
    const u32 warps = cluster_size() * LAYOUT_WARPS, share = (first_step[c->dp] + warps - 1) / warps;
    t.at = min((cta * LAYOUT_WARPS + threadIdx.x / 32) * share, first_step[c->dp]);
    t.end = min(t.at + share, first_step[c->dp]);
    layout_count(p, c, t);
    __syncthreads();
    layout_scan(t);
    if (t.start[slots] > p.g.rows_max) {
        if (cta == 0) layout_nothing(p);
        if (cta == 0 && threadIdx.x == 0) fail(c, s, OVERFLOW, DISPATCH, 0, s->ep_round);
    } else {
        layout_place(p, c, t);
        layout_finish(p, c, t);
    }
    // A CTA's tables must outlive the reads of the others.
    cluster_sync();
}
