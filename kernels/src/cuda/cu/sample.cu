// Draws tokens from rows of logits, and says how likely they were.
//
// A cluster of eight blocks draws from one row and keeps it in shared memory; each of its 128 warps owns a segment of
// neighbouring tokens. Thresholds of top-k and top-p are found by search over the bits of the weights, so nothing is
// sorted; all sums are f64 in an order that only the vocabulary decides.
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
    // Tokens of a segment, a multiple of 4.
    u32 segment;
    u32 top_max;
    // Rows may be read 16 bytes at a time.
    u32 wide;
};

constexpr u32 DRAW = 1, LOGPROB = 2;
constexpr u32 OK = 0, NOT_FINITE = 1, NOTHING_LEFT = 2;
constexpr float TEMPERATURE_MIN = 1e-5f;
constexpr u32 BLOCKS = 8, WARPS = 16, SEGMENTS = BLOCKS * WARPS;
constexpr float LEAST = __builtin_bit_cast(float, 0xff800000u);
// Bits of weight 1, the largest.
constexpr u32 ONE = 0x3f800000u;

// What a warp knows of its row.
struct Warp {
    // Its segment.
    float* x;
    u32 length;
    // Its first token and its place among the segments.
    u32 first;
    u32 segment;
    u32 lane;
    // Two sets of three numbers of every warp, used in turn.
    u64 (*slots)[SEGMENTS][3];
    u32 turn;
};

__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Tells all warps of the cluster N numbers of this one. Returns where those of all are; good until the call after the next.
template <int N>
__device__ __forceinline__ const u64 (*share(Warp& w, const u64 (&mine)[N]))[3] {
    u64(*slots)[3] = w.slots[w.turn & 1];
    w.turn++;
    if (w.lane < BLOCKS) {
        u32 to;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(slots[w.segment])), "r"(w.lane));
#pragma unroll
        for (int i = 0; i < N; i++) {
            asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(to + 8 * i), "l"(mine[i]) : "memory");
        }
    }
    cluster_barrier();
    return slots;
}

__device__ __forceinline__ u64 bits_of(double x) { return __double_as_longlong(x); }
__device__ __forceinline__ double double_of(u64 bits) { return __longlong_as_double(bits); }

__device__ __forceinline__ double sum_of_lanes(double x) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

__device__ __forceinline__ u64 max_of_lanes(u64 x) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) {
        u64 other = __shfl_xor_sync(0xffffffffu, x, step);
        x = other > x ? other : x;
    }
    return x;
}

// Sums over the row.
template <int N>
__device__ __forceinline__ void row_sum(Warp& w, double (&sums)[N]) {
    u64 mine[N];
#pragma unroll
    for (int i = 0; i < N; i++) mine[i] = bits_of(sum_of_lanes(sums[i]));
    auto slots = share(w, mine);
#pragma unroll
    for (int i = 0; i < N; i++) {
        double sum = 0.0;
#pragma unroll
        for (int j = 0; j < SEGMENTS / 32; j++) sum += double_of(slots[w.lane * (SEGMENTS / 32) + j][i]);
        sums[i] = sum_of_lanes(sum);
    }
}

__device__ __forceinline__ u64 row_max(Warp& w, u64 key) {
    u64 mine[1] = {max_of_lanes(key)};
    auto slots = share(w, mine);
    key = 0;
    for (u32 i = w.lane; i < SEGMENTS; i += 32) key = slots[i][0] > key ? slots[i][0] : key;
    return max_of_lanes(key);
}

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

// Brings the segment into shared memory; behind the vocabulary lies LEAST. Returns whether all logits are usable.
__device__ __forceinline__ bool load_segment(const Warp& w, const float* logits, u32 vocab, bool wide) {
    bool usable = true;
    if (wide) {
#pragma unroll 4
        for (u32 i = 4 * w.lane; i < w.length; i += 128) {
            float4 x = make_float4(LEAST, LEAST, LEAST, LEAST);
            if (w.first + i < vocab) x = *reinterpret_cast<const float4*>(logits + w.first + i);
            *reinterpret_cast<float4*>(w.x + i) = x;
            usable = usable && x.x < -LEAST && x.y < -LEAST && x.z < -LEAST && x.w < -LEAST;
        }
    } else {
#pragma unroll 4
        for (u32 i = w.lane; i < w.length; i += 32) {
            float x = w.first + i < vocab ? logits[w.first + i] : LEAST;
            w.x[i] = x;
            usable = usable && x < -LEAST;
        }
    }
    __syncwarp();
    return usable;
}

// The `top` most likely tokens, one by one.
__device__ __forceinline__ void name_top(Warp& w, const SampleParams& p, u32 row, u32 top, float most, double log_sum) {
    u64 last = ~0ull;
    for (u32 n = 0; n < top; n++) {
        u64 best = 0;
        for (u32 i = w.lane; i < w.length; i += 32) {
            u64 key = key_of(w.x[i], w.first + i);
            if (w.first + i < p.vocab && key < last && key > best) best = key;
        }
        last = row_max(w, best);
        if (w.segment == 0 && w.lane == 0) {
            u64 at = u64(row) * p.top_max + n;
            p.top_tokens[at] = last ? token_of(last) : NONE;
            p.top_logprobs[at] = last ? float(double(logit_of(last)) - double(most) - log_sum) : LEAST;
        }
    }
}

// Keeps the best tokens until their number, or their weight, reaches `target`; the weight of the others becomes 0.
// Of equal weights those of the smaller tokens are kept.
template <bool COUNT>
__device__ __forceinline__ void keep_best(Warp& w, double target) {
    // At least `target` lies at and above `low`, less at and above `high`, namely `above`.
    u32 low = 1, high = ONE + 1;
    double above = 0.0;
    while (high - low > 1) {
        u32 span = high - low;
        u32 t1 = low + max(1u, span / 4), t2 = low + max(1u, span / 2), t3 = low + max(1u, u32(u64(span) * 3 / 4));
        double sums[3] = {};
        for (u32 i = w.lane; i < w.length; i += 32) {
            float weight = w.x[i];
            u32 bits = __float_as_uint(weight);
            if (bits < t1 || bits >= high) continue;
            double one = COUNT ? 1.0 : double(weight);
            if (bits >= t3) sums[0] += one;
            else if (bits >= t2) sums[1] += one;
            else sums[2] += one;
        }
        row_sum(w, sums);
        double at3 = above + sums[0], at2 = at3 + sums[1], at1 = at2 + sums[2];
        if (at3 >= target) {
            low = t3;
        } else if (at2 >= target) {
            low = t2, high = t3, above = at3;
        } else if (at1 >= target) {
            low = t1, high = t2, above = at2;
        } else {
            high = t1, above = at1;
        }
    }
    double one = COUNT ? 1.0 : double(__uint_as_float(low));
    u32 wanted = max(1u, u32(ceil((target - above) / one)));
    u32 ties = 0;
    for (u32 i = w.lane; i < w.length; i += 32) ties += __float_as_uint(w.x[i]) == low;
    u64 mine[1] = {__reduce_add_sync(0xffffffffu, ties)};
    auto slots = share(w, mine);
    u32 before = 0;
    for (u32 i = w.lane; i < w.segment; i += 32) before += u32(slots[i][0]);
    before = __reduce_add_sync(0xffffffffu, before);
    for (u32 start = 0; start < w.length; start += 32) {
        u32 i = start + w.lane, bits = i < w.length ? __float_as_uint(w.x[i]) : 0;
        u32 mask = __ballot_sync(0xffffffffu, bits == low), rank = before + __popc(mask & ((1u << w.lane) - 1));
        if (i < w.length && (bits < low || (bits == low && rank >= wanted))) w.x[i] = 0.0f;
        before += __popc(mask);
    }
    __syncwarp();
}

// Inclusive sums over the lanes.
__device__ __forceinline__ double scan_lanes(double x, u32 lane) {
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        double other = __shfl_up_sync(0xffffffffu, x, step);
        if (lane >= step) x += other;
    }
    return x;
}

// The token at `uniform` of the total weight, in order of tokens; all warps know it.
__device__ __forceinline__ u32 pick(Warp& w, double uniform) {
    double sum = 0.0;
    for (u32 i = w.lane; i < w.length; i += 32) sum += double(w.x[i]);
    u64 mine[1] = {bits_of(sum_of_lanes(sum))};
    auto slots = share(w, mine);
    constexpr u32 SHARE = SEGMENTS / 32;
    double parts[SHARE], part = 0.0;
    u32 last = 0;
#pragma unroll
    for (u32 j = 0; j < SHARE; j++) {
        parts[j] = double_of(slots[w.lane * SHARE + j][0]);
        part += parts[j];
        if (parts[j] > 0.0) last = w.lane * SHARE + j;
    }
    double through = scan_lanes(part, w.lane);
    double target = uniform * __shfl_sync(0xffffffffu, through, 31), before = through - part;
    // The first segment that ends beyond the target; only rounding finds none, and takes the last with any weight.
    u32 found = NONE;
    double left = 0.0;
#pragma unroll
    for (u32 j = 0; j < SHARE; j++) {
        if (found == NONE && before + parts[j] > target) found = w.lane * SHARE + j, left = target - before;
        before += parts[j];
    }
    u32 segment = __reduce_min_sync(0xffffffffu, found);
    left = __shfl_sync(0xffffffffu, left, segment / SHARE & 31);
    if (segment == NONE) segment = __reduce_max_sync(0xffffffffu, last), left = __longlong_as_double(0x7ff0000000000000ll);
    u32 token = 0;
    if (segment == w.segment) {
        for (u32 start = 0; start < w.length; start += 32) {
            u32 i = start + w.lane;
            float weight = i < w.length ? w.x[i] : 0.0f;
            double sums = scan_lanes(double(weight), w.lane);
            u32 some = __ballot_sync(0xffffffffu, weight > 0.0f);
            u32 beyond = __ballot_sync(0xffffffffu, weight > 0.0f && sums > left);
            if (some) token = w.first + start + 31 - __clz(some);
            if (beyond) {
                token = w.first + start + __ffs(beyond) - 1;
                break;
            }
            left -= __shfl_sync(0xffffffffu, sums, 31);
        }
    }
    return u32(row_max(w, token));
}

// Weights of all tokens relative to the most likely one, then the filters, then the draw.
__device__ __forceinline__ u32 draw(Warp& w, const SampleRow& r, float most) {
    for (u32 i = w.lane; i < w.length; i += 32) {
        float weight = expf((w.x[i] - most) / r.temperature);
        w.x[i] = weight >= r.min_p ? weight : 0.0f;
    }
    __syncwarp();
    if (r.top_k > 0) {
        double count[1] = {};
        for (u32 i = w.lane; i < w.length; i += 32) count[0] += w.x[i] > 0.0f ? 1.0 : 0.0;
        row_sum(w, count);
        if (double(r.top_k) < count[0]) keep_best<true>(w, double(r.top_k));
    }
    if (r.top_p < 1.0f) {
        double total[1] = {};
        for (u32 i = w.lane; i < w.length; i += 32) total[0] += double(w.x[i]);
        row_sum(w, total);
        keep_best<false>(w, double(r.top_p) * total[0]);
    }
    return pick(w, r.uniform);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 2)
    sample(const __grid_constant__ SampleParams p) {
    extern __shared__ __align__(16) float row_part[];
    __shared__ u64 slots[2][SEGMENTS][3];
    wait_for_previous();
    let_next_start();
    u32 row = blockIdx.x / BLOCKS, warp = threadIdx.x / 32;
    SampleRow r = p.rows[row];
    if (!(r.flags & DRAW)) return;
    const float* logits = p.logits + row * p.stride;
    Warp w = {row_part + warp * p.segment, p.segment, 0, blockIdx.x % BLOCKS * WARPS + warp, threadIdx.x & 31, slots, 0};
    w.first = w.segment * p.segment;
    bool writes = w.segment == 0 && w.lane == 0;
    // Nobody may write to a block that has not begun.
    cluster_barrier();
    bool usable = load_segment(w, logits, p.vocab, p.wide);
    u64 key = usable ? 0 : ~0ull;
    for (u32 i = w.lane; usable && i < w.length; i += 32) {
        u64 other = key_of(w.x[i], w.first + i);
        key = other > key ? other : key;
    }
    key = row_max(w, key);
    float most = logit_of(key);
    u32 token = token_of(key);
    if (key == ~0ull || most == LEAST) {
        if (writes) {
            p.status[row] = key == ~0ull ? NOT_FINITE : NOTHING_LEFT;
            p.tokens[row] = NONE;
        }
        return;
    }
    double log_sum = 0.0;
    if (r.flags & LOGPROB) {
        double sum[1] = {};
        for (u32 i = w.lane; i < w.length; i += 32) sum[0] += double(expf(w.x[i] - most));
        row_sum(w, sum);
        log_sum = log(sum[0]);
        name_top(w, p, row, min(r.top, p.top_max), most, log_sum);
    }
    if (r.temperature >= TEMPERATURE_MIN) token = draw(w, r, most);
    if (writes) {
        p.status[row] = OK;
        p.tokens[row] = token;
    }
    if (!(r.flags & LOGPROB)) return;
    float logit = logits[token];
    double better[1] = {};
    for (u32 i = w.lane; i < w.length; i += 32) {
        u32 other = w.first + i;
        if (other < p.vocab) better[0] += key_of(logits[other], other) > key_of(logit, token) ? 1.0 : 0.0;
    }
    row_sum(w, better);
    if (writes) {
        p.ranks[row] = u32(better[0]) + 1;
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
