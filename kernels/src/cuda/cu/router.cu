// The choice of experts, of a physical slot for each, and the count of both: one warp per token.
#include "rows.cuh"

struct RouterParams {
    // f32 [rows][experts].
    const float* logits;
    // Positions of the rows: idle ones choose nothing.
    const u32* positions;
    // Added for the choice only, f32 [experts]; null: none.
    const float* bias;
    // Slots by expert: experts + 1 starts, then the slots; those of e lie between starts e and e + 1. Empty: slot = expert.
    const u32* slot_table;
    // Outputs [rows][top_k]; idle rows: NONE and weight 0.
    u32* ids;
    u32* slots;
    float* weights;
    // Rows that chose each expert, added to; null: not counted.
    u32* loads;
    // A token's key is this plus its row.
    u64 salt;
    u32 rows;
    u32 experts;
    u32 top_k;
    // 0: experts are chosen from all groups.
    u32 groups;
    u32 top_groups;
    u32 flags;
    float scale;
    // Words of the slot table.
    u32 table_words;
};

constexpr u32 SOFTMAX = 1, TOP_TWO = 2, NORMALIZE = 4;
constexpr float TAKEN = __builtin_bit_cast(float, 0xff800000u);
constexpr float LOWEST = -3.402823466e38f;

// The CPU operation's own exponential, so that scores have its bits and ties are its ties.
__device__ __forceinline__ float exp_exact(float x) {
    float clamped = fminf(88.0f, fmaxf(-87.3f, x));
    float shifted = __fmaf_rn(clamped, 1.44269504088896341f, 12582912.0f);
    float n = __fsub_rn(shifted, 12582912.0f);
    float r = __fmaf_rn(n, -0.6933594f, clamped);
    r = __fmaf_rn(n, 2.1219444e-4f, r);
    float p = 1.9875691e-4f;
    p = __fmaf_rn(p, r, 1.3981999e-3f);
    p = __fmaf_rn(p, r, 8.333452e-3f);
    p = __fmaf_rn(p, r, 4.1665796e-2f);
    p = __fmaf_rn(p, r, 1.6666666e-1f);
    p = __fmaf_rn(p, r, 0.5f);
    float e = __fadd_rn(__fmaf_rn(p, __fmul_rn(r, r), r), 1.0f);
    float y = __fmul_rn(e, __uint_as_float((__float_as_uint(shifted) << 23) + (127u << 23)));
    if (x < -87.3f) y = 0.0f;
    return x != x ? x : y;
}

// Order of floats as order of integers; -0 is 0, and nothing is below TAKEN.
__device__ __forceinline__ u32 ordered(float x) {
    u32 bits = __float_as_uint(x == 0.0f ? 0.0f : x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The lowest index among the lanes with the best value; every lane brings its best.
__device__ __forceinline__ u32 warp_best(float value, u32 index) {
    u32 key = ordered(value), best = __reduce_max_sync(0xffffffffu, key);
    return __reduce_min_sync(0xffffffffu, key == best ? index : NONE);
}

// The slot that serves `expert` for a token; the expert map of the host picks the same.
__device__ __forceinline__ u32 slot_for(const u32* table, u32 experts, u32 expert, u64 key) {
    u32 start = table[expert], count = table[expert + 1] - start;
    u64 x = key ^ (u64(expert) << 40) ^ 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    x ^= x >> 31;
    return table[experts + 1 + start + u32(__umul64hi(x, count))];
}

// Bits of the best groups. `choice` is the warp's copy of the choice scores; at most 32 groups.
__device__ __forceinline__ u32 best_groups(const RouterParams& p, const float* choice) {
    u32 lane = threadIdx.x & 31, size = p.experts / p.groups, share = 32;
    while (32 / share < p.groups) share /= 2;
    // `share` lanes look through a group, each from another element on so that they meet no bank twice.
    u32 group = lane / share, part = lane % share, turn = group * share % size;
    float best = TAKEN, second = TAKEN;
    if (group < p.groups) {
        for (u32 i = part; i < size; i += share) {
            u32 at = i + turn < size ? i + turn : i + turn - size;
            float x = choice[group * size + at];
            second = fmaxf(second, fminf(best, x));
            best = fmaxf(best, x);
        }
    }
    for (u32 step = 1; step < share; step *= 2) {
        float other = __shfl_xor_sync(0xffffffffu, best, step), next = __shfl_xor_sync(0xffffffffu, second, step);
        second = fmaxf(fmaxf(second, next), fminf(best, other));
        best = fmaxf(best, other);
    }
    float score = (p.flags & TOP_TWO) && size > 1 ? fmaxf(best + second, LOWEST) : best;
    if (group >= p.groups || part != 0) score = TAKEN;
    u32 kept = 0;
    for (u32 i = 0; i < p.top_groups; i++) {
        u32 winner = warp_best(score, group);
        kept |= 1u << winner;
        if (group == winner) score = TAKEN;
    }
    return kept;
}

// Lane l holds experts l, l + 32, ...: PER_LANE of them.
template <int PER_LANE>
__device__ __forceinline__ void scores_of(const RouterParams& p, const float* logits, float (&scores)[PER_LANE]) {
    u32 lane = threadIdx.x & 31;
    bool softmax = p.flags & SOFTMAX;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        u32 expert = lane + 32 * i;
        scores[i] = expert < p.experts ? logits[expert] : TAKEN;
    }
    if (!softmax) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) scores[i] = 1.0f / (1.0f + exp_exact(-scores[i]));
        return;
    }
    float most = TAKEN, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) most = fmaxf(most, scores[i]);
    most = warp_max(most);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        scores[i] = lane + 32 * i < p.experts ? exp_exact(scores[i] - most) : 0.0f;
        sum += scores[i];
    }
    float factor = 1.0f / warp_sum(sum);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) scores[i] *= factor;
}

template <int PER_LANE>
__device__ __forceinline__ void route(const RouterParams& p) {
    extern __shared__ u32 table[];
    __shared__ float shared_scores[2][32 * PER_LANE], shared_choice[2][32 * PER_LANE];
    float *all_scores = shared_scores[threadIdx.x / 32], *all_choice = shared_choice[threadIdx.x / 32];
    u32 lane = threadIdx.x & 31, row = blockIdx.x * 2 + threadIdx.x / 32;
    float scores[PER_LANE], choice[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        u32 expert = lane + 32 * i;
        choice[i] = p.bias && expert < p.experts ? p.bias[expert] : 0.0f;
    }
    wait_for_previous();
    let_next_start();
    // The table is needed last: it comes in while the choice is made.
    for (u32 i = threadIdx.x; i < p.table_words; i += blockDim.x) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(table + i)), "l"(p.slot_table + i)
                     : "memory");
    }
    bool is_row = row < p.rows;
    row = is_row ? row : 0;
    bool idle = p.positions[row] == IDLE;
    // Idle rows choose too, and are told apart at the end: a branch here would wait for their positions.
    scores_of<PER_LANE>(p, p.logits + u64(row) * p.experts, scores);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        u32 expert = lane + 32 * i;
        // The maximum also turns NaN into a number, so that a broken model still chooses different experts.
        choice[i] = expert < p.experts ? fmaxf(scores[i] + choice[i], LOWEST) : TAKEN;
        all_scores[expert] = scores[i];
        all_choice[expert] = choice[i];
    }
    __syncwarp();
    if (p.groups) {
        u32 kept = best_groups(p, all_choice);
        float per_group = float(p.groups) / float(p.experts);
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            u32 group = u32((float(lane + 32 * i) + 0.5f) * per_group);
            if (!(kept >> (group & 31) & 1)) choice[i] = TAKEN;
        }
    }
    u32 id = 0;
    for (u32 k = 0; k < p.top_k; k++) {
        float best = choice[0];
        u32 index = lane;
#pragma unroll
        for (int i = 1; i < PER_LANE; i++) {
            if (choice[i] > best) best = choice[i], index = lane + 32 * i;
        }
        u32 winner = warp_best(best, index);
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            if (winner == lane + 32 * i) choice[i] = TAKEN;
        }
        if (lane == k) id = winner;
    }
    float weight = all_scores[id], sum = 0.0f;
    for (u32 k = 0; k < p.top_k; k++) sum += __shfl_sync(0xffffffffu, weight, k);
    if (p.flags & NORMALIZE) weight /= sum + 1e-20f;
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    if (!is_row || lane >= p.top_k) return;
    u64 out = u64(row) * p.top_k + lane;
    u32 slot = p.table_words ? slot_for(table, p.experts, id, p.salt + row) : id;
    p.ids[out] = idle ? NONE : id;
    p.slots[out] = idle ? NONE : slot;
    p.weights[out] = idle ? 0.0f : weight * p.scale;
    if (p.loads && !idle) atomicAdd(p.loads + id, 1u);
}

#define ROUTE(PER_LANE)                                                                                           \
    extern "C" __global__ void __launch_bounds__(64) route_##PER_LANE(const __grid_constant__ RouterParams p) { \
        route<PER_LANE>(p);                                                                                       \
    }
ROUTE(1)
ROUTE(2)
ROUTE(4)
ROUTE(8)
ROUTE(16)
