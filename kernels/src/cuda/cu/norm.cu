// RMS norms of whole rows, with the sum before them and the quantisation behind them, and the embedding.
//
// One block computes one row and holds it in registers; which elements a thread adds up depends on the width only.
#include "rows.cuh"

struct NormParams {
    // Residual stream f32 [rows][width]; null: the rows of `x` alone are normalised.
    float* residual;
    // bf16, `x_stride` elements from row to row; null: nothing is added.
    const bf16* x;
    // Row of input for each row of output, NONE: zeros; null: the same row.
    const u32* rows;
    const float* gamma;
    // Outputs, each may be null: bf16 [rows][width], codes [rows][width], scales [blocks of 128][scale_stride].
    bf16* y;
    u8* codes;
    float* scales;
    u64 x_stride;
    u32 width;
    u32 scale_stride;
    // The sum is written back.
    u32 store_residual;
    float eps;
};

template <int PIECES, bool WIDE>
__device__ __forceinline__ void norm(const NormParams& p) {
    __shared__ float parts[16];
    u32 width = p.width, out = blockIdx.x;
    Eight gamma[PIECES], sum[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        gamma[i] = load_eight<WIDE>(p.gamma, 8 * (threadIdx.x + i * blockDim.x), width);
    }
    wait_for_previous();
    let_next_start();
    u32 row = p.rows ? p.rows[out] : out;
    bool idle = row == NONE;
    float* residual = p.residual + u64(row) * width;
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        u32 column = 8 * (threadIdx.x + i * blockDim.x);
        sum[i] = {};
        if (p.residual && !idle) sum[i] = load_eight<WIDE>(residual, column, width);
        if (p.x && !idle) {
            Eight x = load_eight<WIDE>(p.x + row * p.x_stride, column, width);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[i].at[j] += x.at[j];
        }
    }
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        u32 column = 8 * (threadIdx.x + i * blockDim.x);
        if (p.store_residual && !idle) store_eight<WIDE>(residual, column, width, sum[i]);
#pragma unroll
        for (int j = 0; j < 8; j++) squares = fmaf(sum[i].at[j], sum[i].at[j], squares);
    }
    float scale = 1.0f / sqrtf(block_sum(squares, parts) / float(width) + p.eps);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        u32 column = 8 * (threadIdx.x + i * blockDim.x);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[i].at[j] = sum[i].at[j] * scale * gamma[i].at[j];
        if (p.y) store_eight<WIDE>(p.y + u64(out) * width, column, width, sum[i]);
        if (p.codes) {
            float* at = p.scales + u64(column / 128) * p.scale_stride + out;
            store_fp8<WIDE>(p.codes + u64(out) * width, at, column, width, sum[i]);
        }
    }
}

#define NORM(PIECES, NAME, WIDE)                                                                         \
    extern "C" __global__ void __launch_bounds__(512) NAME(const __grid_constant__ NormParams p) { \
        norm<PIECES, WIDE>(p);                                                                           \
    }
NORM(1, norm_wide_1, true)
NORM(2, norm_wide_2, true)
NORM(4, norm_wide_4, true)
NORM(1, norm_narrow_1, false)
NORM(2, norm_narrow_2, false)
NORM(4, norm_narrow_4, false)

struct EmbedParams {
    // bf16 [vocab][width].
    const bf16* table;
    const u32* tokens;
    const u32* positions;
    // f32 [rows][width].
    float* residual;
    u32 vocab;
    u32 width;
};

// A row of zeros for idle rows and for tokens that are none.
template <bool WIDE>
__device__ __forceinline__ void embed(const EmbedParams& p) {
    wait_for_previous();
    let_next_start();
    u32 row = blockIdx.x, token = p.tokens[row];
    bool some = p.positions[row] != IDLE && token < p.vocab;
    const bf16* from = p.table + u64(some ? token : 0) * p.width;
    for (u32 column = 8 * threadIdx.x; column < p.width; column += 8 * blockDim.x) {
        Eight x = {};
        if (some) x = load_eight<WIDE>(from, column, p.width);
        store_eight<WIDE>(p.residual + u64(row) * p.width, column, p.width, x);
    }
}

extern "C" __global__ void __launch_bounds__(512) embed_wide(const __grid_constant__ EmbedParams p) { embed<true>(p); }
extern "C" __global__ void __launch_bounds__(512) embed_narrow(const __grid_constant__ EmbedParams p) {
    embed<false>(p);
}
