// Dispatch and combine of tokens between DP ranks (which have tokens) and EP ranks (which have experts).
//
// One round is one MoE layer. Data is pulled and results are pushed:
//   DP  signal   rows and routing of the round lie in the own heap: raises a flag in the heap of every EP rank
//   EP  layout   waits for the flags of all DP ranks, reads their routing, sorts its rows by (slot, DP rank, token, choice)
//   EP  gather   pulls the rows out of the DP ranks' heaps into the permuted buffer
//   EP  combine  pushes each result row into `combined[token][choice]` of its owner and raises a flag there
//   DP  reduce   sums each token's rows in the order of its choices, once the flags of all EP ranks are up
//
// Why no region needs a second buffer. Rows, routing (DP rank d) of round r are read by EP ranks in layout r and
// gather r, both before that EP rank raises its combine flag r at d; d writes those of round r + 1 after reduce r, which
// waited for the flags of all EP ranks, also of those that had nothing to send. `combined` (d) of round r is read by
// reduce r; an EP rank pushes r + 1 after it saw dispatch flag r + 1, which d raises after reduce r. The permuted
// buffers and tables of an EP rank are used by that rank alone, in stream order. So nobody is ever more than one round
// ahead of anybody it shares a buffer with, whether it is DP only, EP only or both, whatever its number of tokens.
//
// Flags hold a round number, epoch << 32 | count, and only ever grow: each is written by one rank, named by its stable
// id, and is never cleared. So a flag of an old epoch is never taken for one of a new epoch, and resetting one rank
// cannot erase the flag that a faster rank raised already.
//
// Nothing waits for ever: see wait_all. After a failure every kernel of the step finds `failed` set, touches no peer and
// leaves tables that mean "no rows".
#pragma once
#include "common.cuh"

constexpr u32 RANKS_MAX = 64;
constexpr u32 FULL = 0xffffffffu;
// Places in every heap, in bytes. A flag is { u64 round; u64 note } and has a sector of its own.
constexpr u64 DISPATCH_FLAGS = 0;
constexpr u64 COMBINE_FLAGS = 2048;
constexpr u64 HEADER = 4096;
constexpr u64 FLAG_BYTES = 32;

enum Failure : u32 { NONE = 0, ABORTED = 1, SILENT = 2, OVERFLOW = 3, MALFORMED = 4 };
enum Phase : u32 { DISPATCH = 1, COMBINE = 2 };

// Sizes that all ranks share and that never change. A place is an offset into a heap.
struct Geometry {
    u64 slots_at;         // u32 [tokens_max][top_k]
    u64 rows_at;          // u8 [tokens_max][row_bytes]
    u64 scales_at;        // f32 [scale_blocks][tokens_max]
    u64 combined_at;      // bf16 [tokens_max][top_k][hidden]
    u64 combined_stride;  // bytes from one EP rank's region to the next; 0 where all push into the same
    u32 tokens_max;
    u32 top_k;
    u32 hidden;
    u32 row_bytes;
    u32 scale_blocks;     // 0: rows are bf16
    u32 rows_max;         // capacity of the permuted buffers
};

// Who takes part. Written by the host between two steps.
struct Context {
    u64 abort_cell;  // host memory, u64: epochs below it have ended
    u64 report;      // host memory, Report
    u64 timeout_ns;
    u64 epoch;
    u64 own;         // own heap
    u32 rank;        // stable id of this rank, below RANKS_MAX
    u32 dp;
    u32 ep;
    u32 my_dp;       // IDLE: no tokens here
    u32 my_ep;       // IDLE: no experts here
    u32 slots;       // of one EP rank
    u32 flags;       // 0: another transport orders the ranks, nothing is raised or awaited
    u32 reserved;
    u64 dp_heap[RANKS_MAX];
    u64 ep_heap[RANKS_MAX];
    u32 dp_rank[RANKS_MAX];  // IDLE: nobody
    u32 ep_rank[RANKS_MAX];
};

// What the kernels carry from round to round. Set by the host at a reset.
struct State {
    u64 dp_round;
    u64 ep_round;
    u32 failed;
    u32 ticket;
};

// What the host reads after a step.
struct Report {
    u32 failure;
    u32 phase;
    u64 ranks;  // bit mask of rank ids
    u64 round;
};

// What layout leaves for gather and combine: prefix sums over the DP ranks, and how many rows there are.
struct Plan {
    u32 token_base[RANKS_MAX + 1];
    u32 group_base[RANKS_MAX + 1];  // of 32 tokens
    u32 rows;
};

// A result row and where it goes.
struct alignas(16) Push {
    u64 destination;
    u32 row;
    u32 dp;
};

__device__ __forceinline__ void load_flag(u64 address, u64& round, u64& note) {
    asm volatile("ld.acquire.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(round), "=l"(note) : "l"(address) : "memory");
}

__device__ __forceinline__ u64 load_system(u64 address) {
    u64 v;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(address) : "memory");
    return v;
}

__device__ __forceinline__ u32 load_system_u32(u64 address) {
    u32 v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
    return v;
}

__device__ __forceinline__ void store_system(u64 address, u64 v) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(address), "l"(v) : "memory");
}

__device__ __forceinline__ void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

__device__ __forceinline__ u64 time_ns() {
    u64 t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

__device__ __forceinline__ uint4 load_row(u64 address) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ void store_row(u64 address, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// Ends the step on this rank: the first failure is the one that the host reads.
__device__ void fail(const Context* c, State* s, Failure failure, Phase phase, u64 ranks, u64 round) {
    if (atomicCAS(&s->failed, u32(NONE), u32(failure)) != NONE) return;
    Report* report = reinterpret_cast<Report*>(c->report);
    report->phase = phase;
    report->ranks = ranks;
    report->round = round;
    fence_system();
    *reinterpret_cast<volatile u32*>(&report->failure) = failure;
    fence_system();
}

// One warp waits until the flags of `count` ranks show `round`. False: the wait ended by an abort or the timeout, and
// that is on record. `notes`, where given, takes what each rank sent along.
__device__ bool wait_all(const Context* c, State* s, Phase phase, u64 round, u32* notes) {
    const u32 lane = threadIdx.x & 31;
    const u64 flags = c->own + (phase == DISPATCH ? DISPATCH_FLAGS : COMBINE_FLAGS);
    const u32* ranks = phase == DISPATCH ? c->dp_rank : c->ep_rank;
    const u32 count = phase == DISPATCH ? c->dp : c->ep;
    u64 since = 0;
    for (u32 turn = 0;; turn++) {
        u64 silent = 0;
        for (u32 i = lane; i < count; i += 32) {
            if (ranks[i] == IDLE) continue;
            u64 seen, note;
            load_flag(flags + ranks[i] * FLAG_BYTES, seen, note);
            // The two words may arrive in any order; the note repeats the low half of its round. A peer cannot be
            // ahead, unless it is in a later epoch: then it has left this one.
            if (seen != round || u32(note >> 32) != u32(round)) silent |= 1ull << ranks[i];
            else if (notes) notes[i] = u32(note);
        }
        if (!__any_sync(FULL, silent != 0)) return true;
        u32 failure = NONE;
        if (lane == 0) {
            const u64 now = time_ns();
            if (turn == 0) since = now;
            if (now - since > c->timeout_ns) failure = SILENT;
            // Host memory: looked at now and then, it is a microsecond away.
            if (turn % 16 == 15 && load_system(c->abort_cell) > c->epoch) failure = ABORTED;
        }
        failure = __shfl_sync(FULL, failure, 0);
        if (failure != NONE) {
            const u64 high = __reduce_or_sync(FULL, u32(silent >> 32));
            const u64 low = __reduce_or_sync(FULL, u32(silent));
            if (lane == 0) fail(c, s, Failure(failure), phase, high << 32 | low, round);
            return false;
        }
        if (turn > 256) __nanosleep(64);
    }
}

// Raises this rank's flag of a phase at all peers. By one CTA of at least RANKS_MAX threads, after the data is written
// by earlier kernels or before a __syncthreads.
__device__ void raise(const Context* c, Phase phase, u64 round, u32 note) {
    const u32 count = phase == DISPATCH ? c->ep : c->dp;
    const u32* ranks = phase == DISPATCH ? c->ep_rank : c->dp_rank;
    const u64* heaps = phase == DISPATCH ? c->ep_heap : c->dp_heap;
    const u32 i = threadIdx.x;
    if (i >= count || ranks[i] == IDLE) return;
    const u64 flag = heaps[i] + (phase == DISPATCH ? DISPATCH_FLAGS : COMBINE_FLAGS) + c->rank * FLAG_BYTES;
    fence_system();
    store_system(flag, round);
    store_system(flag + 8, round << 32 | note);
}

// Last i < count with base[i] <= x; base is ascending and starts with 0.
__device__ __forceinline__ u32 find(const u32* base, u32 count, u32 x) {
    u32 low = 0;
    while (count > 1) {
        const u32 half = count / 2;
        if (base[low + half] <= x) low += half;
        count -= half;
    }
    return low;
}
