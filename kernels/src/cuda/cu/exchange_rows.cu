// Rows on their way: pulled to the experts, pushed back, summed.
#include "exchange.cuh"

constexpr u32 ROW_THREADS = 256;
constexpr u32 REDUCE_THREADS = 64;
// Chunks of 8 values that a thread of reduce sums.
constexpr u32 REDUCE_CHUNKS = 2;

struct GatherParams {
    Geometry g;
    u64 context;
    u64 plan;
    u64 place;
    u64 rows;         // u8 [rows_max][row_bytes]
    u64 scales;       // f32 [scale_blocks][rows_stride]
    u32 rows_stride;
};

// One token's row to all its places: it crosses the link once.
__device__ __forceinline__ void gather_token(const GatherParams& p, u64 from, const u32* places) {
    const u32 chunks = p.g.row_bytes / 16;
    bool wanted = false;
    for (u32 k = 0; k < p.g.top_k; k++) wanted |= places[k] != IDLE;
    if (!wanted) return;
    constexpr u32 AHEAD = 2;
    for (u32 first = threadIdx.x; first < chunks; first += AHEAD * ROW_THREADS) {
        uint4 v[AHEAD];
#pragma unroll
        for (u32 a = 0; a < AHEAD; a++) {
            const u32 chunk = first + a * ROW_THREADS;
            if (chunk < chunks) v[a] = load_row(from + chunk * 16);
        }
        for (u32 k = 0; k < p.g.top_k; k++) {
            if (places[k] == IDLE) continue;
            const u64 to = p.rows + u64(places[k]) * p.g.row_bytes;
#pragma unroll
            for (u32 a = 0; a < AHEAD; a++) {
                const u32 chunk = first + a * ROW_THREADS;
                if (chunk < chunks) store_row(to + chunk * 16, v[a]);
            }
        }
    }
}

// The scales of 32 tokens, in one K block for each warp: read side by side, scattered. A multiprocessor stores one
// sector per cycle, so that this work is spread over many CTAs.
__device__ __forceinline__ void gather_scales(const GatherParams& p, u64 heap, const u32* place, u32 token, u32 block) {
    const float v = reinterpret_cast<const float*>(heap + p.g.scales_at)[u64(block) * p.g.tokens_max + token];
    float* to = reinterpret_cast<float*>(p.scales) + u64(block) * p.rows_stride;
    const u32* places = place + token * p.g.top_k;
    for (u32 k = 0; k < p.g.top_k; k++) {
        if (places[k] != IDLE) to[places[k]] = v;
    }
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS) exchange_gather(const __grid_constant__ GatherParams p) {
    __shared__ u32 token_base[RANKS_MAX + 1], group_base[RANKS_MAX + 1];
    const Context* c = reinterpret_cast<const Context*>(p.context);
    const Plan* plan = reinterpret_cast<const Plan*>(p.plan);
    const u32 dp = c->dp;
    let_next_start();
    wait_for_previous();
    if (threadIdx.x <= dp) {
        token_base[threadIdx.x] = plan->token_base[threadIdx.x];
        group_base[threadIdx.x] = plan->group_base[threadIdx.x];
    }
    __syncthreads();
    // First the tokens, then their scales: groups of 32 tokens, and so many units in each as there are sets of K blocks.
    constexpr u32 WARPS = ROW_THREADS / 32;
    const u32 sets = (p.g.scale_blocks + WARPS - 1) / WARPS, tokens = token_base[dp];
    const u32 units = tokens + group_base[dp] * sets;
    const u32* place = reinterpret_cast<const u32*>(p.place);
    const u32 stride = p.g.tokens_max * p.g.top_k;
    for (u32 unit = blockIdx.x; unit < units; unit += gridDim.x) {
        if (unit < tokens) {
            const u32 d = find(token_base, dp, unit), token = unit - token_base[d];
            const u64 from = c->dp_heap[d] + p.g.rows_at + u64(token) * p.g.row_bytes;
            gather_token(p, from, place + d * stride + token * p.g.top_k);
        } else {
            const u32 group = (unit - tokens) / sets, d = find(group_base, dp, group);
            const u32 token = (group - group_base[d]) * 32 + threadIdx.x % 32;
            const u32 block = (unit - tokens) % sets * WARPS + threadIdx.x / 32;
            const bool there = token < token_base[d + 1] - token_base[d] && block < p.g.scale_blocks;
            if (there) gather_scales(p, c->dp_heap[d], place + d * stride, token, block);
        }
    }
}

// Tells the DP peers that their rows are there, and waits for what this rank's own tokens need. By one CTA.
__device__ void finish_round(const Context* c, State* s) {
    if (s->failed != NONE) return;
    if (c->my_ep != IDLE) raise(c, COMBINE, s->ep_round, 0);
    if (c->my_dp != IDLE && threadIdx.x < 32) wait_all(c, s, COMBINE, s->dp_round, nullptr);
}

struct CombineParams {
    Geometry g;
    u64 context;
    u64 state;
    u64 plan;
    u64 push;
    u64 rows;      // bf16 [rows_max][hidden]: the experts' results
    u32 in_place;  // rows for this rank itself stay where they are: reduce reads them there
};

extern "C" __global__ void __launch_bounds__(ROW_THREADS) exchange_combine(const __grid_constant__ CombineParams p) {
    __shared__ u32 ticket;
    const Context* c = reinterpret_cast<const Context*>(p.context);
    State* s = reinterpret_cast<State*>(p.state);
    const Push* push = reinterpret_cast<const Push*>(p.push);
    const u32 chunks = p.g.hidden / 8, keep = p.in_place ? c->my_dp : IDLE;
    const bool alone = c->dp == 1 && keep == 0, flags = c->flags;
    wait_for_previous();
    const u32 rows = alone || s->failed != NONE ? 0 : reinterpret_cast<const Plan*>(p.plan)->rows;
    for (u32 i = blockIdx.x; i < rows; i += gridDim.x) {
        const Push to = push[i];
        if (to.dp == keep) continue;
        const u64 from = p.rows + u64(to.row) * p.g.hidden * 2;
        constexpr u32 AHEAD = 4;
        for (u32 first = threadIdx.x; first < chunks; first += AHEAD * ROW_THREADS) {
            uint4 v[AHEAD];
#pragma unroll
            for (u32 a = 0; a < AHEAD; a++) {
                const u32 chunk = first + a * ROW_THREADS;
                if (chunk < chunks) v[a] = load_row(from + chunk * 16);
            }
#pragma unroll
            for (u32 a = 0; a < AHEAD; a++) {
                const u32 chunk = first + a * ROW_THREADS;
                if (chunk < chunks) store_row(to.destination + chunk * 16, v[a]);
            }
        }
    }
    if (!flags) return;
    // The last CTA speaks for all: each one's stores are fenced before its ticket is drawn.
    __syncthreads();
    if (threadIdx.x == 0) {
        if (blockIdx.x < rows) fence_system();
        ticket = atomicAdd(&s->ticket, 1);
        fence_system();
    }
    __syncthreads();
    if (ticket != gridDim.x - 1) return;
    if (threadIdx.x == 0) s->ticket = 0;
    finish_round(c, s);
}

struct FinishParams {
    u64 context;
    u64 state;
};

// For rounds whose results were pushed by another kernel, and for ranks without experts.
extern "C" __global__ void __launch_bounds__(RANKS_MAX) exchange_finish(const __grid_constant__ FinishParams p) {
    const Context* c = reinterpret_cast<const Context*>(p.context);
    const bool flags = c->flags;
    wait_for_previous();
    if (flags) finish_round(c, reinterpret_cast<State*>(p.state));
}

struct ReduceParams {
    Geometry g;
    u64 context;
    u64 state;
    u64 own;        // own heap
    u64 weights;    // f32 [rows][top_k]
    u64 own_place;
    u64 local;      // bf16 [rows_max][hidden]: where rows for this rank itself stayed; 0: all were pushed
    u64 shared;     // bf16 [rows][hidden]: added last; 0: none
    u64 out;        // bf16 [rows][hidden]
    u32 parts;      // CTAs of one row
};

__device__ __forceinline__ void add_scaled(float (&sum)[8], float weight, uint4 v) {
    const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        sum[2 * i] = fmaf(weight, low_bf16(pairs[i]), sum[2 * i]);
        sum[2 * i + 1] = fmaf(weight, high_bf16(pairs[i]), sum[2 * i + 1]);
    }
}

// The result row of one entry, 0 if there is none: another rank's in `combined`, this rank's own where it was computed.
__device__ __forceinline__ u64 result_row(const ReduceParams& p, const Context* c, u32 entry) {
    const u32 slot = reinterpret_cast<const u32*>(p.own + p.g.slots_at)[entry];
    const u32 place = p.local ? reinterpret_cast<const u32*>(p.own_place)[entry] : IDLE;
    if (slot == IDLE) return 0;
    if (place != IDLE) return p.local + u64(place) * p.g.hidden * 2;
    u64 region = p.own + p.g.combined_at;
    if (p.g.combined_stride) {
        const u32 ep = slot / c->slots;
        if (ep >= c->ep) return 0;
        region += ep * p.g.combined_stride;
    }
    return region + u64(entry) * p.g.hidden * 2;
}

// Choices whose rows are fetched at once.
constexpr u32 AHEAD_CHOICES = 8;

// What the sum needs to know of some choices of a token.
struct Choices {
    u64 row[AHEAD_CHOICES];
    float weight[AHEAD_CHOICES];
};

__device__ __forceinline__ Choices read_choices(const ReduceParams& p, const Context* c, u32 token, u32 first) {
    Choices choices;
#pragma unroll
    for (u32 a = 0; a < AHEAD_CHOICES; a++) {
        const u32 entry = token * p.g.top_k + first + a;
        const bool there = first + a < p.g.top_k;
        choices.row[a] = there ? result_row(p, c, entry) : 0;
        choices.weight[a] = there ? reinterpret_cast<const float*>(p.weights)[entry] : 0;
    }
    return choices;
}

// Adds the terms of some choices, in their order, for the thread's chunks.
__device__ __forceinline__ void add_choices(const Choices& choices, u32 chunks, const u32 (&chunk)[REDUCE_CHUNKS],
                                            float (&sum)[REDUCE_CHUNKS][8]) {
    uint4 v[REDUCE_CHUNKS][AHEAD_CHOICES];
#pragma unroll
    for (u32 i = 0; i < REDUCE_CHUNKS; i++) {
#pragma unroll
        for (u32 a = 0; a < AHEAD_CHOICES; a++) {
            if (choices.row[a] && chunk[i] < chunks) v[i][a] = load_row(choices.row[a] + chunk[i] * 16);
        }
    }
#pragma unroll
    for (u32 i = 0; i < REDUCE_CHUNKS; i++) {
#pragma unroll
        for (u32 a = 0; a < AHEAD_CHOICES; a++) {
            if (choices.row[a]) add_scaled(sum[i], choices.weight[a], v[i][a]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(REDUCE_THREADS) exchange_reduce(const __grid_constant__ ReduceParams p) {
    const Context* c = reinterpret_cast<const Context*>(p.context);
    const u32 token = blockIdx.x / p.parts, chunks = p.g.hidden / 8;
    const u64 at = (u64(token) * p.g.hidden + blockIdx.x % p.parts * REDUCE_CHUNKS * REDUCE_THREADS * 8) * 2;
    u32 chunk[REDUCE_CHUNKS];
    float sum[REDUCE_CHUNKS][8] = {};
#pragma unroll
    for (u32 i = 0; i < REDUCE_CHUNKS; i++) {
        chunk[i] = (blockIdx.x % p.parts * REDUCE_CHUNKS + i) * REDUCE_THREADS + threadIdx.x;
    }
    let_next_start();
    wait_for_previous();
    // All of this is on its way at once, also for rows that turn out to be none.
    const u32 failed = reinterpret_cast<const State*>(p.state)->failed;
    const u32 tokens = *reinterpret_cast<const u32*>(p.own + HEADER);
    Choices choices = read_choices(p, c, token, 0);
    uint4 extra[REDUCE_CHUNKS] = {};
#pragma unroll
    for (u32 i = 0; i < REDUCE_CHUNKS; i++) {
        const u64 place = at + (i * REDUCE_THREADS + threadIdx.x) * 16;
        if (p.shared && chunk[i] < chunks) extra[i] = load_row(p.shared + place);
    }
    const bool real = token < tokens && failed == NONE;
    if (real) add_choices(choices, chunks, chunk, sum);
    for (u32 first = AHEAD_CHOICES; real && first < p.g.top_k; first += AHEAD_CHOICES) {
        choices = read_choices(p, c, token, first);
        add_choices(choices, chunks, chunk, sum);
    }
#pragma unroll
    for (u32 i = 0; i < REDUCE_CHUNKS; i++) {
        if (chunk[i] >= chunks) continue;
        if (real && p.shared) add_scaled(sum[i], 1.0f, extra[i]);
        uint4 out;
        out.x = pack_bf16(sum[i][0], sum[i][1]);
        out.y = pack_bf16(sum[i][2], sum[i][3]);
        out.z = pack_bf16(sum[i][4], sum[i][5]);
        out.w = pack_bf16(sum[i][6], sum[i][7]);
        store_row(p.out + at + (i * REDUCE_THREADS + threadIdx.x) * 16, out);
    }
}
