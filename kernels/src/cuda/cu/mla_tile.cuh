// What mla.cu does with one tile, and how its shared memory is laid out.
#pragma once

constexpr u32 LATENT = 512, KEY = 576;
constexpr u32 TILE_BYTES = KEY / 64 * BLOCK_BYTES;
constexpr u32 OFFSET_K = TILE_BYTES, OFFSET_P = 3 * TILE_BYTES, OFFSET_STATS = OFFSET_P + BLOCK_BYTES;
constexpr u32 OFFSET_BARRIERS = OFFSET_STATS + 8 * 64 * 4;
static_assert(OFFSET_BARRIERS + 15 * 8 <= SHARED_BYTES, "shared memory");
constexpr u32 ROPE_AT = 8 * BLOCK_BYTES, RIGHT_AT = 4 * BLOCK_BYTES;
// Parts of a tile that are filled and freed on their own: output columns 0..256, 256..512, rotated columns.
enum Part { LEFT, RIGHT, ROPE };
// Named barriers: maximum of tile 0 is known; probabilities of tile 1, of tile 0 are in shared memory; the products with
// the right half of tile 0 are on their way; sums are in shared memory.
enum Named { MAX0 = 1, PROBABILITIES1, PROBABILITIES0, VALUES0, SUMS, OWN };

struct Params {
    TensorMap query;
    TensorMap cache;
    const Item* items;
    const u32* first;  // [clusters]: item * sets of heads + set, or NONE
    const u32* next;   // [items][sets of heads]
    const u32* block_table;
    bf16* out;
    float* partial;  // [rows of the segment][chunks_max][blocks of heads][2][33][128][4]: a thread's output, maxima, sums
    u32* arrived;    // [rows of the segment][chunks_max][blocks of heads][2]: zeros between launches
    u32 blocks_max;
    u32 heads;
    u32 row0;
    u32 chunks_max;
    float scale_log2;
};

// o += p v of a tile, p from registers. `p` and `v` are operands, here and below.
__device__ __forceinline__ void values(float (&o)[128], const u32 (&p)[16], u32 v) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) value_step(o, p + 4 * i, operand(v, i * 2048));
    wgmma_commit();
}

__device__ __forceinline__ void values(float (&o)[128], u32 p, u32 v) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) value_step(o, operand(p, i * 32), operand(v, i * 2048));
    wgmma_commit();
}

template <int FROM, int TO, bool FRESH>
__device__ __forceinline__ void scores(float (&s)[32], u32 q, u32 k) {
    // Not known to be the same in every round, or all their sums would be kept in registers.
    asm volatile("" : "+r"(q), "+r"(k));
#pragma unroll
    for (int block = FROM; block < TO; block++) {
#pragma unroll
        for (int step = 0; step < 4; step++) {
            u32 at = block * BLOCK_BYTES + step * 32;
            score_step(s, operand(q, at), operand(k, at), !(FRESH && block == FROM && step == 0));
        }
    }
}

// Multiplying by one changes nothing, so a warp that need not does not.
__device__ __forceinline__ void rescale(float (&o)[128], float upper, float lower) {
    if (__any_sync(0xffffffffu, upper != 1.0f || lower != 1.0f)) {
#pragma unroll
        for (int i = 0; i < 128; i += 4) {
            o[i] *= upper, o[i + 1] *= upper;
            o[i + 2] *= lower, o[i + 3] *= lower;
        }
    }
}

__device__ __forceinline__ void pack(const float (&s)[32], u32 (&p)[16]) {
#pragma unroll
    for (int i = 0; i < 16; i++) p[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
}

// Stores a 64 x 64 tile of probabilities as a swizzled operand.
__device__ __forceinline__ void store_tile(u32 to, const u32 (&p)[16], u32 thread) {
    u32 row = thread / 32 * 16 + thread % 16;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u32 unit = (2 * i + thread % 32 / 16) ^ (row % 8);
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to + row * 128 + unit * 16),
                     "r"(p[4 * i]), "r"(p[4 * i + 1]), "r"(p[4 * i + 2]), "r"(p[4 * i + 3])
                     : "memory");
    }
}

// Scores beyond the row's length do not count.
__device__ __forceinline__ void mask(float (&s)[32], u32 positions, u32 thread) {
#pragma unroll
    for (u32 i = 0; i < 32; i++) {
        u32 position = i / 4 * 8 + thread % 4 * 2 + i % 2;
        if (position >= positions) s[i] = NEGATIVE;
    }
}

// What lies in a page beyond the row's length may be NaN, which no probability of zero takes away. Scores are masked,
// so the values need clearing only when the scores are done.
__device__ __forceinline__ void clear_rows(u32 tile, u32 from, u32 thread) {
    for (u32 i = thread; i < (PAGE - from) * (LATENT / 8); i += 128) {
        u32 at = tile + i % (LATENT / 64) * BLOCK_BYTES + (from + i / (LATENT / 8)) * 128 + i / (LATENT / 64) % 8 * 16;
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
    }
    fence_async();
}

struct Row {
    float upper, lower;
};

// What a consumer thread keeps of its two rows (heads): a running maximum in powers of two, and its part of the sum.
struct Softmax {
    Row max, sum;
};

// The largest score of a row in this tile, or the maximum so far.
__device__ __forceinline__ Row tile_max(const float (&s)[32], Row max, float scale) {
    Row tile = {s[0], s[2]};
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
        tile.upper = fmaxf(tile.upper, fmaxf(s[i], s[i + 1]));
        tile.lower = fmaxf(tile.lower, fmaxf(s[i + 2], s[i + 3]));
    }
    return {fmaxf(max.upper, quad_max(tile.upper) * scale), fmaxf(max.lower, quad_max(tile.lower) * scale)};
}

// Scores become probabilities relative to `max`; returns their sum in this thread.
__device__ __forceinline__ Row exponentials(float (&s)[32], Row max, float scale) {
    Row sum = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
        s[i] = exp2_fast(fmaf(s[i], scale, -max.upper)), s[i + 1] = exp2_fast(fmaf(s[i + 1], scale, -max.upper));
        s[i + 2] = exp2_fast(fmaf(s[i + 2], scale, -max.lower)), s[i + 3] = exp2_fast(fmaf(s[i + 3], scale, -max.lower));
        sum.upper += s[i] + s[i + 1], sum.lower += s[i + 2] + s[i + 3];
    }
    return sum;
}

constexpr u32 Q_FULL = OFFSET_BARRIERS, Q_FREE = Q_FULL + 8;
__device__ __forceinline__ constexpr u32 full_at(u32 stage, u32 part) { return Q_FREE + 8 + (stage * 3 + part) * 8; }
__device__ __forceinline__ constexpr u32 free_at(u32 stage, u32 part) { return full_at(stage + 2, part); }

// Where a thread is.
struct Place {
    u32 base;          // shared memory
    u32 peer;          // that of the block of the cluster which this lane tells what is free
    u32 thread;        // in the warpgroup
    u32 stats;         // of its upper row in max0, factor0, max1, factor1, sums[parity][warpgroup], each [64] floats
    u32 query_rows;    // operands: what begins the shared memory, by rows, and the tiles, by columns
    u32 tile_columns;
    __device__ __forceinline__ u32 row() const { return thread / 32 * 16 + thread % 32 / 4; }
    __device__ __forceinline__ u32 tile(u32 stage) const { return base + OFFSET_K + stage * TILE_BYTES; }
    __device__ __forceinline__ u32 rows(u32 stage) const { return query_rows + ((OFFSET_K + stage * TILE_BYTES) >> 4); }
    __device__ __forceinline__ u32 columns(u32 stage) const { return tile_columns + (stage * TILE_BYTES >> 4); }
    __device__ __forceinline__ Row read(u32 which) const {
        return {load_shared(stats + which * 256), load_shared(stats + which * 256 + 32)};
    }
    __device__ __forceinline__ void write(u32 which, Row x) const {
        if (thread % 4 == 0) store_shared(stats + which * 256, x.upper), store_shared(stats + which * 256 + 32, x.lower);
    }
    __device__ __forceinline__ void await(u32 stage, u32 part, u32 parity) const {
        barrier_wait(base + full_at(stage, part), parity);
    }
    // One arrival per warp, in every block of the cluster: whoever fills the place fills it in all of them.
    __device__ __forceinline__ void release(u32 stage, u32 part) const {
        if (thread % 32 < CLUSTER) barrier_arrive_peer(peer + free_at(stage, part));
    }
};
