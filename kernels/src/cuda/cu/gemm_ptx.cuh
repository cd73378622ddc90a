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

// Stores 16 bytes at once; the compiler makes four stores of a `uint4`.
__device__ __forceinline__ void store_global(void* to, const u32 (&v)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
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

// Operands of a product in fours: a thread has four sums of every eight columns.
#define FOUR(d, i) "+f"(d[4 * i]), "+f"(d[4 * i + 1]), "+f"(d[4 * i + 2]), "+f"(d[4 * i + 3])
#define FOURS_1(d) FOUR(d, 0)
#define NAMES_1 "%0,%1,%2,%3"
#define FOURS_2(d) FOURS_1(d), FOUR(d, 1)
#define NAMES_2 NAMES_1 ",%4,%5,%6,%7"
#define FOURS_3(d) FOURS_2(d), FOUR(d, 2)
#define NAMES_3 NAMES_2 ",%8,%9,%10,%11"
#define FOURS_4(d) FOURS_3(d), FOUR(d, 3)
#define NAMES_4 NAMES_3 ",%12,%13,%14,%15"
#define FOURS_5(d) FOURS_4(d), FOUR(d, 4)
#define NAMES_5 NAMES_4 ",%16,%17,%18,%19"
#define FOURS_6(d) FOURS_5(d), FOUR(d, 5)
#define NAMES_6 NAMES_5 ",%20,%21,%22,%23"
#define FOURS_7(d) FOURS_6(d), FOUR(d, 6)
#define NAMES_7 NAMES_6 ",%24,%25,%26,%27"
#define FOURS_8(d) FOURS_7(d), FOUR(d, 7)
#define NAMES_8 NAMES_7 ",%28,%29,%30,%31"
#define FOURS_9(d) FOURS_8(d), FOUR(d, 8)
#define NAMES_9 NAMES_8 ",%32,%33,%34,%35"
#define FOURS_10(d) FOURS_9(d), FOUR(d, 9)
#define NAMES_10 NAMES_9 ",%36,%37,%38,%39"
#define FOURS_11(d) FOURS_10(d), FOUR(d, 10)
#define NAMES_11 NAMES_10 ",%40,%41,%42,%43"
#define FOURS_12(d) FOURS_11(d), FOUR(d, 11)
#define NAMES_12 NAMES_11 ",%44,%45,%46,%47"
#define FOURS_13(d) FOURS_12(d), FOUR(d, 12)
#define NAMES_13 NAMES_12 ",%48,%49,%50,%51"
#define FOURS_14(d) FOURS_13(d), FOUR(d, 13)
#define NAMES_14 NAMES_13 ",%52,%53,%54,%55"
#define FOURS_15(d) FOURS_14(d), FOUR(d, 14)
#define NAMES_15 NAMES_14 ",%56,%57,%58,%59"
#define FOURS_16(d) FOURS_15(d), FOUR(d, 15)
#define NAMES_16 NAMES_15 ",%60,%61,%62,%63"
#define FOURS_17(d) FOURS_16(d), FOUR(d, 16)
#define NAMES_17 NAMES_16 ",%64,%65,%66,%67"
#define FOURS_18(d) FOURS_17(d), FOUR(d, 17)
#define NAMES_18 NAMES_17 ",%68,%69,%70,%71"
#define FOURS_19(d) FOURS_18(d), FOUR(d, 18)
#define NAMES_19 NAMES_18 ",%72,%73,%74,%75"
#define FOURS_20(d) FOURS_19(d), FOUR(d, 19)
#define NAMES_20 NAMES_19 ",%76,%77,%78,%79"
#define FOURS_21(d) FOURS_20(d), FOUR(d, 20)
#define NAMES_21 NAMES_20 ",%80,%81,%82,%83"
#define FOURS_22(d) FOURS_21(d), FOUR(d, 21)
#define NAMES_22 NAMES_21 ",%84,%85,%86,%87"
#define FOURS_23(d) FOURS_22(d), FOUR(d, 22)
#define NAMES_23 NAMES_22 ",%88,%89,%90,%91"
#define FOURS_24(d) FOURS_23(d), FOUR(d, 23)
#define NAMES_24 NAMES_23 ",%92,%93,%94,%95"
#define PRODUCT(fours, type, signs, first, second, third)                                                     \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " third ", 0;\n"                                               \
                 "wgmma.mma_async.sync.aligned." type " {" NAMES_##fours "}, " first ", " second ", p, " signs ";\n}" \
                 : FOURS_##fours(d)                                                                              \
                 : "l"(a), "l"(b), "r"(u32(add)))
// Columns, fours of them, and the names of the operands after their sums.
#define PRODUCT_CASE(columns, fours, first, second, third)                                                             \
    if constexpr (COUNT == 4 * fours && E4M3) {                                                                        \
        PRODUCT(fours, "m64n" #columns "k32.f32.e4m3.e4m3", "1, 1", first, second, third);                         \
    } else if constexpr (COUNT == 4 * fours) {                                                                         \
        PRODUCT(fours, "m64n" #columns "k16.f32.bf16.bf16", "1, 1, 0, 0", first, second, third);                   \
    }

// d (+)= a b^T over 32 bytes of K: 64 rows of a, 2 * COUNT rows of b. `add` false forgets what d held.
template <bool E4M3, int COUNT>
__device__ __forceinline__ void product(float (&d)[COUNT], u64 a, u64 b, bool add) {
    static_assert(COUNT % 8 == 0 || COUNT == 20 || COUNT == 28 || COUNT == 36, "columns of a tile");
    PRODUCT_CASE(16, 2, "%8", "%9", "%10")
    PRODUCT_CASE(32, 4, "%16", "%17", "%18")
    PRODUCT_CASE(40, 5, "%20", "%21", "%22")
    PRODUCT_CASE(48, 6, "%24", "%25", "%26")
    PRODUCT_CASE(56, 7, "%28", "%29", "%30")
    PRODUCT_CASE(64, 8, "%32", "%33", "%34")
    PRODUCT_CASE(72, 9, "%36", "%37", "%38")
    PRODUCT_CASE(80, 10, "%40", "%41", "%42")
    PRODUCT_CASE(96, 12, "%48", "%49", "%50")
    PRODUCT_CASE(112, 14, "%56", "%57", "%58")
    PRODUCT_CASE(128, 16, "%64", "%65", "%66")
    PRODUCT_CASE(144, 18, "%72", "%73", "%74")
    PRODUCT_CASE(160, 20, "%80", "%81", "%82")
    PRODUCT_CASE(192, 24, "%96", "%97", "%98")
}
