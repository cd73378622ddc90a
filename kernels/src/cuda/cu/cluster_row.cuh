// Eight blocks that work on one row, a cluster: who holds what, and sums over all of them.
//
// Each of the 128 warps owns a segment of neighbouring elements, each lane a chunk of neighbours in it.
#pragma once
#include "common.cuh"

constexpr u32 BLOCKS = 8, WARPS = 16, SEGMENTS = BLOCKS * WARPS;
// Numbers that warps tell each other at once.
constexpr u32 ITEMS = 8;
// Weights that a warp sets aside when few are left of a search.
constexpr u32 LIST = 128;

typedef u64 Slots[ITEMS][SEGMENTS];

// What a lane knows of its row.
struct Lane {
    // Its chunk, and the token at its start.
    float* x;
    u32 chunk;
    u32 first;
    // Its warp's place among the segments, and its own in the warp.
    u32 segment;
    u32 lane;
    // Two sets of numbers of every warp, used in turn.
    Slots* slots;
    u32 turn;
    // The warp's list.
    u32* list;
};

__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void tell(u64* slot, u32 block, u64 number) {
    u32 to;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(slot)), "r"(block));
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(to), "l"(number) : "memory");
}

// Tells all warps of the cluster a number of this one. What all told is good until the call after the next.
__device__ __forceinline__ const u64* share(Lane& l, u64 mine) {
    u64* numbers = l.slots[l.turn++ & 1][0];
    if (l.lane < BLOCKS) tell(numbers + l.segment, l.lane, mine);
    cluster_barrier();
    return numbers;
}

__device__ __forceinline__ u64 bits_of(double x) { return __double_as_longlong(x); }
__device__ __forceinline__ double double_of(u64 bits) { return __longlong_as_double(bits); }

__device__ __forceinline__ double sum_of_lanes(double x) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

__device__ __forceinline__ u64 max_of_lanes(u64 x) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) {
        u64 other = __shfl_xor_sync(0xffffffffu, x, step);
        x = other > x ? other : x;
    }
    return x;
}

__device__ __forceinline__ double row_sum(Lane& l, double x) {
    const u64* numbers = share(l, bits_of(sum_of_lanes(x)));
    double sum = 0.0;
#pragma unroll
    for (u32 j = 0; j < SEGMENTS; j += 32) sum += double_of(numbers[l.lane + j]);
    return sum_of_lanes(sum);
}

__device__ __forceinline__ u64 row_max(Lane& l, u64 key) {
    const u64* numbers = share(l, max_of_lanes(key));
    key = 0;
#pragma unroll
    for (u32 j = 0; j < SEGMENTS; j += 32) key = numbers[l.lane + j] > key ? numbers[l.lane + j] : key;
    return max_of_lanes(key);
}

// Sums of eight numbers over the lanes: lane i has that of number i / 4.
__device__ __forceinline__ double sum_eight(double (&x)[ITEMS], u32 lane) {
#pragma unroll
    for (int half = 4, step = 16; half > 0; half /= 2, step /= 2) {
        bool upper = lane & step;
#pragma unroll
        for (int i = 0; i < half; i++) {
            double other = __shfl_xor_sync(0xffffffffu, upper ? x[i] : x[i + half], step);
            x[i] = (upper ? x[i + half] : x[i]) + other;
        }
    }
    x[0] += __shfl_xor_sync(0xffffffffu, x[0], 2);
    return x[0] + __shfl_xor_sync(0xffffffffu, x[0], 1);
}

// Sums of eight numbers over the row.
__device__ __forceinline__ void row_sums(Lane& l, double (&x)[ITEMS]) {
    Slots& numbers = l.slots[l.turn++ & 1];
    u64 mine = bits_of(sum_eight(x, l.lane));
    tell(&numbers[l.lane / 4][l.segment], l.lane % 4 * 2, mine);
    tell(&numbers[l.lane / 4][l.segment], l.lane % 4 * 2 + 1, mine);
    cluster_barrier();
#pragma unroll
    for (u32 i = 0; i < ITEMS; i++) {
        x[i] = 0.0;
#pragma unroll
        for (u32 j = 0; j < SEGMENTS; j += 32) x[i] += double_of(numbers[i][l.lane + j]);
    }
    double sum = sum_eight(x, l.lane);
#pragma unroll
    for (u32 i = 0; i < ITEMS; i++) x[i] = __shfl_sync(0xffffffffu, sum, 4 * i);
}

// Inclusive sums over the lanes.
__device__ __forceinline__ double scan_lanes(double x, u32 lane) {
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        double other = __shfl_up_sync(0xffffffffu, x, step);
        if (lane >= step) x += other;
    }
    return x;
}
