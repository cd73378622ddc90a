// A fault on purpose: the context is lost, as by an uncorrectable memory error.
#include "common.cuh"

struct FaultParams {
    u32 unused;
};

extern "C" __global__ void fault(const __grid_constant__ FaultParams p) {
    // Depends on the argument, so that nothing is known about the end when it is compiled.
    if (p.unused == 0) asm volatile("trap;");
}
