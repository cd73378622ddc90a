// Eight blocks that work on one row, a cluster: who holds what, and sums over all of them.
//
// Each of the 128 warps owns a segment of neighbouring elements, each lane a chunk of neighbours in it.
#pragma once
#include "common.cuh"

constexpr u32 BLOCKS = 8, WARPS = 16, SEGMENTS = BLOCKS * WARPS;
// Sums that are taken at once.
constexpr u32 ITEMS = 8;
// Weights that a warp sets aside when few are left of a search.
constexpr u32 LIST = 256;

// What the warps of the cluster told this block: two sets, used in turn, and sums of them.
struct Told {
    u64 numbers[2][SEGMENTS];
    float items[2][ITEMS][SEGMENTS];
    double sums[ITEMS];
    // Barriers that complete when all of a set has arrived. They are much faster than barriers of the cluster, whose
    // release waits for all memory of the device.
    u64 arrived[2];
};

// What a lane knows of its row.
struct Lane {
    // Its chunk, and the element at its start.
    float* x;
    u32 chunk;
    u32 first;
    // Its warp's place among the segments, and its own in the warp.
    u32 segment;
    u32 lane;
    Told* told;
    u32 turn;
    // The warp's list.
    u32* list;
};

// First of all: makes the barriers. `meet` lies between this and the first exchange.
__device__ __forceinline__ void prepare(Told& told) {
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&told.arrived[i])) : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// Waits until all blocks of the cluster have begun.
__device__ __forceinline__ void meet() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The address of what lies here in another block of the cluster.
__device__ __forceinline__ u32 address_in(u32 block, const void* here) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(here)), "r"(block));
    return there;
}

// Waits until `bytes` from all warps of the cluster lie in the set of this turn. What lies there is good until the turn
// after the next: a warp that gets so far has heard from all others that they are done with it.
__device__ __forceinline__ void end_turn(Lane& l, u32 bytes) {
    u32 barrier = shared_address(&l.told->arrived[l.turn & 1]), parity = l.turn / 2 & 1;
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    }
    asm volatile("{\n.reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n}" ::"r"(barrier), "r"(parity)
                 : "memory");
    l.turn++;
}

// Tells all warps of the cluster a number of this one.
__device__ __forceinline__ const u64* share(Lane& l, u64 mine) {
    u32 set = l.turn & 1;
    u64* numbers = l.told->numbers[set];
    if (l.lane < BLOCKS) {
        u32 to = address_in(l.lane, numbers + l.segment), barrier = address_in(l.lane, &l.told->arrived[set]);
        asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u64 [%0], %1, [%2];" ::"r"(to), "l"(mine),
                     "r"(barrier)
                     : "memory");
    }
    end_turn(l, SEGMENTS * sizeof(u64));
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
__device__ __forceinline__ float sum_eight(float (&x)[ITEMS], u32 lane) {
#pragma unroll
    for (int half = 4, step = 16; half > 0; half /= 2, step /= 2) {
        bool upper = lane & step;
#pragma unroll
        for (int i = 0; i < half; i++) {
            float other = __shfl_xor_sync(0xffffffffu, upper ? x[i] : x[i + half], step);
            x[i] = (upper ? x[i + half] : x[i]) + other;
        }
    }
    x[0] += __shfl_xor_sync(0xffffffffu, x[0], 2);
    return x[0] + __shfl_xor_sync(0xffffffffu, x[0], 1);
}

// Sums of eight numbers over the row, good until the next call.
__device__ __forceinline__ const double* row_sums(Lane& l, float (&x)[ITEMS]) {
    u32 set = l.turn & 1;
    float(*items)[SEGMENTS] = l.told->items[set];
    float mine = sum_eight(x, l.lane);
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        u32 block = l.lane % 4 * 2 + i, to = address_in(block, &items[l.lane / 4][l.segment]);
        asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(mine),
                     "r"(address_in(block, &l.told->arrived[set]))
                     : "memory");
    }
    end_turn(l, ITEMS * SEGMENTS * sizeof(float));
    u32 item = l.segment % WARPS;
    if (item < ITEMS) {
        float4 part = *reinterpret_cast<const float4*>(&items[item][4 * l.lane]);
        double sum = sum_of_lanes((double(part.x) + double(part.y)) + (double(part.z) + double(part.w)));
        if (l.lane == 0) l.told->sums[item] = sum;
    }
    __syncthreads();
    return l.told->sums;
}

// Inclusive sums over the lanes.
template <class T>
__device__ __forceinline__ T scan_lanes(T x, u32 lane) {
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        T other = __shfl_up_sync(0xffffffffu, x, step);
        if (lane >= step) x += other;
    }
    return x;
}
