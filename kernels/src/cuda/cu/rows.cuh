// Rows in pieces of eight elements: loads, stores, sums and FP8 quantisation.
//
// WIDE: every row begins at a multiple of 16 bytes and is whole pieces long, so that a piece is one or two 16-byte
// accesses. Otherwise elements go one by one. Both compute the same.
#pragma once
#include "common.cuh"

// Marks an index that leads nowhere.
constexpr u32 NONE = 0xffffffffu;

struct Eight {
    float at[8];
};

template <bool WIDE>
__device__ __forceinline__ Eight load_eight(const bf16* row, u32 column, u32 width) {
    Eight x = {};
    if (WIDE) {
        if (column < width) {
            uint4 raw = *reinterpret_cast<const uint4*>(row + column);
            u32 pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                x.at[2 * i] = low_bf16(pairs[i]);
                x.at[2 * i + 1] = high_bf16(pairs[i]);
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (column + i < width) x.at[i] = to_float(row[column + i]);
        }
    }
    return x;
}

template <bool WIDE>
__device__ __forceinline__ Eight load_eight(const float* row, u32 column, u32 width) {
    Eight x = {};
    if (WIDE) {
        if (column < width) {
            float4 low = *reinterpret_cast<const float4*>(row + column);
            float4 high = *reinterpret_cast<const float4*>(row + column + 4);
            x = {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (column + i < width) x.at[i] = row[column + i];
        }
    }
    return x;
}

template <bool WIDE>
__device__ __forceinline__ void store_eight(bf16* row, u32 column, u32 width, const Eight& x) {
    if (WIDE) {
        if (column < width) {
            *reinterpret_cast<uint4*>(row + column) =
                make_uint4(pack_bf16(x.at[0], x.at[1]), pack_bf16(x.at[2], x.at[3]), pack_bf16(x.at[4], x.at[5]),
                           pack_bf16(x.at[6], x.at[7]));
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (column + i < width) row[column + i] = to_bf16(x.at[i]);
        }
    }
}

template <bool WIDE>
__device__ __forceinline__ void store_eight(float* row, u32 column, u32 width, const Eight& x) {
    if (WIDE) {
        if (column < width) {
            *reinterpret_cast<float4*>(row + column) = make_float4(x.at[0], x.at[1], x.at[2], x.at[3]);
            *reinterpret_cast<float4*>(row + column + 4) = make_float4(x.at[4], x.at[5], x.at[6], x.at[7]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (column + i < width) row[column + i] = x.at[i];
        }
    }
}

// Quantises a block of 128: sixteen lanes of a warp, from lane 0 or 16, hold it in order. All lanes must call.
template <bool WIDE>
__device__ __forceinline__ void store_fp8(u8* row, float* scale, u32 column, u32 width, const Eight& x) {
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) most = fmaxf(most, fabsf(x.at[i]));
#pragma unroll
    for (int step = 8; step > 0; step >>= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    float unit = fmaxf(most, 1e-10f) / FP8_MAX;
    float inverse = 1.0f / unit;
    if (column >= width) return;
    if ((column & 127) == 0) *scale = unit;
    u16 codes[4];
#pragma unroll
    for (int i = 0; i < 4; i++) codes[i] = pack_e4m3(x.at[2 * i] * inverse, x.at[2 * i + 1] * inverse);
    if (WIDE) {
        *reinterpret_cast<uint2*>(row + column) =
            make_uint2(codes[0] | u32(codes[1]) << 16, codes[2] | u32(codes[3]) << 16);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (column + i < width) row[column + i] = u8(codes[i / 2] >> (8 * (i & 1)));
        }
    }
}

// Sum over a block of at most 16 warps, in a fixed order; `parts` is one float per warp.
__device__ __forceinline__ float block_sum(float x, float* parts) {
    x = warp_sum(x);
    if ((threadIdx.x & 31) == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
    for (u32 i = 0; i < blockDim.x / 32; i++) sum += parts[i];
    return sum;
}
