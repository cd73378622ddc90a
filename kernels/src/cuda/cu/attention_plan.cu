// Attention's plan of a step, and the merge of rows that were cut into chunks.
//
// How a row is cut depends on its own length only, so that its bits do not depend on the batch.

// Tiles are dealt in pairs.
constexpr u32 UNIT = 2;
constexpr u32 THREADS = 1024;

// Rows of up to one and a half times `chunk` positions are one chunk; longer ones are cut evenly.
__device__ __forceinline__ u32 chunks_of(u32 positions, u32 chunk, u32 chunks_max) {
    return min(max((positions + chunk / 2) / chunk, 1u), chunks_max);
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
};

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
