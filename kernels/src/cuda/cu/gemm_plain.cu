// The products of gemm.cu for shapes that the copy engine does not take: rows whose bytes are no multiple of 16.
//
// A warp makes one column of y at a time: its lanes stride over K and add up by a fixed tree, so the bits of a row
// depend on nothing but the row and the weights. Correct for any shape, and not fast.
//
// Constants: FP8, GROUPED (0 or 1).

#include "common.cuh"

constexpr u32 BLOCK = 128;
constexpr u32 WARPS = 4;

struct Params {
    u64 x, x_scales, w, w_scales, y;
    u64 x_stride, x_head_stride, y_stride, y_head_stride; // elements
    u64 segment_start, segment_rows, pool_of_slot;
    u64 row_addresses; // as in gemm_tiles.cuh
    u32 x_scales_stride;
    u32 rows, n, k;
    u32 matrices, y_is_f32;
};

__device__ __forceinline__ float dot_bf16(const bf16* x, const bf16* w, u32 k) {
    float sum = 0.0f;
    for (u32 i = threadIdx.x % 32; i < k; i += 32) sum = fmaf(to_float(x[i]), to_float(w[i]), sum);
    return warp_sum(sum);
}

// Blocks of 128 of K have one scale each; those of x lie `stride` apart.
__device__ __forceinline__ float dot_fp8(const u8* x, const float* x_scales, u32 stride, const u8* w,
                                         const float* w_scales, u32 k) {
    float sum = 0.0f;
    for (u32 block = 0; block * BLOCK < k; ++block) {
        float part = 0.0f;
        u32 end = min(k, (block + 1) * BLOCK);
        for (u32 i = block * BLOCK + threadIdx.x % 32; i < end; i += 32)
            part = fmaf(from_e4m3(x[i]), from_e4m3(w[i]), part);
        sum = fmaf(part, x_scales[u64(block) * stride] * w_scales[block], sum);
    }
    return warp_sum(sum);
}

// Blocks: x over columns, y over heads or slots, z over rows.
extern "C" __global__ void __launch_bounds__(WARPS * 32) gemm_plain(const __grid_constant__ Params p) {
    wait_for_previous();
    let_next_start();
    u32 slot = blockIdx.y, column = blockIdx.x * WARPS + threadIdx.x / 32;
    if (column >= p.n) return;
    u32 matrix = slot, head = slot, first = 0, count = p.rows;
    if constexpr (GROUPED) {
        matrix = ((const u32*)p.pool_of_slot)[slot];
        head = 0;
        first = ((const u32*)p.segment_start)[slot];
        count = ((const u32*)p.segment_rows)[slot];
    }
    u64 w_row = u64(matrix) * p.n + column;
    for (u32 i = blockIdx.z; i < count; i += gridDim.z) {
        u64 row = first + i, x_at = row * p.x_stride + head * p.x_head_stride;
        float sum;
        if constexpr (FP8) {
            u32 blocks = (p.k + BLOCK - 1) / BLOCK;
            u64 w_block = u64(matrix) * ((p.n + BLOCK - 1) / BLOCK) + column / BLOCK;
            sum = dot_fp8((const u8*)p.x + x_at, (const float*)p.x_scales + row, p.x_scales_stride,
                          (const u8*)p.w + w_row * p.k, (const float*)p.w_scales + w_block * blocks, p.k);
        } else {
            sum = dot_bf16((const bf16*)p.x + x_at, (const bf16*)p.w + w_row * p.k, p.k);
        }
        u64 y_at = row * p.y_stride + head * p.y_head_stride + column;
        if (threadIdx.x % 32 != 0) continue;
        if (GROUPED && p.row_addresses) ((bf16*)((const u64*)p.row_addresses)[row])[column] = to_bf16(sum);
        else if (p.y_is_f32) ((float*)p.y)[y_at] = sum;
        else ((bf16*)p.y)[y_at] = to_bf16(sum);
    }
}
