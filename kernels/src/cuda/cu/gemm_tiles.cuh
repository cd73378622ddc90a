// What gemm.cu computes and in which order: constants, parameters, tiles. Stands before gemm.cu.
//
// Constants: FP8, GROUPED (0 or 1), SPLIT, IN_REGISTERS (0 or 1), PAIR, COLUMNS, STAGES.

#include "gemm_ptx.cuh"

constexpr u32 ROWS = 128;
constexpr u32 GROUP_ROWS = 64;
// Rows of x are copied in boxes of so many.
constexpr u32 BOX_ROWS = PAIR == 4 ? 16 : 32;
constexpr u32 STEP_BYTES = 128;
constexpr u32 STEP_ELEMENTS = FP8 ? 128 : 64;
constexpr u32 SLICES_HERE = IN_REGISTERS ? SPLIT : 1;
constexpr u32 CLUSTER_SPLIT = IN_REGISTERS ? 1 : SPLIT;
constexpr u32 CLUSTER = CLUSTER_SPLIT * PAIR;
constexpr u32 CONSUMERS = 256;
// The producer's warpgroup gives registers to the others; three of its warps only do that.
constexpr u32 THREADS = CONSUMERS + 128;
constexpr u32 X_BYTES = ROWS * STEP_BYTES;
constexpr u32 W_BYTES = COLUMNS * STEP_BYTES;
constexpr u32 X_SCALE_BYTES = FP8 ? ROWS * 4 : 0;
// A thread's sums come in fours: two columns of two rows, eight rows apart. A slice's are shared out to the cluster.
constexpr u32 fours_own(u32 fours) { return (fours + CLUSTER_SPLIT - 1) / CLUSTER_SPLIT; }
constexpr u32 REDUCE_BYTES = CLUSTER_SPLIT > 1 ? 2 * CLUSTER_SPLIT * fours_own(COLUMNS / 8) * 128 * 16 : 0;
// Whether a tile has one scale of weights per step, or two.
constexpr bool ONE_SCALE = 128 % COLUMNS == 0;
// Tiles begin at multiples of so many eights of columns within a block of scales.
[[maybe_unused]] constexpr u32 BLOCK_STEP = (COLUMNS & -COLUMNS) / 8;
// m-tiles that are neighbours in time, so that their weights are still in the second-level cache.
constexpr u32 NEIGHBOURS = 16;
static_assert(CLUSTER <= 8, "CTAs of a cluster");
static_assert(COLUMNS % 16 == 0 && (COLUMNS <= 128 || COLUMNS == 144 || COLUMNS == 160 || COLUMNS == 192),
              "a tile lies in two blocks of scales at most");

struct Params {
    TensorMap x;        // [rows][heads][K], boxes of 32 rows
    TensorMap w;        // [matrices][N][K], boxes of COLUMNS rows
    TensorMap x_scales; // [ceil(K / 128)][rows], boxes of 128 rows
    u64 w_scales;       // f32 [matrices][ceil(N / 128)][ceil(K / 128)]
    u64 y;
    u64 y_stride, y_head_stride; // elements
    u64 segment_start, segment_rows, pool_of_slot;
    u64 row_addresses; // where rows of y are scattered: an address per row, in place of y
    u64 w_policy, x_policy;
    u32 rows, n, k;
    u32 matrices; // heads, or slots where grouped
    u32 y_is_f32, y_vectors;
    u32 tile_rows; // 64 or 128
};

struct Tile {
    u32 matrix, head;
    u32 row, count; // first row of x and y; valid rows from there on, at most p.tile_rows
    u32 column;     // first column, of this CTA
};

// The tiles of a cluster, the same for all of its warps.
struct Schedule {
    const Params& p;
    u32 index, pair;
    u32 pairs;
    // Grouped: a lane knows one slot of the 32 from `slot` on; `before` tiles come before those.
    u32 slot = 0, before = 0, start = 0, rows = 0, end = 0;

    __device__ __forceinline__ Schedule(const Params& p, u32 pair)
        : p(p), index(blockIdx.x / CLUSTER), pair(pair), pairs((p.n + COLUMNS * PAIR - 1) / (COLUMNS * PAIR)) {
        if constexpr (GROUPED) read_slots();
    }

    __device__ __forceinline__ void read_slots() {
        u32 mine = slot + threadIdx.x % 32;
        bool there = mine < p.matrices;
        start = there ? ((const u32*)p.segment_start)[mine] : 0;
        rows = there ? ((const u32*)p.segment_rows)[mine] : 0;
        end = (rows + p.tile_rows - 1) / p.tile_rows * pairs;
#pragma unroll
        for (u32 step = 1; step < 32; step <<= 1) {
            u32 lower = __shfl_up_sync(0xffffffffu, end, step);
            if (threadIdx.x % 32 >= step) end += lower;
        }
    }

    __device__ __forceinline__ bool next(Tile& tile) {
        u32 m, n;
        if constexpr (GROUPED) {
            u32 found;
            while (!(found = __ballot_sync(0xffffffffu, index < before + end))) {
                before += __shfl_sync(0xffffffffu, end, 31);
                slot += 32;
                if (slot >= p.matrices) return false;
                read_slots();
            }
            u32 lane = __ffs(found) - 1;
            u32 count = __shfl_sync(0xffffffffu, rows, lane);
            u32 tiles = (count + p.tile_rows - 1) / p.tile_rows;
            u32 local = index - (before + __shfl_sync(0xffffffffu, end, lane) - tiles * pairs);
            m = local % tiles;
            n = local / tiles;
            tile.matrix = ((const u32*)p.pool_of_slot)[slot + lane];
            tile.head = 0;
            tile.row = __shfl_sync(0xffffffffu, start, lane) + m * p.tile_rows;
            tile.count = min(p.tile_rows, count - m * p.tile_rows);
        } else {
            u32 tiles = (p.rows + p.tile_rows - 1) / p.tile_rows;
            u32 head = index / (tiles * pairs), local = index % (tiles * pairs);
            if (head >= p.matrices) return false;
            u32 first = local / (NEIGHBOURS * pairs) * NEIGHBOURS;
            u32 high = min(NEIGHBOURS, tiles - first);
            local -= first * pairs;
            m = first + local % high;
            n = local / high;
            tile.matrix = tile.head = head;
            tile.row = m * p.tile_rows;
            tile.count = min(p.tile_rows, p.rows - m * p.tile_rows);
        }
        tile.column = (n * PAIR + pair) * COLUMNS;
        index += gridDim.x / CLUSTER;
        return true;
    }
};

