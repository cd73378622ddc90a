// Matrix products y[t][n] = sum_k x[t][k] w[n][k] on Hopper's tensor cores. The text of gemm_tiles.cuh stands before it.
//
// One warp feeds a ring of stages (128 bytes of K each) through the copy engine, two warpgroups multiply: each owns 64
// of a tile's 128 rows. A tile is COLUMNS wide. K is cut into SPLIT slices, a number that depends on N and K alone:
//  - with few rows, the SPLIT CTAs of a cluster take a slice each and add their sums in shared memory, in order;
//  - with many (IN_REGISTERS), one CTA takes all slices one after the other and adds their sums in the same order.
// So the bits of a row depend on nothing but the row and the weights. PAIR CTAs of a cluster share rows of x and take
// neighbouring columns; x is copied once for both. Grids are persistent: a cluster takes every nth tile.

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

    __device__ __forceinline__ void multiply(float (&d)[ACCUMULATORS], bool add) {
        u64 x = operand(s.x + ring.stage * X_BYTES + group * GROUP_ROWS * STEP_BYTES);
        u64 w = operand(s.w + ring.stage * W_BYTES);
        product_fence();
#pragma unroll
        for (u32 i = 0; i < STEP_BYTES / 32; ++i) product<FP8>(d, x + 2 * i, w + 2 * i, add || i > 0);
        product_commit();
    }

    // The sum over bf16 steps, all of it in the tensor cores. One step is multiplied while the next is awaited.
    __device__ __forceinline__ void sum_bf16(float (&sum)[ACCUMULATORS], Range steps) {
#pragma unroll
        for (u32 i = 0; i < ACCUMULATORS; ++i) sum[i] = 0.0f;
        product_fence(sum);
        u32 last = 0;
        for (u32 step = steps.begin; step < steps.end; ++step, ring.advance(STAGES)) {
            barrier_wait(s.full + ring.stage * 8, ring.phase);
            multiply(sum, true);
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

    // The sum over FP8 steps: each is 128 of K under one scale of x and one of w, and is added in f32.
    __device__ __forceinline__ void sum_fp8(float (&sum)[ACCUMULATORS], Range steps, const float* w_scales) {
        float part[ACCUMULATORS];
#pragma unroll
        for (u32 i = 0; i < ACCUMULATORS; ++i) sum[i] = 0.0f;
        u32 blocks = (p.k + STEP_ELEMENTS - 1) / STEP_ELEMENTS;
        // A lane holds one of 32 scales; the next 32 are on their way.
        auto fetch = [&](u32 first) { return first + lane < blocks ? __ldg(w_scales + first + lane) : 0.0f; };
        u32 batch = steps.begin / 32 * 32;
        float now = fetch(batch), next = fetch(batch + 32);
        for (u32 step = steps.begin; step < steps.end; ++step, ring.advance(STAGES)) {
            if (step - batch == 32) {
                batch = step;
                now = next;
                next = fetch(batch + 32);
            }
            float w_scale = __shfl_sync(0xffffffffu, now, step - batch);
            barrier_wait(s.full + ring.stage * 8, ring.phase);
            product_fence(part);
            multiply(part, false);
            u32 scales = s.x_scales + ring.stage * X_SCALE_BYTES + (group * GROUP_ROWS + warp * 16 + lane / 4) * 4;
            float upper, lower;
            asm volatile("ld.shared.f32 %0, [%1];" : "=f"(upper) : "r"(scales));
            asm volatile("ld.shared.f32 %0, [%1];" : "=f"(lower) : "r"(scales + 32));
            upper *= w_scale;
            lower *= w_scale;
            product_wait<0>();
            product_fence(part);
            release(ring.stage);
#pragma unroll
            for (u32 i = 0; i < ACCUMULATORS; i += 4) {
                sum[i] = fmaf(part[i], upper, sum[i]);
                sum[i + 1] = fmaf(part[i + 1], upper, sum[i + 1]);
                sum[i + 2] = fmaf(part[i + 2], lower, sum[i + 2]);
                sum[i + 3] = fmaf(part[i + 3], lower, sum[i + 3]);
            }
        }
    }

    // Sends every CTA its columns of this slice's sums and adds the slices of its own, in order.
    __device__ __forceinline__ void reduce(const float (&sum)[ACCUMULATORS], float (&out)[FOURS_OWN * 4]) {
        constexpr u32 HALF = REDUCE_BYTES / 2;
        u32 slice = rank / PAIR, thread = warp * 32 + lane;
        u32 mine = s.reduce + group * HALF, reduced = s.reduced + group * 8;
        if (thread == 0) barrier_expect(reduced, HALF);
        barrier_wait(s.reusable + group * 8, reduce_phase ^ 1);
#pragma unroll
        for (u32 i = 0; i < FOURS; ++i) {
            u32 to = i / FOURS_OWN * PAIR + pair;
            u32 at = mine + ((slice * FOURS_OWN + i % FOURS_OWN) * 128 + thread) * 16;
            store_peer(peer_address(at, to), sum + i * 4, peer_address(reduced, to));
        }
        barrier_wait(reduced, reduce_phase);
#pragma unroll
        for (u32 i = 0; i < FOURS_OWN * 4; ++i) out[i] = 0.0f;
#pragma unroll
        for (u32 from = 0; from < CLUSTER_SPLIT; ++from) {
#pragma unroll
            for (u32 i = 0; i < FOURS_OWN; ++i) {
                float v[4];
                asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                             : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                             : "r"(mine + ((from * FOURS_OWN + i) * 128 + thread) * 16)
                             : "memory");
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

    __device__ __forceinline__ void store_pair(const Tile& tile, u32 row, u32 column, float a, float b) {
        if (row >= tile.count) return;
        u64 at = (tile.row + row) * p.y_stride + tile.head * p.y_head_stride + column;
        if (p.y_is_f32) {
            float* y = (float*)p.y + at;
            if (p.y_vectors && column + 2 <= p.n) {
                *(float2*)y = make_float2(a, b);
            } else {
                if (column < p.n) y[0] = a;
                if (column + 1 < p.n) y[1] = b;
            }
        } else {
            bf16* y = (bf16*)p.y + at;
            if (p.y_vectors && column + 2 <= p.n) {
                *(u32*)y = pack_bf16(a, b);
            } else {
                if (column < p.n) y[0] = to_bf16(a);
                if (column + 1 < p.n) y[1] = to_bf16(b);
            }
        }
    }

    // Writes COUNT / 4 neighbouring eights of columns, from `column` on.
    template <u32 COUNT> __device__ __forceinline__ void store(const Tile& tile, u32 column, const float (&out)[COUNT]) {
        u32 row = group * GROUP_ROWS + warp * 16 + lane / 4;
        if (COUNT % 16 == 0 && !p.y_is_f32 && p.y_vectors && column + COUNT * 2 <= p.n) {
#pragma unroll
            for (u32 i = 0; i + 16 <= COUNT; i += 16) {
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    u32 v[4];
#pragma unroll
                    for (u32 j = 0; j < 4; ++j)
                        v[j] = pack_bf16(out[i + j * 4 + half * 2], out[i + j * 4 + half * 2 + 1]);
                    transpose(v);
                    u32 r = row + half * 8;
                    u64 at = (tile.row + r) * p.y_stride + tile.head * p.y_head_stride + column + i * 2 + lane % 4 * 8;
                    if (r < tile.count) *(uint4*)((bf16*)p.y + at) = make_uint4(v[0], v[1], v[2], v[3]);
                }
            }
            return;
        }
#pragma unroll
        for (u32 i = 0; i < COUNT; i += 4) {
            u32 c = column + i * 2 + lane % 4 * 2;
            store_pair(tile, row, c, out[i], out[i + 1]);
            store_pair(tile, row + 8, c, out[i + 2], out[i + 3]);
        }
    }

    __device__ __forceinline__ void slice_sum(float (&sum)[ACCUMULATORS], const Tile& tile, u32 slice) {
        Range steps = slice_steps(p.k, slice);
        if constexpr (FP8) {
            u32 blocks = (p.k + 127) / 128;
            u64 row = u64(tile.matrix) * ((p.n + 127) / 128) + min(tile.column, p.n - 1) / 128;
            sum_fp8(sum, steps, (const float*)p.w_scales + row * blocks);
        } else {
            sum_bf16(sum, steps);
        }
    }

    // Rows of this warpgroup are not wanted: only keeps pace.
    __device__ __forceinline__ void skip(Range steps) {
        for (u32 step = steps.begin; step < steps.end; ++step, ring.advance(STAGES)) {
            barrier_wait(s.full + ring.stage * 8, ring.phase);
            release(ring.stage);
        }
    }

    __device__ void run(u32 first_slice) {
        Schedule schedule(p, pair);
        for (Tile tile; schedule.next(tile);) {
            if (tile.count <= group * GROUP_ROWS) {
                skip(own_steps(p.k, first_slice));
                continue;
            }
            float sum[ACCUMULATORS];
            if constexpr (CLUSTER_SPLIT > 1) {
                slice_sum(sum, tile, first_slice);
                float out[FOURS_OWN * 4];
                reduce(sum, out);
                store(tile, tile.column + first_slice * FOURS_OWN * 8, out);
            } else if constexpr (SPLIT > 1) {
                float out[ACCUMULATORS];
#pragma unroll
                for (u32 i = 0; i < ACCUMULATORS; ++i) out[i] = 0.0f;
                for (u32 slice = 0; slice < SPLIT; ++slice) {
                    slice_sum(sum, tile, slice);
#pragma unroll
                    for (u32 i = 0; i < ACCUMULATORS; ++i) out[i] += sum[i];
                }
                store(tile, tile.column, out);
            } else {
                slice_sum(sum, tile, 0);
                store(tile, tile.column, sum);
            }
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
            barrier_init(s.reduced + i * 8, 1);
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
