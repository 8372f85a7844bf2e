// The CUDA built-ins that kernels use: thread and block indices, warp shuffles.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace keye_ops {

#define KEYE_KERNEL __global__ void
#define KEYE_DEVICE __device__ __forceinline__
#define KEYE_PARAMS __grid_constant__ const

constexpr int kWarpSize = 32;
constexpr uint32_t kFullMask = 0xffffffffu;

KEYE_DEVICE int thread_idx() { return static_cast<int>(threadIdx.x); }
KEYE_DEVICE int64_t block_idx() { return blockIdx.x; }
KEYE_DEVICE int block_size() { return static_cast<int>(blockDim.x); }
KEYE_DEVICE int64_t grid_size() { return gridDim.x; }

// The value of another lane; all lanes of the warp take part.
KEYE_DEVICE float shuffle(float value, int source_lane) {
  return __shfl_sync(kFullMask, value, source_lane);
}
KEYE_DEVICE uint32_t shuffle(uint32_t value, int source_lane) {
  return __shfl_sync(kFullMask, value, source_lane);
}
KEYE_DEVICE float shuffle_xor(float value, int lane_mask) {
  return __shfl_xor_sync(kFullMask, value, lane_mask);
}

// The warp of this thread in its block; the shuffle tells the compiler that lanes agree.
KEYE_DEVICE int warp_in_block() {
  return static_cast<int>(shuffle(static_cast<uint32_t>(thread_idx() / kWarpSize), 0));
}

KEYE_DEVICE float rsqrt_of(float x) { return rsqrtf(x); }

}  // namespace keye_ops
