// Matrix products y[t][n] = sum_k x[t][k] w[n][k] on Hopper's tensor cores. gemm_tiles.cuh and gemm_scales.cuh stand
// before this text.
//
// One warp feeds a ring of stages (128 bytes of K each) through the copy engine, two warpgroups multiply: each owns 64
// of a tile's rows, or half of its columns where it has no more than 64 rows. A tile is COLUMNS wide. K is cut into
// SPLIT slices, a number that depends on the shape of the weights alone:
//  - with few rows, the SPLIT CTAs of a cluster take a slice each and add their sums in shared memory, in order;
//  - with many (IN_REGISTERS), one CTA takes all slices one after the other and adds their sums in the same order.
// So the bits of a row depend on nothing but the row and the weights. PAIR CTAs of a cluster share rows of x and take
// neighbouring columns; x is copied once for all. Grids are persistent: a cluster takes every nth tile.

struct Shared {
    u32 x, w, x_scales, reduce, full, empty, reduced, reusable;
};

__device__ __forceinline__ Shared shared_layout(u32 base) {
    Shared s;
    s.x = base;
    s.w = s.x + STAGES * X_BYTES;
    s.x_scales = s.w + STAGES * W_BYTES;
    s.reduce = s.x_scales + STAGES * X_SCALE_BYTES;
    s.full = s.reduce + REDUCE_BYTES;
    s.empty = s.full + STAGES * 8;
    s.reduced = s.empty + STAGES * 8;
    s.reusable = s.reduced + 2 * 8;
    return s;
}

struct Range {
    u32 begin, end;
};

// The steps of slice `slice`.
__device__ __forceinline__ Range slice_steps(u32 k, u32 slice) {
    u32 steps = (k + STEP_ELEMENTS - 1) / STEP_ELEMENTS;
    return {slice * steps / SPLIT, (slice + 1) * steps / SPLIT};
}

// The steps that this CTA takes for each tile.
__device__ __forceinline__ Range own_steps(u32 k, u32 first_slice) {
    return {slice_steps(k, first_slice).begin, slice_steps(k, first_slice + SLICES_HERE - 1).end};
}

// Rows of x that are copied for a tile: whole boxes, as many for each CTA of a pair.
__device__ __forceinline__ u32 boxes(const Tile& tile) {
    u32 count = (tile.count + BOX_ROWS - 1) / BOX_ROWS;
    return (count + PAIR - 1) / PAIR * PAIR;
}

struct Producer {
    const Params& p;
    const Shared& s;
    u32 pair, rank;
    Ring ring;

    __device__ __forceinline__ void weights(const Tile& tile, u32 step, const Ring& at) {
        u32 full = s.full + at.stage * 8;
        barrier_expect(full, boxes(tile) * BOX_ROWS * STEP_BYTES + W_BYTES + X_SCALE_BYTES);
        copy_box(s.w + at.stage * W_BYTES, p.w, full, step * STEP_ELEMENTS, tile.column, tile.matrix, p.w_policy);
    }

    __device__ __forceinline__ void rows(const Tile& tile, u32 step) {
        u32 full = s.full + ring.stage * 8, to = s.x + ring.stage * X_BYTES, count = boxes(tile) / PAIR;
        for (u32 i = 0; i < count; ++i) {
            u32 box = pair * count + i;
            u32 at = to + box * BOX_ROWS * STEP_BYTES, row = tile.row + box * BOX_ROWS;
            if constexpr (PAIR > 1) {
                u16 mask = u16(((1 << PAIR) - 1) << (rank - pair));
                copy_box_to(mask, at, p.x, full, step * STEP_ELEMENTS, tile.head, row, p.x_policy);
            } else {
                copy_box(at, p.x, full, step * STEP_ELEMENTS, tile.head, row, p.x_policy);
            }
        }
        if constexpr (FP8) copy_box_2d(s.x_scales + ring.stage * X_SCALE_BYTES, p.x_scales, full, tile.row, step);
    }

    __device__ void run(Range steps) {
        bool leader = threadIdx.x % 32 == 0;
        u32 ahead = 0;
        if constexpr (!GROUPED) {
            // Weights are never written by the kernel before: the first ones may come while it still runs.
            Tile tile;
            if (Schedule(p, pair).next(tile)) {
                ahead = min(u32(STAGES), steps.end - steps.begin);
                Ring at;
                for (u32 i = 0; i < ahead && leader; ++i, at.advance(STAGES)) weights(tile, steps.begin + i, at);
            }
        }
        wait_for_previous();
        let_next_start();
        Schedule schedule(p, pair);
        for (Tile tile; schedule.next(tile);) {
            for (u32 step = steps.begin; step < steps.end; ++step, ring.advance(STAGES)) {
                barrier_wait(s.empty + ring.stage * 8, ring.phase ^ 1);
                if (leader) {
                    if (ahead == 0) weights(tile, step, ring);
                    rows(tile, step);
                }
                if (ahead > 0) --ahead;
                __syncwarp();
            }
        }
    }
};

// What of a tile a warpgroup owns: 64 rows from `row` on, and columns from `column` on.
struct Part {
    u32 row, column;
};

// Warpgroup `group` waits until the other one has passed it the turn to multiply.
__device__ __forceinline__ void await_turn(u32 group) {
    asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(1 + group), "n"(CONSUMERS) : "memory");
}

__device__ __forceinline__ void pass_turn(u32 group) {
    asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(2 - group), "n"(CONSUMERS) : "memory");
}

struct Consumer {
    const Params& p;
    const Shared& s;
    u32 pair, rank, group, warp, lane;
    Ring ring;
    u32 reduce_phase = 0;

    // Gives a stage back, to both CTAs that copy into it.
    __device__ __forceinline__ void release(u32 stage) {
        u32 empty = s.empty + stage * 8;
        if constexpr (PAIR > 1) {
            if (lane < PAIR) barrier_arrive_peer(peer_address(empty, rank - pair + lane));
        } else {
            if (lane == 0) barrier_arrive(empty);
        }
    }

    // d (+)= the product over quarters FROM..TO of a step.
    template <u32 FROM, u32 TO, u32 COUNT>
    __device__ __forceinline__ void multiply(float (&d)[COUNT], const Part& part, bool add) {
        u64 x = operand(s.x + ring.stage * X_BYTES + part.row * STEP_BYTES);
        u64 w = operand(s.w + ring.stage * W_BYTES + part.column * STEP_BYTES);
        product_fence();
#pragma unroll
        for (u32 i = FROM; i < TO; ++i) product<FP8>(d, x + 2 * i, w + 2 * i, add || i > FROM);
        product_commit();
    }

    __device__ __forceinline__ void await_stage() { barrier_wait(s.full + ring.stage * 8, ring.phase); }

    // The sum over bf16 steps, all of it in the tensor cores. One step is multiplied while the next is awaited.
    template <u32 COUNT>
    __device__ __forceinline__ void sum_bf16(float (&sum)[COUNT], const Part& part, Range steps) {
        product_fence(sum);
        u32 last = 0;
        for (u32 step = steps.begin; step < steps.end; ++step, ring.advance(STAGES)) {
            await_stage();
            multiply<0, 4>(sum, part, true);
            if (step > steps.begin) {
                product_wait<1>();
                release(last);
            }
            last = ring.stage;
        }
        product_wait<0>();
        if (steps.begin < steps.end) release(last);
        product_fence(sum);
    }

    __device__ __forceinline__ Scales scale(const Part& part, WeightScales (&w_scales)[2], u32 step) {
        u32 at = s.x_scales + ring.stage * X_SCALE_BYTES + (part.row + warp * 16 + lane / 4) * 4;
        float upper = load_shared(at), lower = load_shared(at + 32);
        float first = w_scales[0].at(step, lane), second = ONE_SCALE ? first : w_scales[1].at(step, lane);
        return {{upper * first, upper * second}, {lower * first, lower * second}};
    }

    // The sum over FP8 steps: each is 128 of K under one scale of x and one of w, and is added in f32. Where both
    // warpgroups have rows of their own they take turns, so that one adds while the other multiplies.
    template <u32 COUNT>
    __device__ __forceinline__ void sum_fp8(float (&sum)[COUNT], const Tile& tile, const Part& part, Range steps) {
        constexpr bool TURNS = COUNT == COLUMNS / 2;
        u32 blocks = (p.k + 127) / 128, last_block = (p.n - 1) / 128, column = tile.column + part.column;
        auto row_scales = [&](u32 block) {
            u64 row = u64(tile.matrix) * (last_block + 1) + min(block, last_block);
            return WeightScales((const float*)p.w_scales + row * blocks, blocks, steps.begin, lane);
        };
        WeightScales w_scales[2] = {row_scales(column / 128), row_scales(column / 128 + 1)};
        u32 second = (128 - column % 128) / 8;
        float product[COUNT];
        for (u32 step = steps.begin; step < steps.end; ++step, ring.advance(STAGES)) {
            await_stage();
            if constexpr (TURNS) await_turn(group);
            product_fence(product);
            multiply<0, 2>(product, part, false);
            multiply<2, 4>(product, part, true);
            Scales scales = scale(part, w_scales, step);
            if constexpr (TURNS) {
                product_wait<1>();
                pass_turn(group);
            }
            product_wait<0>();
            product_fence(product);
            release(ring.stage);
            if constexpr (ONE_SCALE) add_scaled(sum, product, scales, COUNT);
            else if constexpr (TURNS) add_scaled_by_case<BLOCK_STEP>(sum, product, scales, second);
            else add_scaled(sum, product, scales, second);
        }
    }

    // Sends every CTA its columns of this slice's sums and adds the slices of its own, in order.
    template <u32 COUNT>
    __device__ __forceinline__ void reduce(const float (&sum)[COUNT], float (&out)[fours_own(COUNT / 4) * 4]) {
        constexpr u32 FOURS = COUNT / 4, OWN = fours_own(FOURS);
        u32 slice = rank / PAIR, thread = warp * 32 + lane;
        u32 mine = s.reduce + group * (REDUCE_BYTES / 2), reduced = s.reduced + group * 8;
        barrier_wait(s.reusable + group * 8, reduce_phase ^ 1);
#pragma unroll
        for (u32 i = 0; i < FOURS; ++i) {
            u32 at = mine + ((slice * OWN + i % OWN) * 128 + thread) * 16;
            store_peer(peer_address(at, i / OWN * PAIR + pair), sum + i * 4);
        }
        cluster_fence();
        __syncwarp();
        if (lane < CLUSTER_SPLIT) barrier_arrive_peer(peer_address(reduced, lane * PAIR + pair));
        barrier_wait_cluster(reduced, reduce_phase);
#pragma unroll
        for (u32 i = 0; i < OWN * 4; ++i) out[i] = 0.0f;
#pragma unroll
        for (u32 from = 0; from < CLUSTER_SPLIT; ++from) {
#pragma unroll
            for (u32 i = 0; i < OWN; ++i) {
                float v[4];
                load_shared(v, mine + ((from * OWN + i) * 128 + thread) * 16);
#pragma unroll
                for (u32 j = 0; j < 4; ++j) out[i * 4 + j] += v[j];
            }
        }
        __syncwarp();
        if (lane < CLUSTER_SPLIT) barrier_arrive_peer(peer_address(s.reusable + group * 8, lane * PAIR + pair));
        reduce_phase ^= 1;
    }

    // Four lanes hold four pairs of columns of a row: afterwards each holds eight columns in a row.
    __device__ __forceinline__ void transpose(u32 (&v)[4]) {
#pragma unroll
        for (u32 bit = 1; bit <= 2; bit <<= 1) {
            bool high = lane & bit;
#pragma unroll
            for (u32 low = 0; low < 4; ++low) {
                if (low & bit) continue;
                u32 got = __shfl_xor_sync(0xffffffffu, high ? v[low] : v[low | bit], bit);
                if (high) v[low] = got;
                else v[low | bit] = got;
            }
        }
    }

    // Where a row of y begins; null for one that is not there.
    __device__ __forceinline__ u64 row_address(const Tile& tile, u32 row) {
        if (row >= tile.count) return 0;
        if constexpr (GROUPED) {
            if (p.row_addresses) return ((const u64*)p.row_addresses)[tile.row + row];
        }
        return p.y + ((tile.row + row) * p.y_stride + tile.head * p.y_head_stride) * (p.y_is_f32 ? 4 : 2);
    }

    // Writes two columns of a row, those before `end`.
    __device__ __forceinline__ void store_pair(u64 row, u32 column, u32 end, float a, float b) {
        if (!row) return;
        if (p.y_is_f32) {
            float* y = (float*)row + column;
            if (p.y_vectors && column + 2 <= end) {
                *(float2*)y = make_float2(a, b);
            } else {
                if (column < end) y[0] = a;
                if (column + 1 < end) y[1] = b;
            }
        } else {
            bf16* y = (bf16*)row + column;
            if (p.y_vectors && column + 2 <= end) {
                *(u32*)y = pack_bf16(a, b);
            } else {
                if (column < end) y[0] = to_bf16(a);
                if (column + 1 < end) y[1] = to_bf16(b);
            }
        }
    }

    // Writes neighbouring eights of columns of 64 rows, those before `end`.
    template <u32 COUNT>
    __device__ __forceinline__ void store(const Tile& tile, const Part& part, u32 end, const float (&out)[COUNT]) {
        u32 row = part.row + warp * 16 + lane / 4;
        u64 rows[2] = {row_address(tile, row), row_address(tile, row + 8)};
#pragma unroll
        for (u32 i = 0; i < COUNT; i += 16) {
            u32 column = tile.column + part.column + i * 2;
            if (i + 16 <= COUNT && !p.y_is_f32 && p.y_vectors && column + 32 <= end) {
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    u32 v[4];
#pragma unroll
                    for (u32 j = 0; j < 4; ++j) {
                        u32 at = min(i + j * 4 + half * 2, COUNT - 2);
                        v[j] = pack_bf16(out[at], out[at + 1]);
                    }
                    transpose(v);
                    if (rows[half]) store_global((bf16*)rows[half] + column + lane % 4 * 8, v);
                }
                continue;
            }
#pragma unroll
            for (u32 j = i; j < i + 16 && j < COUNT; j += 4) {
                u32 c = column + (j - i) * 2 + lane % 4 * 2;
                store_pair(rows[0], c, end, out[j], out[j + 1]);
                store_pair(rows[1], c, end, out[j + 2], out[j + 3]);
            }
        }
    }

    template <u32 COUNT>
    __device__ __forceinline__ void slice_sum(float (&sum)[COUNT], const Tile& tile, const Part& part, u32 slice) {
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i) sum[i] = 0.0f;
        Range steps = slice_steps(p.k, slice);
        if constexpr (FP8) sum_fp8(sum, tile, part, steps);
        else sum_bf16(sum, part, steps);
    }

    // Computes COUNT * 2 columns of 64 rows.
    template <u32 COUNT> __device__ __forceinline__ void compute(const Tile& tile, Part part, u32 first_slice) {
        u32 end = min(p.n, tile.column + part.column + COUNT * 2);
        float sum[COUNT];
        if constexpr (CLUSTER_SPLIT > 1) {
            slice_sum(sum, tile, part, first_slice);
            float out[fours_own(COUNT / 4) * 4];
            reduce(sum, out);
            part.column += first_slice * fours_own(COUNT / 4) * 8;
            store(tile, part, end, out);
        } else if constexpr (SPLIT > 1) {
            float out[COUNT];
#pragma unroll
            for (u32 i = 0; i < COUNT; ++i) out[i] = 0.0f;
            for (u32 slice = 0; slice < SPLIT; ++slice) {
                slice_sum(sum, tile, part, slice);
#pragma unroll
                for (u32 i = 0; i < COUNT; ++i) out[i] += sum[i];
            }
            store(tile, part, end, out);
        } else {
            slice_sum(sum, tile, part, 0);
            store(tile, part, end, sum);
        }
    }

    __device__ void run(u32 first_slice) {
        // The first turn is warpgroup 0's.
        if (FP8 && group == 1) pass_turn(group);
        Schedule schedule(p, pair);
        for (Tile tile; schedule.next(tile);) {
            if (tile.count > GROUP_ROWS) compute<COLUMNS / 2>(tile, {group * GROUP_ROWS, 0}, first_slice);
            else compute<COLUMNS / 4>(tile, {0, group * (COLUMNS / 2)}, first_slice);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm(const __grid_constant__ Params p) {
    // Swizzled boxes begin at multiples of 1 KiB.
    extern __shared__ __align__(1024) u8 memory[];
    Shared s = shared_layout(shared_address(memory));
    u32 rank = CLUSTER > 1 ? cluster_rank() : 0, pair = rank % PAIR, first_slice = rank / PAIR;
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < STAGES; ++i) {
            barrier_init(s.full + i * 8, 1);
            barrier_init(s.empty + i * 8, CONSUMERS / 32 * PAIR);
        }
        for (u32 i = 0; i < 2; ++i) {
            barrier_init(s.reduced + i * 8, 4 * CLUSTER_SPLIT);
            barrier_init(s.reusable + i * 8, 4 * CLUSTER_SPLIT);
        }
        barrier_init_fence();
    }
    if (CLUSTER > 1) cluster_sync();
    else __syncthreads();
    u32 warp = threadIdx.x / 32;
    if (warp >= CONSUMERS / 32) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp == CONSUMERS / 32) {
            if (threadIdx.x % 32 == 0) {
                map_prefetch(p.x);
                map_prefetch(p.w);
            }
            Producer{p, s, pair, rank}.run(own_steps(p.k, first_slice));
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        wait_for_previous();
        Consumer{p, s, pair, rank, warp / 4, warp % 4, threadIdx.x % 32}.run(first_slice);
    }
    // Nobody leaves while a neighbour may still write into its memory.
    if (CLUSTER > 1) cluster_sync();
}
