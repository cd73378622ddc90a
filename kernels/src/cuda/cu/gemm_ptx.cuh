// Hopper's copy engine, barriers in shared memory and warpgroup products, in names. Owned by gemm.cu.
#pragma once
#include "common.cuh"

struct alignas(64) TensorMap {
    u64 words[16];
};

// A position in the ring of stages: `phase` flips on each round.
struct Ring {
    u32 stage = 0, phase = 0;
    __device__ __forceinline__ void advance(u32 stages) {
        if (++stage == stages) {
            stage = 0;
            phase ^= 1;
        }
    }
};

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// `barrier` is an address of the cluster's shared memory (see `peer_address`). Orders what the copy engine and the
// tensor cores read before; for what threads wrote see `cluster_fence`.
__device__ __forceinline__ void barrier_arrive_peer(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// What the thread wrote is seen by whoever in the cluster sees its next arrival. Takes about half a microsecond.
__device__ __forceinline__ void cluster_fence() { asm volatile("fence.acq_rel.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1, 0x989680;\n"
        "@p bra done;\n"
        "bra again;\n"
        "done:\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// The same, for arrivals of threads of the cluster after a `cluster_fence`.
__device__ __forceinline__ void barrier_wait_cluster(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1, 0x989680;\n"
        "@p bra done;\n"
        "bra again;\n"
        "done:\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// The address in the cluster's shared memory of what lies at `address` in CTA `rank`.
__device__ __forceinline__ u32 peer_address(u32 address, u32 rank) {
    u32 peer;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(address), "r"(rank));
    return peer;
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Stores 16 bytes in the shared memory of a CTA of the cluster.
__device__ __forceinline__ void store_peer(u32 address, const float* v) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v[0]), "f"(v[1]), "f"(v[2]),
                 "f"(v[3])
                 : "memory");
}

__device__ __forceinline__ void load_shared(float (&v)[4], u32 address) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ float load_shared(u32 address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ void map_prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies the box at (x, y, z) into shared memory.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, u32 barrier, u32 x, u32 y, u32 z, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "l"(policy)
        : "memory");
}

// The same into the same place of every CTA in `mask`, each of whose barriers counts it.
__device__ __forceinline__ void copy_box_to(u16 mask, u32 to, const TensorMap& map, u32 barrier, u32 x, u32 y, u32 z,
                                            u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
        ".L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6, %7;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(mask), "l"(policy)
        : "memory");
}

__device__ __forceinline__ void copy_box_2d(u32 to, const TensorMap& map, u32 barrier, u32 x, u32 y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
            "r"(to),
        "l"(&map), "r"(barrier), "r"(x), "r"(y)
        : "memory");
}

// A warpgroup's operand in shared memory: rows of 128 bytes in the copy engine's 128-byte swizzle, eight rows a KiB.
__device__ __forceinline__ u64 operand(u32 address) {
    return u64((address & 0x3ffff) >> 4) | u64(1) << 16 | u64(64) << 32 | u64(1) << 62;
}

__device__ __forceinline__ void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING committed groups of products are unfinished.
template <int PENDING> __device__ __forceinline__ void product_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Ties registers to this point, so that the compiler moves none of their uses across a wait.
template <int COUNT> __device__ __forceinline__ void product_fence(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define FLOATS_8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FLOATS_16(d, i) FLOATS_8(d, i), FLOATS_8(d, i + 8)
#define FLOATS_32(d) FLOATS_16(d, 0), FLOATS_16(d, 16)
#define FLOATS_64(d) FLOATS_32(d), FLOATS_16(d, 32), FLOATS_16(d, 48)
#define NAMES_32                                                                                                \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
    "%29,%30,%31}"
#define NAMES_64                                                                                                \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
    "%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55," \
    "%56,%57,%58,%59,%60,%61,%62,%63}"
#define PRODUCT(shape, names, first, second, third, signs)                       \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " third ", 0;\n"                           \
    "wgmma.mma_async.sync.aligned." shape " " names ", " first ", " second ", p, " signs ";\n}"

// d (+)= a b^T over 32 bytes of K: 64 rows of a, 2 * COUNT rows of b. `add` false forgets what d held.
template <bool E4M3, int COUNT>
__device__ __forceinline__ void product(float (&d)[COUNT], u64 a, u64 b, bool add) {
    static_assert(COUNT == 64 || COUNT == 32, "columns of a tile");
    if constexpr (COUNT == 64 && E4M3) {
        asm volatile(PRODUCT("m64n128k32.f32.e4m3.e4m3", NAMES_64, "%64", "%65", "%66", "1, 1")
                     : FLOATS_64(d)
                     : "l"(a), "l"(b), "r"(u32(add)));
    } else if constexpr (COUNT == 64) {
        asm volatile(PRODUCT("m64n128k16.f32.bf16.bf16", NAMES_64, "%64", "%65", "%66", "1, 1, 0, 0")
                     : FLOATS_64(d)
                     : "l"(a), "l"(b), "r"(u32(add)));
    } else if constexpr (E4M3) {
        asm volatile(PRODUCT("m64n64k32.f32.e4m3.e4m3", NAMES_32, "%32", "%33", "%34", "1, 1")
                     : FLOATS_32(d)
                     : "l"(a), "l"(b), "r"(u32(add)));
    } else {
        asm volatile(PRODUCT("m64n64k16.f32.bf16.bf16", NAMES_32, "%32", "%33", "%34", "1, 1, 0, 0")
                     : FLOATS_32(d)
                     : "l"(a), "l"(b), "r"(u32(add)));
    }
}
