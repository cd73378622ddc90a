// What attention's kernels share: the plan's items, and softmax over the four lanes that hold a row.
#pragma once
#include "common.cuh"

// Positions of a page of the cache, and of a tile.
constexpr u32 PAGE = 64;
// Ends a list of items.
constexpr u32 NONE = 0xffffffffu;
#define NEGATIVE __int_as_float(0xff800000)

// A run of tiles of one row, as the plan deals them.
struct alignas(16) Item {
    u32 row;
    u32 sequence;
    u32 span;  // first tile | tiles << 16
    u32 tail;  // positions in the last tile | chunk << 8 | chunks of the row << 16
};

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
