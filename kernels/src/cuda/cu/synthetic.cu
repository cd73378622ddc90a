// Reproducible pseudo-random weights, for measurements of models that nobody has the weights of.
//
// Element i of a buffer is a function of the seed and i alone: the sum of four 16-bit numbers of a hash, close to normal.
#include "common.cuh"

struct FillParams {
    // bf16, f32 or E4M3, `length` elements.
    void* data;
    u64 length;
    u64 seed;
    float mean;
    float deviation;
};

// Standard deviation of the sum of four uniform numbers in 0..65536.
constexpr float SPREAD = 37837.2f;
constexpr float CENTRE = 131070.0f;

__device__ __forceinline__ float normal_at(u64 seed, u64 index) {
    u64 x = (index + seed * 0x9e3779b97f4a7c15ull) * 0xd1342543de82ef95ull + seed;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    x ^= x >> 31;
    u32 sum = u32(x & 0xffff) + u32(x >> 16 & 0xffff) + u32(x >> 32 & 0xffff) + u32(x >> 48);
    return (float(sum) - CENTRE) / SPREAD;
}

__device__ __forceinline__ void store(float* data, u64 at, float x) { data[at] = x; }
__device__ __forceinline__ void store(bf16* data, u64 at, float x) { data[at] = to_bf16(x); }
__device__ __forceinline__ void store(u8* data, u64 at, float x) { data[at] = u8(pack_e4m3(x, 0.0f)); }

template <class T>
__device__ __forceinline__ void fill(const FillParams& p) {
    u64 stride = u64(gridDim.x) * blockDim.x;
    for (u64 at = u64(blockIdx.x) * blockDim.x + threadIdx.x; at < p.length; at += stride) {
        store(static_cast<T*>(p.data), at, __fmaf_rn(normal_at(p.seed, at), p.deviation, p.mean));
    }
}

extern "C" __global__ void __launch_bounds__(256) fill_f32(const __grid_constant__ FillParams p) { fill<float>(p); }
extern "C" __global__ void __launch_bounds__(256) fill_bf16(const __grid_constant__ FillParams p) { fill<bf16>(p); }
extern "C" __global__ void __launch_bounds__(256) fill_e4m3(const __grid_constant__ FillParams p) { fill<u8>(p); }
