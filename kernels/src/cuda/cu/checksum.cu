// A checksum of some parts of device memory, as if they lay one after the other. A sum of numbers that each depend on one
// word and its place alone: it has no order, so grid and scheduling do not matter.
#include "common.cuh"

constexpr u32 PARTS_MAX = 4;

struct ChecksumParams {
    // Those that are not there have no words.
    const u32* part[PARTS_MAX];
    u64 words[PARTS_MAX];
    // Added to; zero at first.
    u64* sum;
};

// A permutation of the numbers of 64 bits in which every bit of x matters to every bit of the result.
__device__ __forceinline__ u64 mix(u64 x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

extern "C" __global__ void __launch_bounds__(256) checksum(const __grid_constant__ ChecksumParams p) {
    u64 stride = u64(gridDim.x) * blockDim.x;
    u64 sum = 0;
    u64 first = 0;
#pragma unroll
    for (u32 part = 0; part < PARTS_MAX; part++) {
#pragma unroll 8
        for (u64 at = u64(blockIdx.x) * blockDim.x + threadIdx.x; at < p.words[part]; at += stride) {
            sum += mix((first + at) << 32 | p.part[part][at]);
        }
        first += p.words[part];
    }
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 32 == 0) atomicAdd(p.sum, sum);
}
