// Barriers of a part of the block, and the choice of one lane.
#pragma once

#include <cstdint>

#include "common/thread.cuh"

namespace keye_ops::ptx {

// Barrier 1 to 15 (0 is that of syncthreads) of whole warps; threads counts those that arrive.
// #parallel-synchronization-and-communication-instructions-bar
KEYE_DEVICE void bar_sync(int id, int threads) {
  KEYE_CUDA_OR_HOST(asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"),
                    host_executor::barrier_sync(id, threads));
}

// #parallel-synchronization-and-communication-instructions-bar
KEYE_DEVICE void bar_arrive(int id, int threads) {
  KEYE_CUDA_OR_HOST(asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"),
                    host_executor::barrier_arrive(id, threads));
}

// True in one lane of the mask.
// #parallel-synchronization-and-communication-instructions-elect-sync
KEYE_DEVICE bool elect_sync(uint32_t mask = kFullMask) {
#if defined(__CUDACC__)
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, %1;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(elected)
               : "r"(mask));
  return elected != 0;
#else
  return host_executor::elect(mask);
#endif
}

}  // namespace keye_ops::ptx
