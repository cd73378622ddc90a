// Rotary embedding, with the norms and the cache writes around it.
//
// INTERLEAVED: elements 2i and 2i + 1 turn together; otherwise i and i + half. Tables: f32 [position][half].
#include "rows.cuh"

constexpr u32 BLOCK_SIZE = 64;

struct Angles {
    const float* cos;
    const float* sin;
    // Pairs that turn.
    u32 half;
    // Positions of the tables; a position beyond is the last one's.
    u32 positions;
};

// Where the keys and values of rows go.
struct Pages {
    const u32* block_table;
    const u32* seq_of_row;
    u32 blocks_max;
    // Elements of a position.
    u32 width;
};

__device__ __forceinline__ u64 angles_at(const Angles& a, u32 position) {
    return u64(min(position, a.positions - 1)) * a.half;
}

// Elements before the position of a row in its cache.
__device__ __forceinline__ u64 cache_at(const Pages& p, u32 row, u32 position) {
    u32 block = p.block_table[u64(p.seq_of_row[row]) * p.blocks_max + position / BLOCK_SIZE];
    return (u64(block) * BLOCK_SIZE + position % BLOCK_SIZE) * p.width;
}

// The elements of pair `i` of a vector of which `half` pairs turn; those behind are pairs of neighbours.
template <bool INTERLEAVED>
__device__ __forceinline__ u32 first_of(u32 i, u32 half) {
    return INTERLEAVED || i >= half ? 2 * i : i;
}

template <bool INTERLEAVED>
__device__ __forceinline__ u32 second_of(u32 i, u32 half) {
    return INTERLEAVED || i >= half ? 2 * i + 1 : i + half;
}

__device__ __forceinline__ void turn(float& a, float& b, float cos, float sin) {
    float x = a * cos - b * sin;
    b = b * cos + a * sin;
    a = x;
}

struct MlaParams {
    Angles angles;
    Pages pages;
    const u32* positions;
    // bf16 [rows][heads][nope + rope].
    const bf16* query;
    // bf16 [rows][heads][latent + rope]: its last part is written.
    bf16* absorbed;
    // bf16, latent and key, `new_stride` elements from row to row.
    const bf16* fresh;
    const float* gamma;
    // bf16 [blocks][64][latent + rope].
    bf16* cache;
    u64 fresh_stride;
    u32 rows;
    u32 heads;
    u32 nope;
    u32 latent;
    // Blocks per row for the query part, 0: none; the blocks behind append, a warp per row.
    u32 query_blocks;
    float eps;
};

// One piece: four neighbouring pairs, or eight pairs a half apart.
template <bool INTERLEAVED, bool WIDE>
__device__ __forceinline__ void mla_query(const MlaParams& p, u32 row, u32 item) {
    u32 half = p.angles.half, rope = 2 * half, position = p.positions[row];
    u32 pairs = !WIDE ? 1 : INTERLEAVED ? 4 : 8;
    if (position == IDLE || item >= p.heads * (half / pairs)) return;
    u32 head = item / (half / pairs), pair = item % (half / pairs) * pairs;
    u64 at = u64(row) * p.heads + head;
    const bf16* from = p.query + at * (p.nope + rope) + p.nope;
    bf16* to = p.absorbed + at * (p.latent + rope) + p.latent;
    const float* cos = p.angles.cos + angles_at(p.angles, position) + pair;
    const float* sin = p.angles.sin + angles_at(p.angles, position) + pair;
    if (!WIDE) {
        u32 first = first_of<INTERLEAVED>(pair, half), second = second_of<INTERLEAVED>(pair, half);
        float a = to_float(from[first]), b = to_float(from[second]);
        turn(a, b, *cos, *sin);
        to[first] = to_bf16(a);
        to[second] = to_bf16(b);
    } else if (INTERLEAVED) {
        Eight x = load_eight<true>(from, 2 * pair, rope);
        float4 c = *reinterpret_cast<const float4*>(cos), s = *reinterpret_cast<const float4*>(sin);
        turn(x.at[0], x.at[1], c.x, s.x);
        turn(x.at[2], x.at[3], c.y, s.y);
        turn(x.at[4], x.at[5], c.z, s.z);
        turn(x.at[6], x.at[7], c.w, s.w);
        store_eight<true>(to, 2 * pair, rope, x);
    } else {
        Eight a = load_eight<true>(from, pair, rope), b = load_eight<true>(from, pair + half, rope);
        Eight c = load_eight<true>(cos, 0, 8), s = load_eight<true>(sin, 0, 8);
#pragma unroll
        for (int i = 0; i < 8; i++) turn(a.at[i], b.at[i], c.at[i], s.at[i]);
        store_eight<true>(to, pair, rope, a);
        store_eight<true>(to, pair + half, rope, b);
    }
}

// Norm of the latent, rotation of the key, both into the cache: one warp.
template <bool INTERLEAVED, bool WIDE>
__device__ __forceinline__ void mla_append(const MlaParams& p, u32 row) {
    u32 lane = threadIdx.x & 31, half = p.angles.half;
    if (row >= p.rows || p.positions[row] == IDLE) return;
    u32 position = p.positions[row];
    const bf16* from = p.fresh + row * p.fresh_stride;
    bf16* to = p.cache + cache_at(p.pages, row, position);
    float squares = 0.0f;
    for (u32 column = 8 * lane; column < p.latent; column += 256) {
        Eight x = load_eight<WIDE>(from, column, p.latent);
#pragma unroll
        for (int i = 0; i < 8; i++) squares = fmaf(x.at[i], x.at[i], squares);
    }
    float scale = 1.0f / sqrtf(warp_sum(squares) / float(p.latent) + p.eps);
    for (u32 column = 8 * lane; column < p.latent; column += 256) {
        Eight x = load_eight<WIDE>(from, column, p.latent), gamma = load_eight<WIDE>(p.gamma, column, p.latent);
#pragma unroll
        for (int i = 0; i < 8; i++) x.at[i] = x.at[i] * scale * gamma.at[i];
        store_eight<WIDE>(to, column, p.latent, x);
    }
    u64 angles = angles_at(p.angles, position);
    for (u32 pair = lane; pair < half; pair += 32) {
        u32 first = first_of<INTERLEAVED>(pair, half), second = second_of<INTERLEAVED>(pair, half);
        float a = to_float(from[p.latent + first]), b = to_float(from[p.latent + second]);
        turn(a, b, p.angles.cos[angles + pair], p.angles.sin[angles + pair]);
        to[p.latent + first] = to_bf16(a);
        to[p.latent + second] = to_bf16(b);
    }
}

template <bool INTERLEAVED, bool WIDE>
__device__ __forceinline__ void mla(const MlaParams& p) {
    wait_for_previous();
    let_next_start();
    u32 queries = p.rows * p.query_blocks;
    if (blockIdx.x < queries) {
        u32 row = blockIdx.x / p.query_blocks, block = blockIdx.x % p.query_blocks;
        mla_query<INTERLEAVED, WIDE>(p, row, block * blockDim.x + threadIdx.x);
    } else {
        mla_append<INTERLEAVED, WIDE>(p, (blockIdx.x - queries) * (blockDim.x / 32) + threadIdx.x / 32);
    }
}

#define MLA(NAME, INTERLEAVED, WIDE)                                                                    \
    extern "C" __global__ void __launch_bounds__(256) NAME(const __grid_constant__ MlaParams p) { \
        mla<INTERLEAVED, WIDE>(p);                                                                      \
    }
MLA(mla_interleaved_wide, true, true)
MLA(mla_interleaved_narrow, true, false)
MLA(mla_halves_wide, false, true)
MLA(mla_halves_narrow, false, false)

struct GqaParams {
    Angles angles;
    Pages pages;
    const u32* positions;
    // bf16 rows of heads, each `*_stride` elements from row to row.
    const bf16* query;
    const bf16* key;
    const bf16* value;
    const float* query_gamma;
    const float* key_gamma;
    bf16* query_out;
    // bf16 [blocks][64][kv_heads * head_dim].
    bf16* keys;
    bf16* values;
    u64 query_stride;
    u64 key_stride;
    u64 value_stride;
    u64 query_out_stride;
    u32 rows;
    u32 heads;
    u32 kv_heads;
    u32 head_dim;
    float eps;
};

// One head: norm and rotation. A lane holds pairs lane, lane + 32, ...: `from` may be `to`.
template <bool INTERLEAVED, int PAIRS>
__device__ __forceinline__ void gqa_head(const GqaParams& p, const bf16* from, const float* gamma, u32 position, bf16* to) {
    u32 lane = threadIdx.x & 31, half = p.angles.half;
    float a[PAIRS], b[PAIRS], squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        u32 pair = lane + 32 * i;
        bool some = 2 * pair < p.head_dim;
        a[i] = some ? to_float(from[first_of<INTERLEAVED>(pair, half)]) : 0.0f;
        b[i] = some ? to_float(from[second_of<INTERLEAVED>(pair, half)]) : 0.0f;
        squares = fmaf(a[i], a[i], squares);
        squares = fmaf(b[i], b[i], squares);
    }
    float scale = 1.0f / sqrtf(warp_sum(squares) / float(p.head_dim) + p.eps);
    u64 angles = angles_at(p.angles, position);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        u32 pair = lane + 32 * i;
        if (2 * pair >= p.head_dim) break;
        u32 first = first_of<INTERLEAVED>(pair, half), second = second_of<INTERLEAVED>(pair, half);
        a[i] = a[i] * scale * gamma[first];
        b[i] = b[i] * scale * gamma[second];
        if (pair < half) turn(a[i], b[i], p.angles.cos[angles + pair], p.angles.sin[angles + pair]);
        to[first] = to_bf16(a[i]);
        to[second] = to_bf16(b[i]);
    }
}

// One warp per head of query, key and value.
template <bool INTERLEAVED, int PAIRS>
__device__ __forceinline__ void gqa(const GqaParams& p) {
    wait_for_previous();
    let_next_start();
    u32 heads = p.heads + 2 * p.kv_heads, item = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    u32 row = item / heads, head = item % heads;
    if (row >= p.rows || p.positions[row] == IDLE) return;
    u32 position = p.positions[row];
    if (head < p.heads) {
        u32 at = head * p.head_dim;
        const bf16* from = p.query + row * p.query_stride + at;
        gqa_head<INTERLEAVED, PAIRS>(p, from, p.query_gamma, position, p.query_out + row * p.query_out_stride + at);
        return;
    }
    u64 cache = cache_at(p.pages, row, position);
    if (head < p.heads + p.kv_heads) {
        u32 at = (head - p.heads) * p.head_dim;
        const bf16* from = p.key + row * p.key_stride + at;
        gqa_head<INTERLEAVED, PAIRS>(p, from, p.key_gamma, position, p.keys + cache + at);
    } else {
        u32 at = (head - p.heads - p.kv_heads) * p.head_dim;
        const bf16* from = p.value + row * p.value_stride + at;
        for (u32 i = threadIdx.x & 31; i < p.head_dim; i += 32) p.values[cache + at + i] = from[i];
    }
}

#define GQA(NAME, INTERLEAVED, PAIRS)                                                                   \
    extern "C" __global__ void __launch_bounds__(256) NAME(const __grid_constant__ GqaParams p) { \
        gqa<INTERLEAVED, PAIRS>(p);                                                                     \
    }
GQA(gqa_interleaved_2, true, 2)
GQA(gqa_interleaved_8, true, 8)
GQA(gqa_halves_2, false, 2)
GQA(gqa_halves_8, false, 8)
