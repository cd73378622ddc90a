// FP8 scales of gemm.cu: one of a row of x and one of 128 rows of weights for each 128 of K. Stands between
// gemm_tiles.cuh and gemm.cu.

// The scales of a row of blocks of weights. A lane holds one of 32; the next 32 are on their way.
struct WeightScales {
    const float* scales;
    u32 blocks, batch;
    float now, next;

    __device__ __forceinline__ WeightScales(const float* scales, u32 blocks, u32 first, u32 lane)
        : scales(scales), blocks(blocks), batch(first / 32 * 32) {
        now = fetch(batch + lane);
        next = fetch(batch + 32 + lane);
    }

    __device__ __forceinline__ float fetch(u32 block) { return block < blocks ? __ldg(scales + block) : 0.0f; }

    // Steps must come in order.
    __device__ __forceinline__ float at(u32 step, u32 lane) {
        if (step - batch == 32) {
            batch = step;
            now = next;
            next = fetch(batch + 32 + lane);
        }
        return __shfl_sync(0xffffffffu, now, step - batch);
    }
};

// The scales of a step for a thread's two rows: upper and lower, in the first block of columns and in the second.
struct Scales {
    float upper[2], lower[2];
};

// sum += product. From four `second` on, columns lie in the second block.
template <u32 COUNT>
__device__ __forceinline__ void add_scaled(float (&sum)[COUNT], const float (&product)[COUNT], const Scales& scales,
                                           u32 second) {
#pragma unroll
    for (u32 i = 0; i < COUNT; i += 4) {
        bool first = i / 4 < second;
        float upper = first ? scales.upper[0] : scales.upper[1], lower = first ? scales.lower[0] : scales.lower[1];
        sum[i] = fmaf(product[i], upper, sum[i]);
        sum[i + 1] = fmaf(product[i + 1], upper, sum[i + 1]);
        sum[i + 2] = fmaf(product[i + 2], lower, sum[i + 2]);
        sum[i + 3] = fmaf(product[i + 3], lower, sum[i + 3]);
    }
}

// The same, where `second` is a multiple of EACH from EACH to 16: for each of those there is code without choices.
template <u32 EACH, u32 COUNT>
__device__ __forceinline__ void add_scaled_by_case(float (&sum)[COUNT], const float (&product)[COUNT],
                                                   const Scales& scales, u32 second) {
#pragma unroll
    for (u32 at = EACH; at <= 16; at += EACH) {
        if (second == at) add_scaled(sum, product, scales, at);
    }
}

