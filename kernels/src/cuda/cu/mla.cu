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

// A pair of tiles as a consumer sees it.
struct Pair {
    u32 parity;     // of the stages' barriers: bit 0 for stage 0, bit 1 for stage 1
    u32 positions;  // in this warpgroup's tile
    bool paired;    // there is a tile 1
    bool last;
};

__device__ __forceinline__ void free_query(const Place& at) {
    if (at.thread % 32 == 0) barrier_arrive(at.base + Q_FREE);
}

// First warpgroup: scores of tile 0, in two steps, so that the first waits only for what is there first.
__device__ __forceinline__ void begin_scores(const Place& at, const Pair& pair, float (&s)[32]) {
    at.await(0, LEFT, pair.parity & 1);
    wgmma_fence();
    scores<0, 4, true>(s, at.query_rows, at.rows(0));
    wgmma_commit();
}

__device__ __forceinline__ void end_scores(const Place& at, const Pair& pair, float (&s)[32]) {
    at.await(0, ROPE, pair.parity & 1);
    wgmma_fence();
    scores<8, 9, false>(s, at.query_rows, at.rows(0));
    at.await(0, RIGHT, pair.parity & 1);
    scores<4, 8, false>(s, at.query_rows, at.rows(0));
    wgmma_commit();
    wgmma_wait<0>();
    settle(s);
    at.release(0, ROPE);
    if (pair.last) free_query(at);
    if (pair.positions < PAGE) {
        mask(s, pair.positions, at.thread);
        clear_rows(at.tile(0), pair.positions, at.thread);
        asm volatile("bar.sync %0, 128;" ::"n"(int(OWN)) : "memory");
    }
}

// The rest of a pair: left half of the output. Ends with the scores of the next tile 0, unless this is the last pair.
template <bool LAST>
__device__ __forceinline__ void first_of_pair(
    const Place& at, float scale, const Pair& pair, const Pair& next, float (&s)[32], float (&o)[128], Softmax& soft) {
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
    values(o, p, at.columns(0));
    if (!LAST || pair.paired) {
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
    u32 other[16];
    pack(s, other);
    store_tile(at.base + OFFSET_P, other, at.thread);
    fence_async();
    named_arrive<PROBABILITIES0>();
    wgmma_wait<0>();
    settle(o);
    at.release(0, LEFT);
    if (LAST && !pair.paired) return;
    rescale(o, factor.upper, factor.lower);
    settle(o);
    at.await(1, LEFT, pair.parity >> 1);
    // Tile 0 comes free first, since its next scores come first.
    named_sync<VALUES0>();
    values(o, at.rows(1) + (ROPE_AT >> 4), at.columns(1));
    if (LAST) {
        wgmma_wait<0>();
    } else {
        begin_scores(at, next, s);
        wgmma_wait<1>();
    }
    settle(o);
    at.release(1, LEFT);
    at.release(1, ROPE);
    if (!LAST) end_scores(at, next, s);
}

// Second warpgroup: scores of tile 1, right half of the output.
__device__ __forceinline__ void second_of_pair(
    const Place& at, float scale, const Pair& pair, float (&o)[128], Softmax& soft) {
    float s[32];
    u32 tile = at.tile(1), parity1 = pair.parity >> 1;
    if (pair.paired) {
        at.await(1, RIGHT, parity1);
        wgmma_fence();
        scores<4, 8, true>(s, at.query_rows, at.rows(1));
        at.await(1, LEFT, parity1);
        scores<0, 4, false>(s, at.query_rows, at.rows(1));
        at.await(1, ROPE, parity1);
        scores<8, 9, false>(s, at.query_rows, at.rows(1));
        wgmma_commit();
        wgmma_wait<0>();
        settle(s);
    }
    if (pair.last) free_query(at);
    if (pair.paired) {
        if (pair.positions < PAGE) {
            mask(s, pair.positions, at.thread);
            clear_rows(tile, pair.positions, at.thread);
            asm volatile("bar.sync %0, 128;" ::"n"(OWN + 1) : "memory");
        }
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
        values(o, p, at.columns(1) + (RIGHT_AT >> 4));
    } else {
        named_sync<MAX0>();
        Row factor = at.read(1);
        soft.max = at.read(0);
        soft.sum = {soft.sum.upper * factor.upper, soft.sum.lower * factor.lower};
        rescale(o, factor.upper, factor.lower);
        settle(o);
    }
    named_sync<PROBABILITIES0>();
    at.await(0, RIGHT, pair.parity & 1);
    values(o, at.query_rows + (OFFSET_P >> 4), at.columns(0) + (RIGHT_AT >> 4));
    if (pair.paired) {
        named_arrive<VALUES0>();
        wgmma_wait<1>();
        at.release(1, RIGHT);
    }
    wgmma_wait<0>();
    settle(o);
    at.release(0, RIGHT);
}

// Lanes of a quad hold two columns each of four groups of eight: afterwards each holds one group.
__device__ __forceinline__ void transpose_quad(u32 (&v)[4], u32 lane) {
    bool odd = lane & 1, high = lane & 2;
    u32 a = __shfl_xor_sync(0xffffffffu, odd ? v[0] : v[1], 1), b = __shfl_xor_sync(0xffffffffu, odd ? v[2] : v[3], 1);
    (odd ? v[0] : v[1]) = a, (odd ? v[2] : v[3]) = b;
    a = __shfl_xor_sync(0xffffffffu, high ? v[0] : v[2], 2), b = __shfl_xor_sync(0xffffffffu, high ? v[1] : v[3], 2);
    (high ? v[0] : v[2]) = a, (high ? v[1] : v[3]) = b;
}

// Adds what another block has found for the same heads, relative to a maximum and sum of its own.
__device__ __forceinline__ void add(const float4* from, float (&o)[128], Softmax& soft) {
    constexpr int BATCH = 8;
    float4 stats = __ldcg(from + 32 * 128);
    Row max = {fmaxf(soft.max.upper, stats.x), fmaxf(soft.max.lower, stats.y)};
    Row own = {exp2_fast(soft.max.upper - max.upper), exp2_fast(soft.max.lower - max.lower)};
    Row other = {exp2_fast(stats.x - max.upper), exp2_fast(stats.y - max.lower)};
    // Rounded after the product and after the sum: the same whichever side does it.
    auto sum = [](float x, float y, float other) { return __fadd_rn(x, __fmul_rn(y, other)); };
    rescale(o, own.upper, own.lower);
    settle(o);
    soft.max = max;
    soft.sum = {sum(__fmul_rn(soft.sum.upper, own.upper), stats.z, other.upper),
                sum(__fmul_rn(soft.sum.lower, own.lower), stats.w, other.lower)};
#pragma unroll
    for (int i = 0; i < 32; i += BATCH) {
        float4 x[BATCH];
        // Not all loads at once: there are not so many registers.
        __syncwarp();
#pragma unroll
        for (int j = 0; j < BATCH; j++) x[j] = __ldcg(from + (i + j) * 128);
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            float* to = o + (i + j) * 4;
            to[0] = sum(to[0], x[j].x, other.upper), to[1] = sum(to[1], x[j].y, other.upper);
            to[2] = sum(to[2], x[j].z, other.lower), to[3] = sum(to[3], x[j].w, other.lower);
        }
    }
}

__device__ __forceinline__ void leave(float4* to, const float (&o)[128], const Softmax& soft) {
#pragma unroll
    for (int i = 0; i < 32; i++) to[i * 128] = make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]);
    to[32 * 128] = make_float4(soft.max.upper, soft.max.lower, soft.sum.upper, soft.sum.lower);
    __threadfence();
}

// What a thread of this warpgroup found, told to all of them.
template <int HALF>
__device__ __forceinline__ u32 tell(const Place& at, u32 value) {
    u32 word = at.base + OFFSET_BARRIERS + 14 * 8 + HALF * 4;
    if (at.thread == 0) store_shared(word, __uint_as_float(value));
    asm volatile("bar.sync %0, 128;" ::"n"(OWN + HALF) : "memory");
    value = __float_as_uint(load_shared(word));
    asm volatile("bar.sync %0, 128;" ::"n"(OWN + HALF) : "memory");
    return value;
}

// Adds the chunks of a row up along a binary tree. Whoever comes second to a node adds the first's output to its own
// and goes on; returns whether this one holds the sum of all. Sums are the same whoever comes first.
template <int HALF>
__device__ __forceinline__ bool climb(const Params& p, const Item& item, u32 block, const Place& at, float (&o)[128], Softmax& soft) {
    u32 chunk = (item.tail >> 8) % 256, chunks = item.tail >> 16, blocks = (p.heads + 63) / 64;
    u64 row = u64(item.row - p.row0) * p.chunks_max;
    for (u32 level = 0; (1u << level) < chunks; level++) {
        // Subtrees go by their first chunk, nodes by that of their right side.
        u32 own = chunk >> level << level, sibling = own ^ (1u << level);
        if (sibling >= chunks) continue;
        auto place = [&](u32 of) { return ((row + of) * blocks + block) * 2 + HALF; };
        auto partial = [&](u32 of) { return reinterpret_cast<float4*>(p.partial) + place(of) * (33 * 128) + at.thread; };
        u32* arrived = p.arrived + place(max(own, sibling));
        u32 before = 0;
        if (at.thread == 0) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(before) : "l"(arrived) : "memory");
        if (tell<HALF>(at, before) == 0) {
            leave(partial(own), o, soft);
            asm volatile("bar.sync %0, 128;" ::"n"(OWN + HALF) : "memory");
            if (at.thread == 0) {
                asm volatile("atom.acq_rel.gpu.global.exch.b32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
            }
            if (tell<HALF>(at, before) == 0) return false;
        }
        if (at.thread == 0) *arrived = 0;
        add(partial(sibling), o, soft);
    }
    return true;
}

template <int HALF>
__device__ __forceinline__ void finish(
    const Params& p, const Item& item, u32 block, const Place& at, u32 parity, float (&o)[128], Softmax soft) {
    soft.sum = {quad_sum(soft.sum.upper), quad_sum(soft.sum.lower)};
    at.write(4 + parity * 2 + HALF, soft.sum);
    named_sync<SUMS>();
    Row left = at.read(4 + parity * 2), right = at.read(5 + parity * 2);
    soft.sum = {left.upper + right.upper, left.lower + right.lower};
    if (item.tail >> 16 > 1 && !climb<HALF>(p, item, block, at, o, soft)) return;
    Row share = {1.0f / soft.sum.upper, 1.0f / soft.sum.lower};
    u32 lane = at.thread % 32, head = block * 64 + at.row();
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
        if (head < p.heads) *reinterpret_cast<uint4*>(out + i * 32) = make_uint4(a[0], a[1], a[2], a[3]);
        if (head + 8 < p.heads) {
            *reinterpret_cast<uint4*>(out + 8 * LATENT + i * 32) = make_uint4(b[0], b[1], b[2], b[3]);
        }
    }
}

// The items that the plan has dealt to this cluster.
struct Walk {
    u32 index;
    __device__ __forceinline__ Walk(const Params& p) { index = p.first[blockIdx.x / CLUSTER]; }
    // The next one and its set of heads, or false.
    __device__ __forceinline__ bool next(const Params& p, Item& item, u32& set) {
        if (index == NONE) return false;
        u32 sets = (p.heads + 64 * CLUSTER - 1) / (64 * CLUSTER);
        item = p.items[index / sets];
        set = index % sets;
        index = p.next[index];
        return true;
    }
};

template <int HALF>
__device__ __forceinline__ void consume(const Params& p, const Place& at, u32 rank) {
    Walk walk(p);
    Item item, next_item;
    u32 set, next_set, parity = 0, count = 0;
    bool more = walk.next(p, next_item, next_set);
    while (more) {
        item = next_item, set = next_set;
        // Long before it is needed.
        more = walk.next(p, next_item, next_set);
        u32 tiles = item.span >> 16, tail = item.tail % 256;
        float o[128];
#pragma unroll
        for (int i = 0; i < 128; i++) o[i] = 0.0f;
        Softmax soft = {{NEGATIVE, NEGATIVE}, {0.0f, 0.0f}};
        barrier_wait(at.base + Q_FULL, count & 1);
        auto pair_at = [&](u32 tile, u32 parity) -> Pair {
            return {parity, tile + HALF + 1 == tiles ? tail : PAGE, tile + 1 < tiles, tile + 2 >= tiles};
        };
        Pair pair = pair_at(0, parity);
        float s[32];
        if (HALF == 0) {
            begin_scores(at, pair, s);
            end_scores(at, pair, s);
        }
        for (u32 tile = 2; tile < tiles; tile += 2) {
            parity ^= 3;
            Pair next = pair_at(tile, parity);
            if (HALF == 0) {
                first_of_pair<false>(at, p.scale_log2, pair, next, s, o, soft);
            } else {
                second_of_pair(at, p.scale_log2, pair, o, soft);
            }
            pair = next;
        }
        parity ^= pair.paired ? 3 : 1;
        if (HALF == 0) {
            first_of_pair<true>(at, p.scale_log2, pair, pair, s, o, soft);
        } else {
            second_of_pair(at, p.scale_log2, pair, o, soft);
        }
        finish<HALF>(p, item, set * CLUSTER + rank, at, count & 1, o, soft);
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
        u32 next = tile + 2 < end ? table[tile + 2] : page;
        for (; tile < end; tile += 2, parity ^= 1) {
            u32 row = page * PAGE;
            u32 ahead = next * PAGE;
            page = next;
            if (tile + 4 < end) next = table[tile + 4];
            for (u32 turn = 0; turn < 3; turn++) {
                u32 part = stage == 0 ? (turn == 0 ? ROPE : turn == 1 ? LEFT : RIGHT)
                                      : (turn == 0 ? RIGHT : turn == 1 ? LEFT : ROPE);
                u32 first = part == LEFT ? 0 : part == RIGHT ? 4 : 8, blocks = part == ROPE ? 1 : 4;
                u32 full = at.base + full_at(stage, part);
                barrier_wait(at.base + free_at(stage, part), parity);
                barrier_expect(full, blocks * BLOCK_BYTES);
                // Each block of the cluster fetches its share for all.
                u32 own = part == ROPE ? (stage % CLUSTER == rank) : 4 / CLUSTER;
                for (u32 i = 0; i < own; i++) {
                    u32 block = first + (part == ROPE ? 0 : rank * own) + i;
                    load_block_all(&p.cache, at.tile(stage) + block * BLOCK_BYTES, full, block * 64, row);
                    // Helps where two blocks share a tile, and hurts where memory is the limit.
                    if (CLUSTER > 1 && ahead != row) prefetch_block(&p.cache, block * 64, ahead);
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
        barrier_wait(at.base + Q_FREE, parity);
        parity ^= 1;
        barrier_expect(at.base + Q_FULL, TILE_BYTES);
        for (u32 block = 0; block < KEY / 64; block++) {
            load_block(&p.query, at.base + block * BLOCK_BYTES, at.base + Q_FULL, block * 64, head);
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) mla(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) u8 shared[];
    u32 base = shared_address(shared), rank = blockIdx.x % CLUSTER;
    u32 group = threadIdx.x / 128, thread = threadIdx.x % 128;
    Place at = {base, peer_address(base, thread % CLUSTER), thread};
    at.stats = base + OFFSET_STATS + at.row() * 4;
    at.query_rows = rows_operand(base), at.tile_columns = columns_operand(base + OFFSET_K);
    if (threadIdx.x == 0) {
        barrier_init(base + Q_FULL, 1);
        barrier_init(base + Q_FREE, 8);
        for (u32 stage = 0; stage < 2; stage++) {
            for (u32 part = 0; part < 3; part++) {
                barrier_init(base + full_at(stage, part), 1);
                barrier_init(base + free_at(stage, part), 4 * CLUSTER);
            }
        }
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
