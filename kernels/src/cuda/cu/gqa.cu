// Attention over a paged cache on mma.sync, for any shape: grouped-query attention, and absorbed latent attention with
// VALUES_IN_KEYS, where the first VALUE_DIM columns of a key are the value and there is one key head.
//
// A block does up to 16 query heads of one row that share a key head. Each of its warps takes 16 positions of every
// tile of 64, with a running maximum, sum and output of its own; they are added up at the end, in the warps' order.

constexpr u32 WARPS = 4, SLICE = PAGE / WARPS;
constexpr u32 KEY_COLUMNS = (KEY_DIM + 15) / 16 * 16, VALUE_COLUMNS = (VALUE_DIM + 15) / 16 * 16;
constexpr u32 HEADS_PER_KEY = HEADS / KV_HEADS, PARTS = (HEADS_PER_KEY + 15) / 16;
// An odd number of 16-byte units per row keeps eight rows in different banks.
constexpr u32 KEY_PITCH = KEY_COLUMNS * 2 + 16, VALUE_PITCH = VALUES_IN_KEYS ? KEY_PITCH : VALUE_COLUMNS * 2 + 16;
constexpr u32 KEYS_BYTES = SLICE * KEY_PITCH, STAGE_BYTES = KEYS_BYTES + (VALUES_IN_KEYS ? 0 : SLICE * VALUE_PITCH);
constexpr u32 QUERY_BYTES = 16 * KEY_PITCH;
// Of the sums in shared memory, likewise.
constexpr u32 SUM_PITCH = VALUE_COLUMNS + 8, SUMS_BYTES = WARPS * 16 * (SUM_PITCH + 2) * 4;
constexpr bool QUERY_STAYS = KEY_COLUMNS <= 128;
static_assert(KEY_DIM % 8 == 0 && VALUE_DIM % 8 == 0 && HEADS % KV_HEADS == 0, "shape");
static_assert(QUERY_BYTES + WARPS * STAGES * STAGE_BYTES <= SHARED_BYTES, "shared memory");
static_assert(QUERY_BYTES + SUMS_BYTES <= SHARED_BYTES, "shared memory of the sums");

struct Params {
    const bf16* query;
    const bf16* keys;
    const bf16* values;
    const Item* items;
    const u32* count;
    const u32* block_table;
    bf16* out;
    float* partial;
    float* log_sums;
    u32 blocks_max;
    u32 row0;
    u32 chunks_max;
    float scale_log2;
};

// 16 bytes, or zeros.
__device__ __forceinline__ void copy(u32 to, const bf16* from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}

__device__ __forceinline__ void load_four(u32 (&x)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(from)
                 : "memory");
}

__device__ __forceinline__ void load_four_transposed(u32 (&x)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(from)
                 : "memory");
}

// d += a b: 16 x 8 x 16.
__device__ __forceinline__ void multiply(float* d, const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// One warp's share of an item: its heads' outputs, not yet divided by the sum.
struct Sums {
    float o[VALUE_COLUMNS / 8][4];
    float max[2], sum[2];
};

// Where a warp's positions come from.
struct Slices {
    const bf16* keys;
    const bf16* values;
    const u32* table;
    u32 to;     // its stages in shared memory
    u32 tile, end;
    u32 valid;  // of the last tile's positions
    u32 first;  // of this warp in a tile
    u32 page;
    u32 lane;

    // Starts copying the next slice into `stage`; always closes a group, so that groups count slices.
    __device__ __forceinline__ void fetch(u32 stage) {
        if (tile < end) {
            u32 limit = tile + 1 == end ? valid : PAGE;
            u64 row0 = u64(page) * PAGE + first;
            u32 to = this->to + stage * STAGE_BYTES;
            copy_rows<KEY_DIM, KEY_PITCH>(to, keys, row0, limit);
            if (!VALUES_IN_KEYS) copy_rows<VALUE_DIM, VALUE_PITCH>(to + KEYS_BYTES, values, row0, limit);
            tile++;
            if (tile < end) page = table[tile];
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }

    template <u32 WIDTH, u32 PITCH>
    __device__ __forceinline__ void copy_rows(u32 to, const bf16* from, u64 row0, u32 limit) {
        constexpr u32 UNITS = WIDTH / 8;
#pragma unroll 8
        for (u32 i = lane; i < SLICE * UNITS; i += 32) {
            u32 row = i / UNITS, unit = i % UNITS;
            copy(to + row * PITCH + unit * 16, from + (row0 + row) * (KV_HEADS * WIDTH) + unit * 8, first + row < limit);
        }
    }
};

// Scores of 16 heads and 16 positions, times the values of these positions.
__device__ __forceinline__ void attend(
    Sums& sums, const u32 (&stays)[QUERY_STAYS ? KEY_COLUMNS / 16 : 1][4], u32 query, u32 keys, u32 values, u32 valid,
    float scale, u32 lane) {
    float s[2][4] = {};
    u32 key = keys + (lane / 16 * 8 + lane % 8) * KEY_PITCH + lane / 8 % 2 * 16;
#pragma unroll
    for (u32 i = 0; i < KEY_COLUMNS / 16; i++) {
        u32 a[4], b[4];
        if (QUERY_STAYS) {
#pragma unroll
            for (u32 j = 0; j < 4; j++) a[j] = stays[QUERY_STAYS ? i : 0][j];
        } else {
            load_four(a, query + i * 32);
        }
        load_four(b, key + i * 32);
        multiply(s[0], a, b[0], b[1]);
        multiply(s[1], a, b[2], b[3]);
    }
    if (valid < SLICE) {
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            if (i / 4 * 8 + lane % 4 * 2 + i % 2 >= valid) s[i / 4][i % 4] = NEGATIVE;
        }
    }
    float factor[2];
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        float tile = fmaxf(fmaxf(s[0][2 * half], s[0][2 * half + 1]), fmaxf(s[1][2 * half], s[1][2 * half + 1]));
        float max = fmaxf(sums.max[half], quad_max(tile) * scale);
        factor[half] = exp2_fast(sums.max[half] - max);
        sums.max[half] = max;
        float sum = 0.0f;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            float& x = s[i / 2][2 * half + i % 2];
            x = exp2_fast(fmaf(x, scale, -max));
            sum += x;
        }
        sums.sum[half] = fmaf(sums.sum[half], factor[half], sum);
    }
    // Multiplying by one changes nothing, so a warp that need not does not.
    if (__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (u32 i = 0; i < VALUE_COLUMNS / 8; i++) {
            sums.o[i][0] *= factor[0], sums.o[i][1] *= factor[0];
            sums.o[i][2] *= factor[1], sums.o[i][3] *= factor[1];
        }
    }
    u32 p[4] = {pack_bf16(s[0][0], s[0][1]), pack_bf16(s[0][2], s[0][3]), pack_bf16(s[1][0], s[1][1]),
                pack_bf16(s[1][2], s[1][3])};
    u32 value = values + lane % 16 * VALUE_PITCH + lane / 16 * 16;
#pragma unroll
    for (u32 i = 0; i < VALUE_COLUMNS / 16; i++) {
        u32 b[4];
        load_four_transposed(b, value + i * 32);
        multiply(sums.o[2 * i], p, b[0], b[1]);
        multiply(sums.o[2 * i + 1], p, b[2], b[3]);
    }
}

// Adds up the warps and writes the rows of this block's heads.
__device__ __forceinline__ void finish(const Params& p, const Item& item, u32 head0, u32 heads, Sums& sums, float* shared) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4;
    float* outputs = shared;                                        // [warp][16][SUM_PITCH]
    float* stats = shared + WARPS * 16 * SUM_PITCH;           // [warp][16] maxima, then sums
    float* own = outputs + (warp * 16 + row) * SUM_PITCH + lane % 4 * 2;
#pragma unroll
    for (u32 i = 0; i < VALUE_COLUMNS / 8; i++) {
        *reinterpret_cast<float2*>(own + i * 8) = make_float2(sums.o[i][0], sums.o[i][1]);
        *reinterpret_cast<float2*>(own + 8 * SUM_PITCH + i * 8) = make_float2(sums.o[i][2], sums.o[i][3]);
    }
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        float sum = quad_sum(sums.sum[half]);
        if (lane % 4 == 0) {
            stats[warp * 16 + row + half * 8] = sums.max[half];
            stats[WARPS * 16 + warp * 16 + row + half * 8] = sum;
        }
    }
    __syncthreads();
    u32 chunks = item.tail >> 16;
    u64 slot = (u64(item.row - p.row0) * p.chunks_max + (item.tail >> 8) % 256) * HEADS + head0;
    u64 at = (u64(item.row) * HEADS + head0) * VALUE_DIM;
    for (u32 i = threadIdx.x; i < heads * (VALUE_DIM / 2); i += WARPS * 32) {
        u32 head = i / (VALUE_DIM / 2), column = i % (VALUE_DIM / 2) * 2;
        float max = NEGATIVE, sum = 0.0f, x = 0.0f, y = 0.0f;
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) max = fmaxf(max, stats[w * 16 + head]);
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) {
            // A warp without positions has no maximum, and adds zero.
            float share = exp2_fast(stats[w * 16 + head] - max);
            float2 part = *reinterpret_cast<float2*>(outputs + (w * 16 + head) * SUM_PITCH + column);
            sum += share * stats[WARPS * 16 + w * 16 + head];
            x += share * part.x, y += share * part.y;
        }
        x /= sum, y /= sum;
        if (chunks == 1) {
            *reinterpret_cast<u32*>(p.out + at + head * VALUE_DIM + column) = pack_bf16(x, y);
        } else {
            *reinterpret_cast<float2*>(p.partial + (slot + head) * VALUE_DIM + column) = make_float2(x, y);
            if (column == 0) p.log_sums[slot + head] = max + log2f(sum);
        }
    }
    __syncthreads();
}

// Columns and rows of the tiles that no copy reaches are zeros, always.
__device__ __forceinline__ void clear(u32 from, u32 bytes) {
    for (u32 i = threadIdx.x * 16; i < bytes; i += WARPS * 32 * 16) {
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(from + i), "r"(0) : "memory");
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, VALUE_COLUMNS > 128 ? 1 : 3) gqa(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) u8 shared[];
    u32 query = shared_address(shared), stages = query + QUERY_BYTES;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    wait_for_previous();
    let_next_start();
    u32 total = *p.count * (KV_HEADS * PARTS);
    for (u32 round = 0;; round++) {
        // Items are sorted by length; dealing them to and fro evens out what the blocks get.
        u32 index = round * gridDim.x + (round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        if (index >= total) return;
        Item item = p.items[index / (KV_HEADS * PARTS)];
        u32 group = index % (KV_HEADS * PARTS), key_head = group / PARTS, part = group % PARTS;
        u32 heads = min(HEADS_PER_KEY - part * 16, 16u), head0 = key_head * HEADS_PER_KEY + part * 16;
        if (KEY_COLUMNS != KEY_DIM || VALUE_COLUMNS != VALUE_DIM) {
            clear(stages, WARPS * STAGES * STAGE_BYTES);
            __syncthreads();
        }
        u32 from = item.span & 0xffff, tiles = item.span >> 16;
        Slices slices = {p.keys + key_head * KEY_DIM, p.values + key_head * VALUE_DIM,
                         p.block_table + u64(item.sequence) * p.blocks_max};
        slices.to = stages + warp * STAGES * STAGE_BYTES;
        slices.tile = from, slices.end = from + tiles, slices.valid = item.tail % 256;
        slices.first = warp * SLICE, slices.page = slices.table[from], slices.lane = lane;
        for (u32 i = 0; i < STAGES - 1; i++) slices.fetch(i);
        clear(query, QUERY_BYTES);
        __syncthreads();
        for (u32 i = threadIdx.x; i < heads * (KEY_DIM / 8); i += WARPS * 32) {
            const bf16* x = p.query + (u64(item.row) * HEADS + head0) * KEY_DIM + i * 8;
            u32 to = i / (KEY_DIM / 8) * KEY_PITCH + i % (KEY_DIM / 8) * 16;
            *reinterpret_cast<uint4*>(shared + to) = *reinterpret_cast<const uint4*>(x);
        }
        __syncthreads();
        u32 stays[QUERY_STAYS ? KEY_COLUMNS / 16 : 1][4];
        u32 query_row = query + lane % 16 * KEY_PITCH + lane / 16 * 16;
        if (QUERY_STAYS) {
#pragma unroll
            for (u32 i = 0; i < (QUERY_STAYS ? KEY_COLUMNS / 16 : 1); i++) load_four(stays[i], query_row + i * 32);
        }
        Sums sums = {};
        sums.max[0] = sums.max[1] = NEGATIVE;
        for (u32 i = 0; i < tiles; i++) {
            asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
            // Lanes read what other lanes copied, and the last slice's stage is free.
            __syncwarp();
            slices.fetch((i + STAGES - 1) % STAGES);
            u32 limit = i + 1 == tiles ? slices.valid : PAGE;
            if (warp * SLICE >= limit) break;
            u32 keys = slices.to + i % STAGES * STAGE_BYTES;
            attend(sums, stays, query_row, keys, VALUES_IN_KEYS ? keys : keys + KEYS_BYTES, min(limit - warp * SLICE, SLICE),
                   p.scale_log2, lane);
        }
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncthreads();
        finish(p, item, head0, heads, sums, reinterpret_cast<float*>(shared + QUERY_BYTES));
    }
}
