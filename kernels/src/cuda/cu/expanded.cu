// Expanded latent attention of prompts: keys and values of every head, 128 neighbouring query rows per block, on wgmma.
//
// One warp copies, two warpgroups of 64 rows each multiply. A warpgroup scores the next tile of 128 positions while it
// multiplies the last one's probabilities with its values, and its softmax hides behind the other's products: they take
// turns. Tiles are the positions 0..128, 128..256 and so on of a sequence, whichever rows are computed together, and
// what a row does not see adds exact zeros: its bits depend on its own query and the positions before it alone.
#include "gemm_ptx.cuh"

// Positions of a tile, and query rows of a block.
constexpr u32 TILE = 128;
// Blocks of 64 columns; what a head lacks of the last one the copy engine fills with zeros.
constexpr u32 NOPE_BLOCKS = (NOPE + 63) / 64, ROPE_BLOCKS = (ROPE + 63) / 64, VALUE_BLOCKS = (VALUE + 63) / 64;
constexpr u32 KEY_BLOCKS = NOPE_BLOCKS + ROPE_BLOCKS;
constexpr u32 QUERY_BLOCK = 64 * 128, TILE_BLOCK = TILE * 128;
constexpr u32 QUERY_BYTES = KEY_BLOCKS * QUERY_BLOCK, KEYS_BYTES = KEY_BLOCKS * TILE_BLOCK;
constexpr u32 VALUES_BYTES = VALUE_BLOCKS * TILE_BLOCK;
constexpr u32 STAGES = 2;
constexpr u32 OFFSET_K = 2 * QUERY_BYTES, OFFSET_V = OFFSET_K + STAGES * KEYS_BYTES;
constexpr u32 OFFSET_BARRIERS = OFFSET_V + STAGES * VALUES_BYTES;
static_assert(OFFSET_BARRIERS + (2 + 4 * STAGES) * 8 == SHARED_BYTES, "shared memory");
static_assert(KEY_BLOCKS <= 3 && VALUE_BLOCKS <= 2, "sizes of a head");
static_assert(NOPE % 8 == 0 && ROPE % 8 == 0 && VALUE % 8 == 0, "the copy engine moves 16 bytes");

constexpr u32 Q_FULL = OFFSET_BARRIERS, Q_FREE = Q_FULL + 8;
__device__ __forceinline__ constexpr u32 k_full(u32 stage) { return Q_FREE + 8 + stage * 32; }
__device__ __forceinline__ constexpr u32 k_free(u32 stage) { return k_full(stage) + 8; }
__device__ __forceinline__ constexpr u32 v_full(u32 stage) { return k_full(stage) + 16; }
__device__ __forceinline__ constexpr u32 v_free(u32 stage) { return k_full(stage) + 24; }

// Up to 128 neighbouring query rows of one sequence.
struct alignas(16) Rows {
    u32 row0;       // of the step
    u32 rows;
    u32 position0;  // of row0
    u32 key0;       // where the sequence's position 0 is in `keys`, `values` and `rotated_keys`
};

struct Params {
    TensorMap query;         // [rows][heads][NOPE]
    TensorMap rotated;       // [rows][heads][ROPE]
    TensorMap keys;          // [positions][heads of this launch][NOPE]
    TensorMap rotated_keys;  // [positions][1][ROPE]
    TensorMap values;        // [positions][heads of this launch][VALUE]
    const Rows* rows;
    const u32* first;  // [blocks + 1]: the units of each block
    const u32* units;  // entry of `rows` | head of this launch << 16
    bf16* out;         // [rows][heads][VALUE]
    u32 heads;
    u32 head0;
    float scale_log2;
};

constexpr u64 EVICT_NORMAL = 0x1000000000000000;

// Named barriers: it is the first, the second warpgroup's turn to start products.
template <int ID>
__device__ __forceinline__ void turn_arrive() {
    asm volatile("bar.arrive %0, 256;" ::"n"(ID) : "memory");
}

template <int ID>
__device__ __forceinline__ void turn_sync() {
    asm volatile("bar.sync %0, 256;" ::"n"(ID) : "memory");
}

template <int COUNT>
__device__ __forceinline__ void settle(u32 (&x)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+r"(x[i])::"memory");
}

// The operand whose rows are 64 columns of N: blocks of 64 columns follow each other.
__device__ __forceinline__ u64 columns_operand(u32 address) {
    return u64((address & 0x3ffff) >> 4) | u64(TILE_BLOCK >> 4) << 16 | u64(64) << 32 | u64(1) << 62;
}

// s = q . k: 64 rows x 128 positions.
__device__ __forceinline__ void scores(float (&s)[64], u64 q, u64 k) {
#pragma unroll
    for (u32 block = 0; block < KEY_BLOCKS; block++) {
#pragma unroll
        for (u32 step = 0; step < 4; step++) {
            u64 a = q + ((block * QUERY_BLOCK + step * 32) >> 4), b = k + ((block * TILE_BLOCK + step * 32) >> 4);
            product<false>(s, a, b, block + step > 0);
        }
    }
}

// o += p . v for 16 positions, p from registers.
template <int COUNT>
__device__ __forceinline__ void value_step(float (&d)[COUNT], const u32* p, u64 v) {
    if constexpr (COUNT == 64) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_16
                     "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                     : FOURS_16(d)
                     : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));
    } else {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_8
                     "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                     : FOURS_8(d)
                     : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));
    }
}

template <int COUNT>
__device__ __forceinline__ void values(float (&o)[COUNT], const u32 (&p)[32], u64 v) {
#pragma unroll
    for (u32 i = 0; i < TILE / 16; i++) value_step(o, p + 4 * i, v + (i * 2048 >> 4));
}

struct Row {
    float upper, lower;
};

// What a thread keeps of its two rows: a running maximum in powers of two, and its part of the sum.
struct Softmax {
    Row max, sum;
};

// Forgets positions of this tile behind the last one that each row sees.
__device__ __forceinline__ void mask(float (&s)[64], int upper, int lower) {
    int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 64; i++) {
        if (column + i / 4 * 8 + i % 2 > (i % 4 < 2 ? upper : lower)) s[i] = NEGATIVE;
    }
}

// Scores become probabilities relative to the maximum so far; returns by what all before has to be multiplied.
__device__ __forceinline__ Row soften(float (&s)[64], Softmax& soft, float scale) {
    Row max = {s[0], s[2]}, sum = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
        max.upper = fmaxf(max.upper, fmaxf(s[i], s[i + 1]));
        max.lower = fmaxf(max.lower, fmaxf(s[i + 2], s[i + 3]));
    }
    max = {fmaxf(soft.max.upper, quad_max(max.upper) * scale), fmaxf(soft.max.lower, quad_max(max.lower) * scale)};
    Row factor = {exp2_fast(soft.max.upper - max.upper), exp2_fast(soft.max.lower - max.lower)};
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
        s[i] = exp2_fast(fmaf(s[i], scale, -max.upper)), s[i + 1] = exp2_fast(fmaf(s[i + 1], scale, -max.upper));
        s[i + 2] = exp2_fast(fmaf(s[i + 2], scale, -max.lower)), s[i + 3] = exp2_fast(fmaf(s[i + 3], scale, -max.lower));
        sum.upper += s[i] + s[i + 1], sum.lower += s[i + 2] + s[i + 3];
    }
    soft.max = max;
    soft.sum = {fmaf(soft.sum.upper, factor.upper, sum.upper), fmaf(soft.sum.lower, factor.lower, sum.lower)};
    return factor;
}

__device__ __forceinline__ void pack(const float (&s)[64], u32 (&p)[32]) {
#pragma unroll
    for (int i = 0; i < 32; i++) p[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
}

template <int COUNT>
__device__ __forceinline__ void rescale(float (&o)[COUNT], Row factor) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
        o[i] *= factor.upper, o[i + 1] *= factor.upper;
        o[i + 2] *= factor.lower, o[i + 3] *= factor.lower;
    }
}

// Four lanes hold four words of each of four blocks; afterwards each holds a block of its own.
__device__ __forceinline__ void transpose(u32 (&x)[4], u32 lane) {
    bool odd = lane & 1, high = lane & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        u32 other = __shfl_xor_sync(0xffffffffu, odd ? x[i] : x[i + 1], 1);
        (odd ? x[i] : x[i + 1]) = other;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 other = __shfl_xor_sync(0xffffffffu, high ? x[i] : x[i + 2], 2);
        (high ? x[i] : x[i + 2]) = other;
    }
}

// Writes the thread's upper (HALF 0) or lower row.
template <int HALF, int COUNT>
__device__ __forceinline__ void write(bf16* to, const float (&o)[COUNT], float sum, bool some) {
    float share = 1.0f / quad_sum(sum);
    u32 lane = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < COUNT; i += 16) {
        u32 x[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            x[j] = pack_bf16(o[i + 4 * j + 2 * HALF] * share, o[i + 4 * j + 2 * HALF + 1] * share);
        }
        transpose(x, lane);
        u32 column = (i / 4 + lane) * 8;
        if (some && column < VALUE) store_global(to + column, x);
    }
}

__device__ __forceinline__ void release(u32 barrier) {
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

template <int GROUP>
__device__ __forceinline__ void consume(const Params& p, u32 base) {
    u32 row = GROUP * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    u64 query = operand(base + GROUP * QUERY_BYTES);
    u64 keys = operand(base + OFFSET_K), value = columns_operand(base + OFFSET_V);
    Ring k, v;
    u32 end = p.first[blockIdx.x + 1], parity = 0;
    // The first warpgroup begins.
    if (GROUP == 1) turn_arrive<1>();
    for (u32 index = p.first[blockIdx.x]; index < end; index++, parity ^= 1) {
        u32 unit = p.units[index];
        Rows rows = p.rows[unit & 0xffff];
        u32 tiles = (rows.position0 + rows.rows - 1) / TILE + 1;
        // Tiles from this one on hold positions that some row of the warpgroup does not see.
        u32 first_masked = (rows.position0 + GROUP * 64 + 1) / TILE;
        float o[VALUE_BLOCKS * 32], s[64];
        u32 probabilities[32];
#pragma unroll
        for (u32 i = 0; i < VALUE_BLOCKS * 32; i++) o[i] = 0.0f;
        Softmax soft = {{NEGATIVE, NEGATIVE}, {0.0f, 0.0f}};
        auto hide = [&](u32 tile) {
            int last = int(rows.position0 + row) - int(tile * TILE);
            if (tile >= first_masked) mask(s, last, last + 8);
        };
        // What follows the softmax of a tile needs the next keys, or the values of this tile if it is the last. Waiting for
        // them behind the softmax also keeps the compiler from moving the wait for products before it.
        auto await_next = [&](u32 tile) {
            Ring values = v;
            if (tile > 0) values.advance(STAGES);
            bool more = tile + 1 < tiles;
            barrier_wait(base + (more ? k_full(k.stage) : v_full(values.stage)), more ? k.phase : values.phase);
        };
        barrier_wait(base + Q_FULL, parity);
        barrier_wait(base + k_full(k.stage), k.phase);
        product_fence();
        scores(s, query, keys + (k.stage * KEYS_BYTES >> 4));
        product_commit();
        product_wait<0>();
        product_fence(s);
        release(base + k_free(k.stage));
        k.advance(STAGES);
        if (tiles == 1) release(base + Q_FREE);
        hide(0);
        soften(s, soft, p.scale_log2);
        pack(s, probabilities);
        await_next(0);
        for (u32 tile = 1; tile < tiles; tile++) {
            turn_sync<1 + GROUP>();
            product_fence();
            scores(s, query, keys + (k.stage * KEYS_BYTES >> 4));
            product_commit();
            barrier_wait(base + v_full(v.stage), v.phase);
            product_fence();
            values(o, probabilities, value + (v.stage * VALUES_BYTES >> 4));
            product_commit();
            turn_arrive<2 - GROUP>();
            product_wait<1>();
            product_fence(s);
            release(base + k_free(k.stage));
            k.advance(STAGES);
            if (tile + 1 == tiles) release(base + Q_FREE);
            hide(tile);
            Row factor = soften(s, soft, p.scale_log2);
            await_next(tile);
            product_wait<0>();
            product_fence(o);
            settle(probabilities);
            release(base + v_free(v.stage));
            v.advance(STAGES);
            rescale(o, factor);
            pack(s, probabilities);
        }
        product_fence();
        values(o, probabilities, value + (v.stage * VALUES_BYTES >> 4));
        product_commit();
        product_wait<0>();
        product_fence(o);
        release(base + v_free(v.stage));
        v.advance(STAGES);
        bf16* to = p.out + (u64(rows.row0 + row) * p.heads + p.head0 + (unit >> 16)) * VALUE;
        write<0>(to, o, soft.sum.upper, row < rows.rows);
        write<1>(to + u64(8) * p.heads * VALUE, o, soft.sum.lower, row + 8 < rows.rows);
    }
    // Takes the last turn that was given, so that none is left.
    if (GROUP == 0) turn_sync<1>();
}

__device__ __forceinline__ void copy_query(const Params& p, u32 base, u32 row0, u32 head) {
    barrier_expect(base + Q_FULL, 2 * QUERY_BYTES);
#pragma unroll
    for (u32 i = 0; i < 2 * KEY_BLOCKS; i++) {
        u32 block = i % KEY_BLOCKS, row = row0 + i / KEY_BLOCKS * 64, to = base + i * QUERY_BLOCK;
        if (block < NOPE_BLOCKS) {
            copy_box(to, p.query, base + Q_FULL, block * 64, head, row, EVICT_NORMAL);
        } else {
            copy_box(to, p.rotated, base + Q_FULL, (block - NOPE_BLOCKS) * 64, head, row, EVICT_NORMAL);
        }
    }
}

__device__ __forceinline__ void produce(const Params& p, u32 base) {
    Ring k, v;
    u32 end = p.first[blockIdx.x + 1], parity = 1;
    for (u32 index = p.first[blockIdx.x]; index < end; index++, parity ^= 1) {
        u32 unit = p.units[index], head = unit >> 16;
        Rows rows = p.rows[unit & 0xffff];
        u32 tiles = (rows.position0 + rows.rows - 1) / TILE + 1;
        for (u32 tile = 0; tile < tiles; tile++) {
            u32 position = rows.key0 + tile * TILE;
            u32 full = base + k_full(k.stage), to = base + OFFSET_K + k.stage * KEYS_BYTES;
            barrier_wait(base + k_free(k.stage), k.phase ^ 1);
            barrier_expect(full, KEYS_BYTES);
#pragma unroll
            for (u32 block = 0; block < NOPE_BLOCKS; block++) {
                copy_box(to + block * TILE_BLOCK, p.keys, full, block * 64, head, position, EVICT_NORMAL);
            }
#pragma unroll
            for (u32 block = 0; block < ROPE_BLOCKS; block++) {
                copy_box(to + (NOPE_BLOCKS + block) * TILE_BLOCK, p.rotated_keys, full, block * 64, 0, position,
                         EVICT_NORMAL);
            }
            k.advance(STAGES);
            if (tile == 0) {
                barrier_wait(base + Q_FREE, parity);
                copy_query(p, base, rows.row0, p.head0 + head);
            }
            full = base + v_full(v.stage), to = base + OFFSET_V + v.stage * VALUES_BYTES;
            barrier_wait(base + v_free(v.stage), v.phase ^ 1);
            barrier_expect(full, VALUES_BYTES);
#pragma unroll
            for (u32 block = 0; block < VALUE_BLOCKS; block++) {
                copy_box(to + block * TILE_BLOCK, p.values, full, block * 64, head, position, EVICT_NORMAL);
            }
            v.advance(STAGES);
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) expanded(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) u8 shared[];
    u32 base = shared_address(shared), group = threadIdx.x / 128;
    if (threadIdx.x == 0) {
        barrier_init(base + Q_FULL, 1);
        barrier_init(base + Q_FREE, 8);
        for (u32 stage = 0; stage < STAGES; stage++) {
            barrier_init(base + k_full(stage), 1);
            barrier_init(base + v_full(stage), 1);
            barrier_init(base + k_free(stage), 8);
            barrier_init(base + v_free(stage), 8);
        }
        barrier_init_fence();
    }
    __syncthreads();
    wait_for_previous();
    let_next_start();
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) produce(p, base);
    } else if (group == 1) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume<0>(p, base);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume<1>(p, base);
    }
}

struct GatherParams {
    const bf16* cache;  // [pages][PAGE][width]
    const u32* pages;   // [pages of the list]: page of the cache, and how many of its positions count
    bf16* out;          // [pages of the list][PAGE][width]
    u32 width;
};

// Copies pages of the cache behind each other; positions that do not count become zeros.
extern "C" __global__ void __launch_bounds__(256) expanded_gather(const __grid_constant__ GatherParams p) {
    wait_for_previous();
    let_next_start();
    u32 page = p.pages[2 * blockIdx.x], positions = p.pages[2 * blockIdx.x + 1], units = p.width / 8;
    const uint4* from = reinterpret_cast<const uint4*>(p.cache + u64(page) * PAGE * p.width);
    uint4* to = reinterpret_cast<uint4*>(p.out + u64(blockIdx.x) * PAGE * p.width);
    u32 i = blockIdx.y * 256 + threadIdx.x;
    if (i < PAGE * units) to[i] = i < positions * units ? from[i] : make_uint4(0, 0, 0, 0);
}
