// Hopper in names, for mla.cu: barriers in shared memory, the copy engine, warpgroup products.
#pragma once

// 64 rows of 64 columns of bf16, 128-byte swizzled.
constexpr u32 BLOCK_BYTES = 64 * 128;

struct alignas(64) TensorMap {
    u64 words[16];
};

__device__ __forceinline__ void barrier_init(u32 at, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count));
}

__device__ __forceinline__ void barrier_expect(u32 at, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 at, u32 parity) {
    asm volatile(
        "{ .reg .pred done;\n"
        "AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra END;\n"
        "bra AGAIN;\n"
        "END: }" ::"r"(at), "r"(parity)
        : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 at) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}

// `at` is an address in the shared memory of some block of the cluster, as `peer_address` gives.
__device__ __forceinline__ void barrier_arrive_peer(u32 at) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(at) : "memory");
}

__device__ __forceinline__ u32 peer_address(u32 at, u32 rank) {
    u32 peer;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(at), "r"(rank));
    return peer;
}

__device__ __forceinline__ float load_shared(u32 at) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(at) : "memory");
    return x;
}

__device__ __forceinline__ void store_shared(u32 at, float x) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(x) : "memory");
}

template <int ID>
__device__ __forceinline__ void named_arrive() {
    asm volatile("bar.arrive %0, 256;" ::"n"(ID) : "memory");
}

template <int ID>
__device__ __forceinline__ void named_sync() {
    asm volatile("bar.sync %0, 256;" ::"n"(ID) : "memory");
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void load_block(const TensorMap* map, u32 to, u32 barrier, u32 column, u32 row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            to),
        "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

// Into the second-level cache.
__device__ __forceinline__ void prefetch_block(const TensorMap* map, u32 column, u32 row) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(column), "r"(row) : "memory");
}

// Into every block of the cluster.
__device__ __forceinline__ void load_block_all(const TensorMap* map, u32 to, u32 barrier, u32 column, u32 row) {
#if CLUSTER == 1
    load_block(map, to, barrier, column, row);
#else
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(u16((1 << CLUSTER) - 1))
        : "memory");
#endif
}

// Descriptor of a 128-byte swizzled operand whose rows run along K: its low half, to which offsets over 16 may be added.
// In a cluster, addresses hold the rank in high bits, which do not belong here.
__device__ __forceinline__ u32 rows_operand(u32 at) { return (at & 0x3ffff) >> 4 | 1u << 16; }

// The same memory with rows of 64 columns as N: blocks of 64 columns follow each other.
__device__ __forceinline__ u32 columns_operand(u32 at) { return (at & 0x3ffff) >> 4 | BLOCK_BYTES >> 4 << 16; }

__device__ __forceinline__ u64 operand(u32 low, u32 offset) { return u64(0x40000040) << 32 | (low + (offset >> 4)); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT_OPEN>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT_OPEN) : "memory");
}

// Keeps uses of accumulators behind the wait before it.
template <int N>
__device__ __forceinline__ void settle(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}

#define F8(x, i) \
    "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), \
        "+f"(x[i + 7])
#define F32(x, i) F8(x, i), F8(x, i + 8), F8(x, i + 16), F8(x, i + 24)
#define OUT_REGISTERS                                                                                              \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "   \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "    \
    "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, "    \
    "%65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, "    \
    "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, "   \
    "%106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
    "%124, %125, %126, %127}, "

// s += q . k for 16 columns: 64 heads x 64 positions.
__device__ __forceinline__ void score_step(float (&s)[32], u64 q, u64 k, bool more) {
    asm volatile(
        "{ .reg .pred more; setp.ne.b32 more, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
        "%23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, more, 1, 1, 0, 0; }"
        : F32(s, 0)
        : "l"(q), "l"(k), "r"(u32(more)));
}

// o += p v for 16 positions: 64 heads x 256 columns, p from registers.
__device__ __forceinline__ void value_step(float (&o)[128], const u32* p, u64 v) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " OUT_REGISTERS
                 "{%128, %129, %130, %131}, %132, 1, 1, 1, 1;"
                 : F32(o, 0), F32(o, 32), F32(o, 64), F32(o, 96)
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));
}

// The same with p from shared memory.
__device__ __forceinline__ void value_step(float (&o)[128], u64 p, u64 v) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " OUT_REGISTERS "%128, %129, 1, 1, 1, 0, 1;"
                 : F32(o, 0), F32(o, 32), F32(o, 64), F32(o, 96)
                 : "l"(p), "l"(v));
}
