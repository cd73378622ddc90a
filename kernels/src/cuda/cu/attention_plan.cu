// Attention's plan of a step, and the merge of rows that were cut into chunks.
//
// How a row is cut depends on its own length only, so that its bits do not depend on the batch.

// Tiles are dealt in pairs.
constexpr u32 UNIT = 2;
constexpr u32 THREADS = 1024;

// Rows of more than `chunk` positions are cut evenly into as few chunks as do not exceed it.
__device__ __forceinline__ u32 chunks_of(u32 positions, u32 chunk, u32 chunks_max) {
    return min((positions + chunk - 1) / chunk, chunks_max);
}

struct PlanParams {
    const u32* positions;
    const u32* seq_of_row;
    Item* items;  // [segments][items_max]
    u32* counts;  // [segments]
    u32 rows;
    u32 segment_rows;
    u32 items_max;
    u32 chunk;
    u32 chunks_max;
    u32* first;  // [segments][bins], or null: nothing is dealt
    u32* next;   // [segments][items_max][sets]
    u32 bins;
    u32 sets;
};

constexpr u32 BINS_PER_LANE = 5;

// Deals items, longest first, each to the bin with the least so far. Done by one warp: there are few items, or few steps.
__device__ __forceinline__ void deal(const PlanParams& p, const Item* items, u32 count, u32* first, u32* next) {
    u32 lane = threadIdx.x, loads[BINS_PER_LANE] = {}, tails[BINS_PER_LANE];
#pragma unroll
    for (u32 i = 0; i < BINS_PER_LANE; i++) tails[i] = NONE;
    for (u32 base = 0; base < count; base += 32) {
        // In pairs of tiles; an item costs about as much as two of them before it begins, and more where it is not alone.
        u32 cost = 0;
        if (base + lane < count) {
            Item item = items[base + lane];
            cost = ((item.span >> 16) + 1) / 2 + (item.tail >> 16 > 1 ? 4 : 2);
        }
        for (u32 i = 0; i < min(count - base, 32u); i++) {
            u32 load = __shfl_sync(0xffffffffu, cost, i);
            for (u32 set = 0; set < p.sets; set++) {
                u32 least = 0xffffffffu;
#pragma unroll
                for (u32 j = 0; j < BINS_PER_LANE; j++) {
                    if (j * 32 + lane < p.bins) least = min(least, loads[j] << 8 | (j * 32 + lane));
                }
                least = __reduce_min_sync(0xffffffffu, least) % 256;
                u32 index = (base + i) * p.sets + set;
#pragma unroll
                for (u32 j = 0; j < BINS_PER_LANE; j++) {
                    if (least != j * 32 + lane) continue;
                    (tails[j] == NONE ? first[least] : next[tails[j]]) = index;
                    tails[j] = index, loads[j] += load;
                }
            }
        }
    }
#pragma unroll
    for (u32 j = 0; j < BINS_PER_LANE; j++) {
        u32 bin = j * 32 + lane;
        if (bin < p.bins) (tails[j] == NONE ? first[bin] : next[tails[j]]) = NONE;
    }
}

// One block per segment of rows lists its items, longest first: a counting sort.
extern "C" __global__ void __launch_bounds__(THREADS) attention_plan(const __grid_constant__ PlanParams p) {
    __shared__ u32 bins[THREADS];
    __shared__ u32 sums[THREADS / 32];
    u32 thread = threadIdx.x, lane = thread % 32;
    u32 first = blockIdx.x * p.segment_rows, end = min(first + p.segment_rows, p.rows);
    bins[thread] = 0;
    __syncthreads();
    wait_for_previous();
    let_next_start();
    auto each = [&](auto place) {
        for (u32 row = first + thread; row < end; row += THREADS) {
            u32 position = p.positions[row];
            if (position == IDLE) continue;
            u32 tiles = position / PAGE + 1, units = (tiles + UNIT - 1) / UNIT;
            u32 chunks = chunks_of(position + 1, p.chunk, p.chunks_max);
            for (u32 chunk = 0; chunk < chunks; chunk++) {
                u32 from = u32(u64(units) * chunk / chunks) * UNIT;
                u32 to = min(u32(u64(units) * (chunk + 1) / chunks) * UNIT, tiles);
                // The longest come into the lowest bin.
                u32 bin = THREADS - min((to - from + UNIT - 1) / UNIT, THREADS);
                place(bin, row, from, to, to == tiles ? position % PAGE + 1 : PAGE, chunk, chunks);
            }
        }
    };
    each([&](u32 bin, u32, u32, u32, u32, u32, u32) { atomicAdd(&bins[bin], 1); });
    __syncthreads();
    // Exclusive sums over the bins.
    u32 own = bins[thread], sum = own;
    for (u32 step = 1; step < 32; step *= 2) {
        u32 below = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += below;
    }
    if (lane == 31) sums[thread / 32] = sum;
    __syncthreads();
    if (thread < 32) {
        u32 total = sums[lane], all = total;
        for (u32 step = 1; step < 32; step *= 2) {
            u32 below = __shfl_up_sync(0xffffffffu, all, step);
            if (lane >= step) all += below;
        }
        sums[lane] = all - total;
        if (lane == 31) p.counts[blockIdx.x] = all;
    }
    __syncthreads();
    bins[thread] = sums[thread / 32] + sum - own;
    __syncthreads();
    Item* items = p.items + u64(blockIdx.x) * p.items_max;
    each([&](u32 bin, u32 row, u32 from, u32 to, u32 tail, u32 chunk, u32 chunks) {
        Item item = {row, p.seq_of_row[row], from | (to - from) << 16, tail | chunk << 8 | chunks << 16};
        items[atomicAdd(&bins[bin], 1)] = item;
    });
    if (p.first == nullptr) return;
    __syncthreads();
    if (thread < 32) {
        u64 segment = blockIdx.x;
        deal(p, items, p.counts[segment], p.first + segment * p.bins, p.next + segment * p.items_max * p.sets);
    }
}

struct MergeParams {
    const u32* positions;
    const float* partial;   // [rows of the segment][chunks_max][heads][width]
    const float* log_sums;  // [rows of the segment][chunks_max][heads], powers of two
    bf16* out;              // [rows][heads][width]
    u32 row0;
    u32 heads;
    u32 width;
    u32 chunk;
    u32 chunks_max;
};

// Adds up the chunks of a row in their order. Block (x, y) does some elements of row x; rows of one chunk are done.
extern "C" __global__ void __launch_bounds__(256) attention_merge(const __grid_constant__ MergeParams p) {
    wait_for_previous();
    let_next_start();
    u32 position = p.positions[p.row0 + blockIdx.x];
    if (position == IDLE) return;
    u32 chunks = chunks_of(position + 1, p.chunk, p.chunks_max);
    if (chunks == 1) return;
    u32 elements = p.heads * p.width;
    for (u32 at = (blockIdx.y * 256 + threadIdx.x) * 4; at < elements; at += gridDim.y * 256 * 4) {
        const float* log_sums = p.log_sums + u64(blockIdx.x) * p.chunks_max * p.heads + at / p.width;
        const float* partial = p.partial + u64(blockIdx.x) * p.chunks_max * elements + at;
        float max = log_sums[0];
        for (u32 i = 1; i < chunks; i++) max = fmaxf(max, log_sums[i * p.heads]);
        float sum = 0.0f, x[4] = {};
        for (u32 i = 0; i < chunks; i++) {
            float share = exp2f(log_sums[i * p.heads] - max);
            float4 part = *reinterpret_cast<const float4*>(partial + u64(i) * elements);
            sum += share;
            x[0] += share * part.x, x[1] += share * part.y, x[2] += share * part.z, x[3] += share * part.w;
        }
        uint2 y = make_uint2(pack_bf16(x[0] / sum, x[1] / sum), pack_bf16(x[2] / sum, x[3] / sum));
        *reinterpret_cast<uint2*>(p.out + u64(p.row0 + blockIdx.x) * elements + at) = y;
    }
}
