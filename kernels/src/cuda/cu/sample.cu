// Draws tokens from rows of logits, and says how likely they were.
//
// A cluster of eight blocks draws from one row and keeps it in shared memory. Each of its 128 warps owns a segment of
// neighbouring tokens, each lane a chunk of neighbours in it. Thresholds of top-k and top-p are found by search over the
// bits of the weights, so nothing is sorted. All sums have an order that only the row decides: f32 within a lane where
// they are compared, f64 beyond.
#include "cluster_row.cuh"
#include "rows.cuh"

struct SampleRow {
    // In [0, 1): where in the remaining weight the token is drawn.
    double uniform;
    // Below TEMPERATURE_MIN: the most likely token.
    float temperature;
    // 1: all tokens.
    float top_p;
    float min_p;
    // 0: all tokens.
    u32 top_k;
    u32 flags;
    // How many of the most likely tokens to name.
    u32 top;
};

struct SampleParams {
    // f32, `stride` elements from row to row.
    const float* logits;
    const SampleRow* rows;
    // Outputs, [rows]: what was drawn, its log-probability and rank, how it went.
    u32* tokens;
    float* logprobs;
    u32* ranks;
    u32* status;
    // [rows][top_max]: the most likely tokens.
    u32* top_tokens;
    float* top_logprobs;
    u64 stride;
    u32 vocab;
    // Tokens of a lane: odd, so that lanes meet in no bank.
    u32 chunk;
    u32 top_max;
    // Rows may be read 16 bytes at a time.
    u32 wide;
};

constexpr u32 DRAW = 1, LOGPROB = 2;
constexpr u32 OK = 0, NOT_FINITE = 1, NOTHING_LEFT = 2;
constexpr float TEMPERATURE_MIN = 1e-5f;
constexpr float LEAST = __builtin_bit_cast(float, 0xff800000u);
// Bits of weight 1, the largest.
constexpr u32 ONE = 0x3f800000u;
// Better logits are larger, of equal ones the smaller token.
__device__ __forceinline__ u64 key_of(float logit, u32 token) {
    u32 bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);
    u32 ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    return u64(ordered) << 32 | (0xffffffffu - token);
}

__device__ __forceinline__ u32 token_of(u64 key) { return 0xffffffffu - u32(key); }

__device__ __forceinline__ float logit_of(u64 key) {
    u32 ordered = u32(key >> 32);
    return __uint_as_float(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

// Brings the segment into shared memory, LEAST behind the vocabulary. Returns the best key that this lane saw, or all
// ones where it saw a logit that cannot be used.
__device__ __forceinline__ u64 load_segment(const Lane& l, const float* logits, u32 vocab, bool wide) {
    float* to = l.x - l.lane * l.chunk;
    u32 start = l.first - l.lane * l.chunk, length = 32 * l.chunk, best = start;
    float most = LEAST;
    bool usable = true;
    auto see = [&](float x, u32 token) {
        usable = usable && x < -LEAST;
        if (x > most) most = x, best = token;
    };
    if (wide) {
#pragma unroll 4
        for (u32 i = 4 * l.lane; i < length; i += 128) {
            float4 x = make_float4(LEAST, LEAST, LEAST, LEAST);
            if (start + i < vocab) x = *reinterpret_cast<const float4*>(logits + start + i);
            *reinterpret_cast<float4*>(to + i) = x;
            see(x.x, start + i);
            see(x.y, start + i + 1);
            see(x.z, start + i + 2);
            see(x.w, start + i + 3);
        }
    } else {
#pragma unroll 4
        for (u32 i = l.lane; i < length; i += 32) {
            float x = start + i < vocab ? logits[start + i] : LEAST;
            to[i] = x;
            see(x, start + i);
        }
    }
    __syncwarp();
    return usable ? key_of(most, best) : ~0ull;
}

// The best key of a chunk below `last`; 0 for none.
__device__ __forceinline__ u64 best_below(const Lane& l, u32 vocab, u64 last) {
    u64 best = 0;
    for (u32 i = 0; i < l.chunk && l.first + i < vocab; i++) {
        u64 key = key_of(l.x[i], l.first + i);
        if (key < last && key > best) best = key;
    }
    return best;
}

// The `top` most likely tokens, one by one.
__device__ __forceinline__ void name_top(Lane& l, const SampleParams& p, u32 row, u32 top, float most, double log_sum) {
    u64 last = ~0ull, best = top ? best_below(l, p.vocab, last) : 0;
    for (u32 n = 0; n < top; n++) {
        last = row_max(l, best);
        if (last && best == last) best = best_below(l, p.vocab, last);
        if (l.segment == 0 && l.lane == 0) {
            u64 at = u64(row) * p.top_max + n;
            p.top_tokens[at] = last ? token_of(last) : NONE;
            p.top_logprobs[at] = last ? float(double(logit_of(last)) - double(most) - log_sum) : LEAST;
        }
    }
}

// Sums, for each of seven ascending thresholds, of the weights from it to `high`; or their number.
template <bool COUNT>
__device__ __forceinline__ void add_weights(const u32* weights, u32 stride, u32 number, const u32 (&from)[7], u32 high,
                                            float (&sums)[ITEMS]) {
#pragma unroll 8
    for (u32 i = 0; i < number; i++) {
        u32 bits = weights[i * stride];
        float weight = bits < high ? (COUNT ? 1.0f : __uint_as_float(bits)) : 0.0f;
#pragma unroll
        for (int j = 0; j < 7; j++) {
            // A conditional sum in two instructions; the compiler makes four of it.
            asm("{\n.reg .pred p;\nsetp.ge.u32 p, %1, %2;\n@p add.f32 %0, %0, %3;\n}"
                : "+f"(sums[j])
                : "r"(bits), "r"(from[j]), "f"(weight));
        }
    }
}

// Sets the weights in `low..high` aside. Returns whether there was room.
__device__ __forceinline__ bool list_weights(const Lane& l, u32 low, u32 high, u32& number) {
    u32 mine = 0;
#pragma unroll 8
    for (u32 i = 0; i < l.chunk; i++) mine += __float_as_uint(l.x[i]) - low < high - low;
    u32 at = scan_lanes(mine, l.lane);
    number = __shfl_sync(0xffffffffu, at, 31);
    if (number > LIST) return false;
    at -= mine;
#pragma unroll 8
    for (u32 i = 0; i < l.chunk; i++) {
        u32 bits = __float_as_uint(l.x[i]);
        if (bits - low < high - low) l.list[at++] = bits;
    }
    for (u32 i = number + l.lane; i < (number + 31) / 32 * 32; i += 32) l.list[i] = 0;
    __syncwarp();
    return true;
}

// What a search looks at first: most of what is likely lies within few octaves of the most likely token.
__device__ __forceinline__ void first_thresholds(u32 (&from)[7]) {
    constexpr u32 OCTAVES[7] = {20, 13, 9, 6, 4, 2, 1};
#pragma unroll
    for (u32 j = 0; j < 7; j++) from[j] = ONE - (OCTAVES[j] << 23);
}

// Keeps the best tokens until their number, or their weight, reaches `target`; the weight of the others becomes 0.
// Of equal weights those of the smaller tokens are kept.
template <bool COUNT>
__device__ __forceinline__ void keep_best(Lane& l, double target) {
    // At least `target` lies at and above `low`, less at and above `high`, namely `above`.
    u32 low = 1, high = ONE + 1, listed = 0, from[7];
    double above = 0.0;
    bool is_listed = false;
    first_thresholds(from);
    for (u32 round = 0; high - low > 1; round++) {
        if (round > 0) {
            u32 span = high - low;
#pragma unroll
            for (u32 j = 0; j < 7; j++) from[j] = low + min(max(span / 8, 1u) * (j + 1), span - 1);
            if (!is_listed) is_listed = list_weights(l, low, high, listed);
        }
        float mine[ITEMS] = {};
        if (is_listed) {
            add_weights<COUNT>(l.list + l.lane, 32, (listed + 31) / 32, from, high, mine);
        } else {
            add_weights<COUNT>(reinterpret_cast<const u32*>(l.x), 1, l.chunk, from, high, mine);
        }
        const double* sums = row_sums(l, mine);
        // The sums descend: the first so many thresholds have enough above them.
        u32 enough = __popc(__ballot_sync(0xffffffffu, l.lane < 7 && above + sums[min(l.lane, 6u)] >= target));
        if (enough < 7) above += sums[enough];
#pragma unroll
        for (u32 j = 0; j < 7; j++) {
            if (j + 1 == enough) low = from[j];
            if (j == enough) high = from[j];
        }
    }
    double one = COUNT ? 1.0 : double(__uint_as_float(low));
    double missing = ceil((target - above) / one);
    u32 wanted = missing > 1.0 ? u32(missing) : 1, mine = 0;
#pragma unroll 8
    for (u32 i = 0; i < l.chunk; i++) mine += __float_as_uint(l.x[i]) == low;
    u32 rank = scan_lanes(mine, l.lane);
    const u64* numbers = share(l, __shfl_sync(0xffffffffu, rank, 31));
    u32 before = 0;
#pragma unroll
    for (u32 j = 0; j < SEGMENTS; j += 32) before += l.lane + j < l.segment ? u32(numbers[l.lane + j]) : 0;
    rank += __reduce_add_sync(0xffffffffu, before) - mine;
#pragma unroll 8
    for (u32 i = 0; i < l.chunk; i++) {
        u32 bits = __float_as_uint(l.x[i]);
        bool tie = bits == low;
        if (bits < low || (tie && rank >= wanted)) l.x[i] = 0.0f;
        rank += tie;
    }
}

__device__ __forceinline__ float sum_of_chunk(const Lane& l) {
    float sum = 0.0f;
#pragma unroll 8
    for (u32 i = 0; i < l.chunk; i++) sum += l.x[i];
    return sum;
}

// The token at `uniform` of the total weight, in order of tokens: only one lane of the cluster returns it, plus 1, all
// others 0. Where rounding finds none, the last with any weight.
__device__ __forceinline__ u32 pick(Lane& l, double uniform) {
    double mine = double(sum_of_chunk(l)), through_lane = scan_lanes(mine, l.lane);
    const u64* numbers = share(l, bits_of(__shfl_sync(0xffffffffu, through_lane, 31)));
    constexpr u32 EACH = SEGMENTS / 32;
    double parts[EACH], part = 0.0;
    u32 last = 0;
#pragma unroll
    for (u32 j = 0; j < EACH; j++) {
        parts[j] = double_of(numbers[l.lane * EACH + j]);
        part += parts[j];
        if (parts[j] > 0.0) last = l.lane * EACH + j;
    }
    double through = scan_lanes(part, l.lane), before = through - part;
    double target = uniform * __shfl_sync(0xffffffffu, through, 31), left = 0.0;
    u32 found = NONE;
#pragma unroll
    for (u32 j = 0; j < EACH; j++) {
        if (found == NONE && parts[j] > 0.0 && before + parts[j] > target) {
            found = l.lane * EACH + j;
            left = target - before;
        }
        before += parts[j];
    }
    u32 segment = __reduce_min_sync(0xffffffffu, found);
    left = __shfl_sync(0xffffffffu, left, segment / EACH & 31);
    if (segment == NONE) {
        segment = __reduce_max_sync(0xffffffffu, last);
        left = through_lane * 2.0 + 1.0;
    }
    if (segment != l.segment) return 0;
    u32 some = __ballot_sync(0xffffffffu, mine > 0.0);
    u32 beyond = __ballot_sync(0xffffffffu, mine > 0.0 && through_lane > left);
    u32 owner = beyond ? __ffs(beyond) - 1 : 31 - __clz(some);
    if (l.lane != owner) return 0;
    // The sums of the walk end at the lane's own.
    float sum = 0.0f;
    left -= through_lane - mine;
    u32 token = 0;
    bool found_token = false;
#pragma unroll 8
    for (u32 i = 0; i < l.chunk; i++) {
        float weight = l.x[i];
        sum += weight;
        if (weight > 0.0f && !found_token) {
            token = l.first + i + 1;
            found_token = double(sum) > left;
        }
    }
    return token;
}

// Weights of all tokens relative to the most likely one, then the filters, then the draw: as `pick` returns it.
__device__ __forceinline__ u32 draw(Lane& l, const SampleRow& r, float most) {
    float inverse = 1.0f / r.temperature;
    u32 count = 0;
#pragma unroll 8
    for (u32 i = 0; i < l.chunk; i++) {
        float weight = expf((l.x[i] - most) * inverse);
        weight = weight >= r.min_p ? weight : 0.0f;
        l.x[i] = weight;
        count += weight > 0.0f;
    }
    __syncwarp();
    if (r.top_k > 0) {
        double candidates = row_sum(l, double(count));
        if (double(r.top_k) < candidates) keep_best<true>(l, double(r.top_k));
    }
    if (r.top_p < 1.0f) keep_best<false>(l, double(r.top_p) * row_sum(l, double(sum_of_chunk(l))));
    return pick(l, r.uniform);
}

// Tokens of the row that are better than this one.
__device__ __forceinline__ u32 better_than(Lane& l, const float* logits, u32 vocab, float logit, u32 token) {
    u32 start = l.first - l.lane * l.chunk, better = 0;
#pragma unroll 4
    for (u32 i = l.lane; i < 32 * l.chunk; i += 32) {
        u32 other = start + i;
        float x = other < vocab ? logits[other] : LEAST;
        better += x > logit || (x == logit && other < token);
    }
    return u32(row_sum(l, double(better)));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) sample(const __grid_constant__ SampleParams p) {
    extern __shared__ __align__(16) float segments[];
    __shared__ __align__(16) Told told;
    __shared__ u32 lists[WARPS][LIST];
    prepare(told);
    wait_for_previous();
    let_next_start();
    u32 row = blockIdx.x / BLOCKS, warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    SampleRow r = p.rows[row];
    if (!(r.flags & DRAW)) {
        meet();
        return;
    }
    const float* logits = p.logits + row * p.stride;
    u32 segment = blockIdx.x % BLOCKS * WARPS + warp;
    Lane l = {segments + threadIdx.x * p.chunk, p.chunk, (segment * 32 + lane) * p.chunk, segment, lane, &told, 0,
              lists[warp]};
    bool writes = segment == 0 && lane == 0;
    u64 key = load_segment(l, logits, p.vocab, p.wide);
    meet();
    key = row_max(l, key);
    float most = logit_of(key);
    u32 token = token_of(key);
    if (key == ~0ull || most == LEAST) {
        if (writes) {
            p.status[row] = key == ~0ull ? NOT_FINITE : NOTHING_LEFT;
            p.tokens[row] = NONE;
        }
        return;
    }
    if (writes) p.status[row] = OK;
    bool asked = r.flags & LOGPROB, greedy = r.temperature < TEMPERATURE_MIN;
    double log_sum = 0.0;
    if (asked) {
        float sum = 0.0f;
#pragma unroll 8
        for (u32 i = 0; i < l.chunk; i++) sum += expf(l.x[i] - most);
        log_sum = log(row_sum(l, double(sum)));
        name_top(l, p, row, min(r.top, p.top_max), most, log_sum);
    }
    u32 drawn = greedy ? (writes ? token + 1 : 0) : draw(l, r, most);
    if (drawn) p.tokens[row] = drawn - 1;
    if (!asked) return;
    u32 best = token;
    if (!greedy) token = u32(row_max(l, drawn)) - 1;
    float logit = logits[token];
    u32 rank = token == best ? 1 : better_than(l, logits, p.vocab, logit, token) + 1;
    if (writes) {
        p.ranks[row] = rank;
        p.logprobs[row] = float(double(logit) - double(most) - log_sum);
    }
}

struct NextTokensParams {
    // [rows]: tokens that the host knows, and for the others the row of the last step that drew them, NONE: the host's.
    const u32* known;
    const u32* from_previous;
    // Drawn by the last step.
    const u32* drawn;
    // [rows].
    u32* tokens;
    u32 rows;
    u32 drawn_rows;
};

extern "C" __global__ void __launch_bounds__(256) next_tokens(const __grid_constant__ NextTokensParams p) {
    wait_for_previous();
    let_next_start();
    u32 row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= p.rows) return;
    u32 from = p.from_previous[row];
    p.tokens[row] = from == NONE ? p.known[row] : from < p.drawn_rows ? p.drawn[from] : NONE;
}
