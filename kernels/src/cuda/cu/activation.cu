// Gated activation and FP8 quantisation of rows.
#include "rows.cuh"

struct ActivationParams {
    // bf16, gate then up or the plain row, `x_stride` elements from row to row.
    const bf16* x;
    // Outputs, each may be null: bf16 [rows][width], codes [rows][width], scales [blocks of 128][scale_stride].
    bf16* y;
    u8* codes;
    float* scales;
    // Rows in segments: first row of each and the end of the last, and how many are real. Null: all of `rows`.
    const u32* segment_start;
    const u32* segment_rows;
    u64 x_stride;
    u32 rows;
    u32 width;
    u32 scale_stride;
    u32 segments;
};

constexpr u32 SEGMENTS_MAX = 1024;

// Whether a row of a segmented layout is real. `starts` ascends from 0 and `row` lies before its end.
__device__ __forceinline__ bool is_real(const u32* starts, const u32* counts, u32 segments, u32 row) {
    u32 low = 0, high = segments;
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (starts[middle] <= row) low = middle;
        else high = middle;
    }
    return row - starts[low] < counts[low];
}

// Blocks stride over tiles of a row; a tile is eight columns per thread.
template <bool GATED, bool WIDE>
__device__ __forceinline__ void activate(const ActivationParams& p) {
    __shared__ u32 starts[SEGMENTS_MAX + 1], counts[SEGMENTS_MAX];
    wait_for_previous();
    let_next_start();
    u32 rows = p.rows, width = p.width;
    if (p.segment_start) {
        for (u32 i = threadIdx.x; i <= p.segments; i += blockDim.x) starts[i] = p.segment_start[i];
        for (u32 i = threadIdx.x; i < p.segments; i += blockDim.x) counts[i] = p.segment_rows[i];
        __syncthreads();
        rows = min(rows, starts[p.segments]);
    }
    u32 tile = 8 * blockDim.x, tiles = (width + tile - 1) / tile;
    for (u32 item = blockIdx.x; item < rows * tiles; item += gridDim.x) {
        u32 row = item / tiles, column = item % tiles * tile + 8 * threadIdx.x;
        if (p.segment_start && !is_real(starts, counts, p.segments, row)) continue;
        Eight x = load_eight<WIDE>(p.x + row * p.x_stride, column, width);
        if (GATED) {
            Eight up = load_eight<WIDE>(p.x + row * p.x_stride + width, column, width);
#pragma unroll
            for (int i = 0; i < 8; i++) x.at[i] = __fdividef(x.at[i], 1.0f + __expf(-x.at[i])) * up.at[i];
        }
        if (p.y) store_eight<WIDE>(p.y + u64(row) * width, column, width, x);
        if (p.codes) {
            float* at = p.scales + u64(column / 128) * p.scale_stride + row;
            store_fp8<WIDE>(p.codes + u64(row) * width, at, column, width, x);
        }
    }
}

#define ACTIVATE(NAME, GATED, WIDE)                                                                            \
    extern "C" __global__ void __launch_bounds__(256) NAME(const __grid_constant__ ActivationParams p) { \
        activate<GATED, WIDE>(p);                                                                              \
    }
ACTIVATE(silu_mul_wide, true, true)
ACTIVATE(silu_mul_narrow, true, false)
ACTIVATE(quantize_wide, false, true)
ACTIVATE(quantize_narrow, false, false)
