// Absorbed multi-head latent attention over a paged cache: 64 heads of one row (token) per block, on wgmma.
//
// Two warpgroups share the 512 output columns. Tiles of 64 positions (one page) come in pairs: the first warpgroup
// scores tile 0, the second tile 1, each turns its scores into probabilities, multiplies them with its own half of the
// tile's columns from registers and hands them to the other through shared memory, so that one's softmax hides behind
// the other's products. Both follow one running maximum, passed to and fro. With CLUSTER 2, the two blocks of a cluster
// work on neighbouring groups of heads of the same row and each fetches half of every tile for both.

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
