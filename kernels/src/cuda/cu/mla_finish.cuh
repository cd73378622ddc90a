// What mla.cu does when an item is done: chunks of a row are added up, and the sum is written.
#pragma once

// Lanes of a quad hold two columns each of four groups of eight: afterwards each holds one group.
__device__ __forceinline__ void transpose_quad(u32 (&v)[4], u32 lane) {
    bool odd = lane & 1, high = lane & 2;
    u32 a = __shfl_xor_sync(0xffffffffu, odd ? v[0] : v[1], 1), b = __shfl_xor_sync(0xffffffffu, odd ? v[2] : v[3], 1);
    (odd ? v[0] : v[1]) = a, (odd ? v[2] : v[3]) = b;
    a = __shfl_xor_sync(0xffffffffu, high ? v[0] : v[2], 2), b = __shfl_xor_sync(0xffffffffu, high ? v[1] : v[3], 2);
    (high ? v[0] : v[2]) = a, (high ? v[1] : v[3]) = b;
}

// Adds what another block has found for the same heads, relative to a maximum and sum of its own.
__device__ __forceinline__ void add(const float4* from, float (&o)[128], Softmax& soft) {
    constexpr int BATCH = 8;
    float4 stats = __ldcg(from + 32 * 128);
    Row max = {fmaxf(soft.max.upper, stats.x), fmaxf(soft.max.lower, stats.y)};
    Row own = {exp2_fast(soft.max.upper - max.upper), exp2_fast(soft.max.lower - max.lower)};
    Row other = {exp2_fast(stats.x - max.upper), exp2_fast(stats.y - max.lower)};
    // Rounded after the product and after the sum: the same whichever side does it.
    auto sum = [](float x, float y, float other) { return __fadd_rn(x, __fmul_rn(y, other)); };
    rescale(o, own.upper, own.lower);
    settle(o);
    soft.max = max;
    soft.sum = {sum(__fmul_rn(soft.sum.upper, own.upper), stats.z, other.upper),
                sum(__fmul_rn(soft.sum.lower, own.lower), stats.w, other.lower)};
#pragma unroll
    for (int i = 0; i < 32; i += BATCH) {
        float4 x[BATCH];
        // Not all loads at once: there are not so many registers.
        __syncwarp();
#pragma unroll
        for (int j = 0; j < BATCH; j++) x[j] = __ldcg(from + (i + j) * 128);
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            float* to = o + (i + j) * 4;
            to[0] = sum(to[0], x[j].x, other.upper), to[1] = sum(to[1], x[j].y, other.upper);
            to[2] = sum(to[2], x[j].z, other.lower), to[3] = sum(to[3], x[j].w, other.lower);
        }
    }
}

__device__ __forceinline__ void leave(float4* to, const float (&o)[128], const Softmax& soft) {
#pragma unroll
    for (int i = 0; i < 32; i++) to[i * 128] = make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]);
    to[32 * 128] = make_float4(soft.max.upper, soft.max.lower, soft.sum.upper, soft.sum.lower);
    __threadfence();
}

// What a thread of this warpgroup found, told to all of them.
template <int HALF>
__device__ __forceinline__ u32 tell(const Place& at, u32 value) {
    u32 word = at.base + OFFSET_BARRIERS + 14 * 8 + HALF * 4;
    if (at.thread == 0) store_shared(word, __uint_as_float(value));
    asm volatile("bar.sync %0, 128;" ::"n"(OWN + HALF) : "memory");
    value = __float_as_uint(load_shared(word));
    asm volatile("bar.sync %0, 128;" ::"n"(OWN + HALF) : "memory");
    return value;
}

// Adds the chunks of a row up along a binary tree. Whoever comes second to a node adds the first's output to its own
// and goes on; returns whether this one holds the sum of all. Sums are the same whoever comes first.
template <int HALF>
__device__ __forceinline__ bool climb(const Params& p, const Item& item, u32 block, const Place& at, float (&o)[128], Softmax& soft) {
    u32 chunk = (item.tail >> 8) % 256, chunks = item.tail >> 16, blocks = (p.heads + 63) / 64;
    u64 row = u64(item.row - p.row0) * p.chunks_max;
    for (u32 level = 0; (1u << level) < chunks; level++) {
        // Subtrees go by their first chunk, nodes by that of their right side.
        u32 own = chunk >> level << level, sibling = own ^ (1u << level);
        if (sibling >= chunks) continue;
        auto place = [&](u32 of) { return ((row + of) * blocks + block) * 2 + HALF; };
        auto partial = [&](u32 of) { return reinterpret_cast<float4*>(p.partial) + place(of) * (33 * 128) + at.thread; };
        u32* arrived = p.arrived + place(max(own, sibling));
        u32 before = 0;
        if (at.thread == 0) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(before) : "l"(arrived) : "memory");
        if (tell<HALF>(at, before) == 0) {
            leave(partial(own), o, soft);
            asm volatile("bar.sync %0, 128;" ::"n"(OWN + HALF) : "memory");
            if (at.thread == 0) {
                asm volatile("atom.acq_rel.gpu.global.exch.b32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
            }
            if (tell<HALF>(at, before) == 0) return false;
        }
        if (at.thread == 0) *arrived = 0;
        add(partial(sibling), o, soft);
    }
    return true;
}

template <int HALF>
__device__ __forceinline__ void finish(
    const Params& p, const Item& item, u32 block, const Place& at, u32 parity, float (&o)[128], Softmax soft) {
    soft.sum = {quad_sum(soft.sum.upper), quad_sum(soft.sum.lower)};
    at.write(4 + parity * 2 + HALF, soft.sum);
    named_sync<SUMS>();
    Row left = at.read(4 + parity * 2), right = at.read(5 + parity * 2);
    soft.sum = {left.upper + right.upper, left.lower + right.lower};
    if (item.tail >> 16 > 1 && !climb<HALF>(p, item, block, at, o, soft)) return;
    Row share = {1.0f / soft.sum.upper, 1.0f / soft.sum.lower};
    u32 lane = at.thread % 32, head = block * 64 + at.row();
    bf16* out = p.out + (u64(item.row) * p.heads + head) * LATENT + HALF * 256 + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        u32 a[4], b[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float* x = o + i * 16 + j * 4;
            a[j] = pack_bf16(x[0] * share.upper, x[1] * share.upper);
            b[j] = pack_bf16(x[2] * share.lower, x[3] * share.lower);
        }
        transpose_quad(a, lane);
        transpose_quad(b, lane);
        if (head < p.heads) *reinterpret_cast<uint4*>(out + i * 32) = make_uint4(a[0], a[1], a[2], a[3]);
        if (head + 8 < p.heads) {
            *reinterpret_cast<uint4*>(out + 8 * LATENT + i * 32) = make_uint4(b[0], b[1], b[2], b[3]);
        }
    }
}
