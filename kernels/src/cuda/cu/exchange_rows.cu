// Rows on their way: pulled to the experts, pushed back, summed.
#include "exchange.cuh"

constexpr u32 ROW_THREADS = 256;
constexpr u32 REDUCE_THREADS = 128;

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

// The scales of 32 tokens: a warp reads those of one K block side by side and scatters them.
__device__ __forceinline__ void gather_scales(const GatherParams& p, u64 heap, const u32* place, u32 first, u32 tokens) {
    const u32 token = first + (threadIdx.x & 31);
    if (token >= tokens) return;
    const u32* places = place + token * p.g.top_k;
    const float* from = reinterpret_cast<const float*>(heap + p.g.scales_at) + token;
    float* to = reinterpret_cast<float*>(p.scales);
    constexpr u32 AHEAD = 8, WARPS = ROW_THREADS / 32;
    for (u32 block = threadIdx.x / 32; block < p.g.scale_blocks; block += AHEAD * WARPS) {
        float v[AHEAD];
#pragma unroll
        for (u32 a = 0; a < AHEAD; a++) {
            const u32 b = block + a * WARPS;
            if (b < p.g.scale_blocks) v[a] = from[u64(b) * p.g.tokens_max];
        }
        for (u32 k = 0; k < p.g.top_k; k++) {
            const u32 row = places[k];
            if (row == IDLE) continue;
#pragma unroll
            for (u32 a = 0; a < AHEAD; a++) {
                const u32 b = block + a * WARPS;
                if (b < p.g.scale_blocks) to[u64(b) * p.rows_stride + row] = v[a];
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS) exchange_gather(const __grid_constant__ GatherParams p) {
    __shared__ u32 token_base[RANKS_MAX + 1], group_base[RANKS_MAX + 1];
    wait_for_previous();
    let_next_start();
    const Context* c = reinterpret_cast<const Context*>(p.context);
    const Plan* plan = reinterpret_cast<const Plan*>(p.plan);
    const u32 dp = c->dp;
    if (threadIdx.x <= dp) {
        token_base[threadIdx.x] = plan->token_base[threadIdx.x];
        group_base[threadIdx.x] = plan->group_base[threadIdx.x];
    }
    __syncthreads();
    const u32 groups = p.g.scale_blocks ? group_base[dp] : 0, units = groups + token_base[dp];
    const u32* place = reinterpret_cast<const u32*>(p.place);
    const u32 stride = p.g.tokens_max * p.g.top_k;
    for (u32 unit = blockIdx.x; unit < units; unit += gridDim.x) {
        if (unit < groups) {
            const u32 d = find(group_base, dp, unit);
            const u32 tokens = token_base[d + 1] - token_base[d];
            gather_scales(p, c->dp_heap[d], place + d * stride, (unit - group_base[d]) * 32, tokens);
        } else {
            const u32 d = find(token_base, dp, unit - groups);
            const u32 token = unit - groups - token_base[d];
            const u64 from = c->dp_heap[d] + p.g.rows_at + u64(token) * p.g.row_bytes;
            gather_token(p, from, place + d * stride + token * p.g.top_k);
        }
    }
}

// Tells the DP peers that their rows are there, and waits for what this rank's own tokens need. By one CTA.
__device__ void finish_round(const Context* c, State* s) {
    if (!c->flags || s->failed != NONE) return;
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
    wait_for_previous();
    const Context* c = reinterpret_cast<const Context*>(p.context);
    State* s = reinterpret_cast<State*>(p.state);
    if (s->failed != NONE) return;
    const Push* push = reinterpret_cast<const Push*>(p.push);
    const u32 chunks = p.g.hidden / 8, keep = p.in_place ? c->my_dp : IDLE;
    const bool alone = c->dp == 1 && keep == 0;
    const u32 rows = alone ? 0 : reinterpret_cast<const Plan*>(p.plan)->rows;
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
    // The last CTA speaks for all: each one's stores are fenced before its ticket is drawn.
    __syncthreads();
    if (threadIdx.x == 0) {
        fence_system();
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
    wait_for_previous();
    finish_round(reinterpret_cast<const Context*>(p.context), reinterpret_cast<State*>(p.state));
}

struct ReduceParams {
    Geometry g;
    u64 context;
    u64 state;
    u64 weights;  // f32 [rows][top_k]
    u64 place;
    u64 local;    // bf16 [rows_max][hidden]: where rows for this rank itself stayed; 0: all were pushed
    u64 shared;   // bf16 [rows][hidden]: added last; 0: none
    u64 out;      // bf16 [rows][hidden]
    u32 parts;    // CTAs of one row
};

__device__ __forceinline__ void add_scaled(float (&sum)[8], float weight, uint4 v) {
    const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        sum[2 * i] = fmaf(weight, low_bf16(pairs[i]), sum[2 * i]);
        sum[2 * i + 1] = fmaf(weight, high_bf16(pairs[i]), sum[2 * i + 1]);
    }
}

// One row of one choice, 0 if there is none: another rank's in `combined`, this rank's own where it was computed.
__device__ __forceinline__ u64 result_row(const ReduceParams& p, const Context* c, u32 slot, u32 entry) {
    if (slot == IDLE) return 0;
    const u32 ep = slot / c->slots;
    if (ep >= c->ep) return 0;
    if (p.local && ep == c->my_ep) {
        const u32* place = reinterpret_cast<const u32*>(p.place) + c->my_dp * p.g.tokens_max * p.g.top_k;
        return p.local + u64(place[entry]) * p.g.hidden * 2;
    }
    return c->own + p.g.combined_at + ep * p.g.combined_stride + u64(entry) * p.g.hidden * 2;
}

extern "C" __global__ void __launch_bounds__(REDUCE_THREADS) exchange_reduce(const __grid_constant__ ReduceParams p) {
    wait_for_previous();
    let_next_start();
    const Context* c = reinterpret_cast<const Context*>(p.context);
    const u32 token = blockIdx.x / p.parts;
    const u32 chunk = blockIdx.x % p.parts * REDUCE_THREADS + threadIdx.x;
    if (chunk >= p.g.hidden / 8) return;
    float sum[8] = {};
    const bool failed = reinterpret_cast<const State*>(p.state)->failed != NONE;
    const bool real = !failed && token < *reinterpret_cast<const u32*>(c->own + HEADER);
    const u32* slots = reinterpret_cast<const u32*>(c->own + p.g.slots_at) + token * p.g.top_k;
    const float* weights = reinterpret_cast<const float*>(p.weights) + token * p.g.top_k;
    constexpr u32 AHEAD = 8;
    for (u32 first = 0; real && first < p.g.top_k; first += AHEAD) {
        uint4 v[AHEAD];
        float weight[AHEAD];
        u64 row[AHEAD];
#pragma unroll
        for (u32 a = 0; a < AHEAD; a++) {
            const u32 k = first + a;
            row[a] = k < p.g.top_k ? result_row(p, c, slots[k], token * p.g.top_k + k) : 0;
            if (row[a]) weight[a] = weights[k];
        }
#pragma unroll
        for (u32 a = 0; a < AHEAD; a++) {
            if (row[a]) v[a] = load_row(row[a] + chunk * 16);
        }
#pragma unroll
        for (u32 a = 0; a < AHEAD; a++) {
            if (row[a]) add_scaled(sum, weight[a], v[a]);
        }
    }
    const u64 at = (u64(token) * p.g.hidden + chunk * 8) * 2;
    if (real && p.shared) add_scaled(sum, 1.0f, load_row(p.shared + at));
    uint4 out;
    out.x = pack_bf16(sum[0], sum[1]);
    out.y = pack_bf16(sum[2], sum[3]);
    out.z = pack_bf16(sum[4], sum[5]);
    out.w = pack_bf16(sum[6], sum[7]);
    store_row(p.out + at, out);
}
