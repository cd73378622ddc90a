// Absorbed multi-head latent attention over a paged cache: 64 heads of one row (token) per block, on wgmma.
//
// Two warpgroups share the 512 output columns. Tiles of 64 positions (one page) come in pairs: the first warpgroup
// scores tile 0, the second tile 1, each turns its scores into probabilities, multiplies them with its own half of the
// tile's columns from registers and hands them to the other through shared memory, so that one's softmax hides behind
// the other's products. Both follow one running maximum, passed to and fro. With CLUSTER 2, the two blocks of a cluster
// work on neighbouring groups of heads of the same row and each fetches half of every tile for both.
constexpr u32 LATENT = 512, KEY = 576;
constexpr u32 TILE_BYTES = KEY / 64 * BLOCK_BYTES;
constexpr u32 OFFSET_K = TILE_BYTES, OFFSET_P = 3 * TILE_BYTES, OFFSET_STATS = OFFSET_P + BLOCK_BYTES;
constexpr u32 OFFSET_BARRIERS = OFFSET_STATS + 8 * 64 * 4;
static_assert(OFFSET_BARRIERS + 14 * 8 <= SHARED_BYTES, "shared memory");
constexpr u32 ROPE_AT = 8 * BLOCK_BYTES, RIGHT_AT = 4 * BLOCK_BYTES;
// Parts of a tile that are filled and freed on their own: output columns 0..256, 256..512, rotated columns.
enum Part { LEFT, RIGHT, ROPE };
// Named barriers: maximum of tile 0 is known; probabilities of tile 1, of tile 0 are in shared memory; sums are.
enum Named { MAX0 = 1, PROBABILITIES1, PROBABILITIES0, SUMS, OWN };

struct Params {
    TensorMap query;
    TensorMap cache;
    const Item* items;
    const u32* count;
    const u32* block_table;
    bf16* out;
    float* partial;
    float* log_sums;
    u32 blocks_max;
    u32 heads;
    u32 row0;
    u32 chunks_max;
    float scale_log2;
};

__device__ __forceinline__ void values(float (&o)[128], const u32 (&p)[16], u32 v) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) value_step(o, p + 4 * i, columns_operand(v + i * 2048));
    wgmma_commit();
}

__device__ __forceinline__ void values(float (&o)[128], u32 p, u32 v) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) value_step(o, rows_operand(p + i * 32), columns_operand(v + i * 2048));
    wgmma_commit();
}

template <int FROM, int TO, bool FRESH>
__device__ __forceinline__ void scores(float (&s)[32], u32 q, u32 k) {
#pragma unroll
    for (int block = FROM; block < TO; block++) {
#pragma unroll
        for (int step = 0; step < 4; step++) {
            u32 at = block * BLOCK_BYTES + step * 32;
            score_step(s, rows_operand(q + at), rows_operand(k + at), !(FRESH && block == FROM && step == 0));
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

// What lies in a page beyond the row's length may be NaN, which no probability of zero takes away.
__device__ __forceinline__ void clear_rows(u32 tile, u32 from, u32 thread, u32 named) {
    for (u32 i = thread; i < (PAGE - from) * (KEY / 8); i += 128) {
        u32 at = tile + i % (KEY / 64) * BLOCK_BYTES + (from + i / (KEY / 8)) * 128 + i / (KEY / 64) % 8 * 16;
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
    }
    fence_async();
    asm volatile("bar.sync %0, 128;" ::"r"(named) : "memory");
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

// What the blocks of a warp know of where they are.
struct Place {
    u32 base;      // shared memory
    u32 q_full, q_free;
    u32 full, free;  // [stage][part]
    float* stats;  // max0, factor0, max1, factor1, sums[parity][warpgroup], each [64]
    u32 thread;    // in the warpgroup
    u32 row;       // upper row of this thread; the lower one is 8 below
    __device__ __forceinline__ u32 tile(u32 stage) const { return base + OFFSET_K + stage * TILE_BYTES; }
    __device__ __forceinline__ u32 full_at(u32 stage, u32 part) const { return full + (stage * 3 + part) * 8; }
    __device__ __forceinline__ u32 free_at(u32 stage, u32 part) const { return free + (stage * 3 + part) * 8; }
    __device__ __forceinline__ Row read(u32 which) const { return {stats[which * 64 + row], stats[which * 64 + row + 8]}; }
    __device__ __forceinline__ void write(u32 which, Row x) const {
        if (thread % 4 == 0) stats[which * 64 + row] = x.upper, stats[which * 64 + row + 8] = x.lower;
    }
};

__device__ __forceinline__ void await_tile(const Place& at, u32 stage, u32 parity, u32 positions) {
    for (u32 part = 0; part < 3; part++) barrier_wait(at.full_at(stage, part), parity);
    clear_rows(at.tile(stage), positions, at.thread, OWN + stage);
}

// First warpgroup: scores of tile 0, left half of the output. `parity` of the tiles: bit 0 for stage 0, bit 1 for 1.
__device__ __forceinline__ void first_of_pair(
    const Place& at, float scale, u32 parity, u32 positions, bool paired, bool last, float (&o)[128], Softmax& soft) {
    float s[32];
    u32 tile = at.tile(0), parity0 = parity & 1;
    if (positions < PAGE) await_tile(at, 0, parity0, positions);
    barrier_wait(at.full_at(0, LEFT), parity0);
    wgmma_fence();
    scores<0, 4, true>(s, at.base, tile);
    barrier_wait(at.full_at(0, ROPE), parity0);
    scores<8, 9, false>(s, at.base, tile);
    barrier_wait(at.full_at(0, RIGHT), parity0);
    scores<4, 8, false>(s, at.base, tile);
    wgmma_commit();
    wgmma_wait<0>();
    settle(s);
    barrier_free(at.free_at(0, ROPE));
    if (last && at.thread % 32 == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at.q_free) : "memory");
    if (positions < PAGE) mask(s, positions, at.thread);
    Row max = tile_max(s, soft.max, scale);
    Row factor = {exp2_fast(soft.max.upper - max.upper), exp2_fast(soft.max.lower - max.lower)};
    at.write(0, max);
    at.write(1, factor);
    named_arrive<MAX0>();
    Row sum = exponentials(s, max, scale);
    soft.max = max;
    soft.sum = {fmaf(soft.sum.upper, factor.upper, sum.upper), fmaf(soft.sum.lower, factor.lower, sum.lower)};
    u32 p[16];
    pack(s, p);
    rescale(o, factor.upper, factor.lower);
    settle(o);
    values(o, p, tile);
    u32 other[16];
    if (paired) {
        named_sync<PROBABILITIES1>();
        soft.max = at.read(2);
        factor = at.read(3);
#pragma unroll
        for (int i = 0; i < 32; i += 4) {
            s[i] *= factor.upper, s[i + 1] *= factor.upper;
            s[i + 2] *= factor.lower, s[i + 3] *= factor.lower;
        }
        soft.sum = {soft.sum.upper * factor.upper, soft.sum.lower * factor.lower};
    }
    pack(s, other);
    store_tile(at.base + OFFSET_P, other, at.thread);
    fence_async();
    named_arrive<PROBABILITIES0>();
    wgmma_wait<0>();
    settle(o);
    barrier_free(at.free_at(0, LEFT));
    if (paired) {
        rescale(o, factor.upper, factor.lower);
        settle(o);
        barrier_wait(at.full_at(1, LEFT), parity >> 1);
        values(o, at.tile(1) + ROPE_AT, at.tile(1));
        wgmma_wait<0>();
        settle(o);
        barrier_free(at.free_at(1, LEFT));
        barrier_free(at.free_at(1, ROPE));
    }
}

// Second warpgroup: scores of tile 1, right half of the output.
__device__ __forceinline__ void second_of_pair(
    const Place& at, float scale, u32 parity, u32 positions, bool paired, bool last, float (&o)[128], Softmax& soft) {
    float s[32];
    u32 tile = at.tile(1), parity1 = parity >> 1;
    if (paired) {
        if (positions < PAGE) await_tile(at, 1, parity1, positions);
        barrier_wait(at.full_at(1, RIGHT), parity1);
        wgmma_fence();
        scores<4, 8, true>(s, at.base, tile);
        barrier_wait(at.full_at(1, LEFT), parity1);
        scores<0, 4, false>(s, at.base, tile);
        barrier_wait(at.full_at(1, ROPE), parity1);
        scores<8, 9, false>(s, at.base, tile);
        wgmma_commit();
        wgmma_wait<0>();
        settle(s);
    }
    if (last && at.thread % 32 == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at.q_free) : "memory");
    if (paired) {
        if (positions < PAGE) mask(s, positions, at.thread);
        Row own = tile_max(s, {NEGATIVE, NEGATIVE}, scale);
        named_sync<MAX0>();
        Row before = at.read(0), factor = at.read(1);
        Row max = {fmaxf(before.upper, own.upper), fmaxf(before.lower, own.lower)};
        Row step = {exp2_fast(before.upper - max.upper), exp2_fast(before.lower - max.lower)};
        at.write(2, max);
        at.write(3, step);
        Row sum = exponentials(s, max, scale);
        u32 p[16];
        pack(s, p);
        // The scores have read the rotated columns: their place is free for the probabilities.
        store_tile(tile + ROPE_AT, p, at.thread);
        fence_async();
        named_arrive<PROBABILITIES1>();
        factor = {factor.upper * step.upper, factor.lower * step.lower};
        soft.max = max;
        soft.sum = {fmaf(soft.sum.upper, factor.upper, sum.upper), fmaf(soft.sum.lower, factor.lower, sum.lower)};
        rescale(o, factor.upper, factor.lower);
        settle(o);
        values(o, p, tile + RIGHT_AT);
    } else {
        named_sync<MAX0>();
        Row factor = at.read(1);
        soft.max = at.read(0);
        soft.sum = {soft.sum.upper * factor.upper, soft.sum.lower * factor.lower};
        rescale(o, factor.upper, factor.lower);
        settle(o);
    }
    named_sync<PROBABILITIES0>();
    barrier_wait(at.full_at(0, RIGHT), parity & 1);
    values(o, at.base + OFFSET_P, at.tile(0) + RIGHT_AT);
    if (paired) {
        wgmma_wait<1>();
        barrier_free(at.free_at(1, RIGHT));
    }
    wgmma_wait<0>();
    settle(o);
    barrier_free(at.free_at(0, RIGHT));
}

// Lanes of a quad hold two columns each of four groups of eight: afterwards each holds one group.
__device__ __forceinline__ void transpose_quad(u32 (&v)[4], u32 lane) {
    bool odd = lane & 1, high = lane & 2;
    u32 a = __shfl_xor_sync(0xffffffffu, odd ? v[0] : v[1], 1), b = __shfl_xor_sync(0xffffffffu, odd ? v[2] : v[3], 1);
    (odd ? v[0] : v[1]) = a, (odd ? v[2] : v[3]) = b;
    a = __shfl_xor_sync(0xffffffffu, high ? v[0] : v[2], 2), b = __shfl_xor_sync(0xffffffffu, high ? v[1] : v[3], 2);
    (high ? v[0] : v[2]) = a, (high ? v[1] : v[3]) = b;
}

template <int HALF>
__device__ __forceinline__ void finish(
    const Params& p, const Item& item, u32 head, const Place& at, u32 parity, const float (&o)[128], Softmax soft) {
    soft.sum = {quad_sum(soft.sum.upper), quad_sum(soft.sum.lower)};
    at.write(4 + parity * 2 + HALF, soft.sum);
    named_sync<SUMS>();
    Row left = at.read(4 + parity * 2), right = at.read(5 + parity * 2);
    Row sum = {left.upper + right.upper, left.lower + right.lower};
    Row share = {1.0f / sum.upper, 1.0f / sum.lower};
    u32 lane = at.thread % 32, chunks = item.tail >> 16;
    bool upper = head < p.heads, lower = head + 8 < p.heads;
    if (chunks == 1) {
        bf16* out = p.out + (u64(item.row) * p.heads + head) * LATENT + HALF * 256 + lane % 4 * 8;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            u32 a[4], b[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float* x = o + i * 16 + j * 4;
                a[j] = pack_bf16(x[0] * share.upper, x[1] * share.upper);
                b[j] = pack_bf16(x[2] * share.lower, x[3] * share.lower);
            }
            transpose_quad(a, lane);
            transpose_quad(b, lane);
            if (upper) *reinterpret_cast<uint4*>(out + i * 32) = make_uint4(a[0], a[1], a[2], a[3]);
            if (lower) *reinterpret_cast<uint4*>(out + 8 * LATENT + i * 32) = make_uint4(b[0], b[1], b[2], b[3]);
        }
        return;
    }
    u64 slot = (u64(item.row - p.row0) * p.chunks_max + (item.tail >> 8) % 256) * p.heads + head;
    float* out = p.partial + slot * LATENT + HALF * 256 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 32; i++) {
        const float* x = o + i * 4;
        if (upper) *reinterpret_cast<float2*>(out + i * 8) = make_float2(x[0] * share.upper, x[1] * share.upper);
        if (lower) *reinterpret_cast<float2*>(out + 8 * LATENT + i * 8) = make_float2(x[2] * share.lower, x[3] * share.lower);
    }
    if (HALF == 0 && lane % 4 == 0) {
        if (upper) p.log_sums[slot] = soft.max.upper + __log2f(sum.upper);
        if (lower) p.log_sums[slot + 8] = soft.max.lower + __log2f(sum.lower);
    }
}

// Items are sorted by length; dealing them to and fro evens out what the blocks get.
struct Walk {
    u32 sets, total, clusters, cluster, round;
    __device__ __forceinline__ Walk(const Params& p) {
        sets = (p.heads + 64 * CLUSTER - 1) / (64 * CLUSTER);
        total = *p.count * sets;
        clusters = gridDim.x / CLUSTER, cluster = blockIdx.x / CLUSTER, round = 0;
    }
    // The next item of this cluster and the set of heads, or false.
    __device__ __forceinline__ bool next(const Params& p, Item& item, u32& set) {
        u32 index = round * clusters + (round & 1 ? clusters - 1 - cluster : cluster);
        if (index >= total) return false;
        round++;
        item = p.items[index / sets];
        set = index % sets;
        return true;
    }
};

template <int HALF>
__device__ __forceinline__ void consume(const Params& p, const Place& at, u32 rank) {
    Walk walk(p);
    Item item;
    u32 set, parity = 0, count = 0;
    while (walk.next(p, item, set)) {
        u32 tiles = item.span >> 16, tail = item.tail % 256;
        float o[128];
#pragma unroll
        for (int i = 0; i < 128; i++) o[i] = 0.0f;
        Softmax soft = {{NEGATIVE, NEGATIVE}, {0.0f, 0.0f}};
        barrier_wait(at.q_full, count & 1);
        for (u32 tile = 0; tile < tiles; tile += 2) {
            bool paired = tile + 1 < tiles, last = tile + 2 >= tiles;
            u32 positions = tile + HALF + 1 == tiles ? tail : PAGE;
            if (HALF == 0) {
                first_of_pair(at, p.scale_log2, parity, positions, paired, last, o, soft);
            } else {
                second_of_pair(at, p.scale_log2, parity, positions, paired, last, o, soft);
            }
            parity ^= paired ? 3 : 1;
        }
        u32 head = (set * CLUSTER + rank) * 64 + at.row;
        finish<HALF>(p, item, head, at, count & 1, o, soft);
        count++;
    }
}

// Fills one stage with every other tile. The parts are waited for in the order in which they come free.
__device__ __forceinline__ void produce(const Params& p, const Place& at, u32 stage, u32 rank) {
    Walk walk(p);
    Item item;
    u32 set, parity = 1;
    while (walk.next(p, item, set)) {
        u32 end = (item.span & 0xffff) + (item.span >> 16);
        const u32* table = p.block_table + u64(item.sequence) * p.blocks_max;
        u32 tile = (item.span & 0xffff) + stage, page = tile < end ? table[tile] : 0;
        for (; tile < end; tile += 2, parity ^= 1) {
            u32 row = page * PAGE;
            if (tile + 2 < end) page = table[tile + 2];
            for (u32 turn = 0; turn < 3; turn++) {
                u32 part = stage == 0 ? (turn == 0 ? ROPE : turn == 1 ? LEFT : RIGHT)
                                      : (turn == 0 ? RIGHT : turn == 1 ? LEFT : ROPE);
                u32 first = part == LEFT ? 0 : part == RIGHT ? 4 : 8, blocks = part == ROPE ? 1 : 4;
                u32 full = at.full_at(stage, part);
                barrier_wait(at.free_at(stage, part), parity);
                barrier_expect(full, blocks * BLOCK_BYTES);
                // Each block of the cluster fetches its share for all.
                u32 own = part == ROPE ? (stage % CLUSTER == rank) : 4 / CLUSTER;
                for (u32 i = 0; i < own; i++) {
                    u32 block = first + (part == ROPE ? 0 : rank * own) + i;
                    load_block_all(&p.cache, at.tile(stage) + block * BLOCK_BYTES, full, block * 64, row);
                }
            }
        }
    }
}

__device__ __forceinline__ void produce_query(const Params& p, const Place& at, u32 rank) {
    Walk walk(p);
    Item item;
    u32 set, parity = 1;
    while (walk.next(p, item, set)) {
        u32 head = item.row * p.heads + (set * CLUSTER + rank) * 64;
        barrier_wait(at.q_free, parity);
        parity ^= 1;
        barrier_expect(at.q_full, TILE_BYTES);
        for (u32 block = 0; block < KEY / 64; block++) {
            load_block(&p.query, at.base + block * BLOCK_BYTES, at.q_full, block * 64, head);
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) mla(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) u8 shared[];
    u32 base = shared_address(shared), barriers = base + OFFSET_BARRIERS, rank = blockIdx.x % CLUSTER;
    u32 group = threadIdx.x / 128, thread = threadIdx.x % 128;
    Place at = {base, barriers, barriers + 8, barriers + 16, barriers + 64, reinterpret_cast<float*>(shared + OFFSET_STATS)};
    at.thread = thread, at.row = thread / 32 * 16 + thread % 32 / 4;
    if (threadIdx.x == 0) {
        barrier_init(at.q_full, 1);
        barrier_init(at.q_free, 8);
        for (u32 i = 0; i < 6; i++) barrier_init(at.full + i * 8, 1), barrier_init(at.free + i * 8, 4 * CLUSTER);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();
    wait_for_previous();
    let_next_start();
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (thread == 0 || thread == 32) produce(p, at, thread / 32, rank);
        if (thread == 64) produce_query(p, at, rank);
    } else if (group == 1) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume<0>(p, at, rank);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume<1>(p, at, rank);
    }
    // Nobody leaves while another block may still write here.
    __syncwarp();
    cluster_sync();
}
