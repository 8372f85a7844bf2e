// What kernels use in place of CUDA's built-ins: indices, barriers, warp collectives (memory.cuh
// has memory and atomics). nvcc compiles the real thing, a host compiler calls of the host
// executor.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "host_executor/device.h"
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace keye_ops {

#if defined(__CUDACC__)
#define KEYE_KERNEL(threads, min_blocks) __global__ void __launch_bounds__(threads, min_blocks)
#define KEYE_DEVICE __device__ __forceinline__
#define KEYE_PARAMS __grid_constant__ const
// An expression or a statement for either back end.
#define KEYE_CUDA_OR_HOST(cuda, host) cuda
#else
#define KEYE_KERNEL(threads, min_blocks) void
#define KEYE_DEVICE inline __attribute__((always_inline))
#define KEYE_PARAMS const
#define KEYE_CUDA_OR_HOST(cuda, host) host
using std::max;
using std::min;
#endif

constexpr int kWarpSize = 32;
constexpr uint32_t kFullMask = 0xffffffffu;

// ---- indices ----

KEYE_DEVICE int thread_idx() {
  return static_cast<int>(
      KEYE_CUDA_OR_HOST(threadIdx.x, host_executor::this_thread().thread_idx.x));
}
KEYE_DEVICE int64_t block_idx() {
  return KEYE_CUDA_OR_HOST(blockIdx.x, host_executor::this_thread().block_idx.x);
}
KEYE_DEVICE int block_idx_y() {
  return static_cast<int>(KEYE_CUDA_OR_HOST(blockIdx.y, host_executor::this_thread().block_idx.y));
}
KEYE_DEVICE int block_idx_z() {
  return static_cast<int>(KEYE_CUDA_OR_HOST(blockIdx.z, host_executor::this_thread().block_idx.z));
}
KEYE_DEVICE int block_size() {
  return static_cast<int>(KEYE_CUDA_OR_HOST(blockDim.x, host_executor::this_thread().block_dim.x));
}
KEYE_DEVICE int64_t grid_size() {
  return KEYE_CUDA_OR_HOST(gridDim.x, host_executor::this_thread().grid_dim.x);
}

// ---- barriers ----

KEYE_DEVICE void syncthreads() {
  KEYE_CUDA_OR_HOST(__syncthreads(), host_executor::barrier_sync(0, 0));
}
KEYE_DEVICE void sync_warp(uint32_t mask = kFullMask) {
  KEYE_CUDA_OR_HOST(__syncwarp(mask), host_executor::sync_warp(mask));
}

// ---- warp collectives: every lane of the mask takes part ----

#if !defined(__CUDACC__)
template <class T>
KEYE_DEVICE T host_shuffle(uint32_t mask, T value, host_executor::Shuffle mode, int operand) {
  static_assert(sizeof(T) == 4, "shuffles move 32-bit values");
  uint32_t word;
  std::memcpy(&word, &value, sizeof(word));
  word = host_executor::shuffle(mask, word, mode, operand);
  std::memcpy(&value, &word, sizeof(word));
  return value;
}
#endif

// The value of another lane.
template <class T>
KEYE_DEVICE T shuffle(T value, int source_lane, uint32_t mask = kFullMask) {
  return KEYE_CUDA_OR_HOST(__shfl_sync(mask, value, source_lane),
                           host_shuffle(mask, value, host_executor::Shuffle::kIndex, source_lane));
}
template <class T>
KEYE_DEVICE T shuffle_up(T value, int delta, uint32_t mask = kFullMask) {
  return KEYE_CUDA_OR_HOST(__shfl_up_sync(mask, value, delta),
                           host_shuffle(mask, value, host_executor::Shuffle::kUp, delta));
}
template <class T>
KEYE_DEVICE T shuffle_down(T value, int delta, uint32_t mask = kFullMask) {
  return KEYE_CUDA_OR_HOST(__shfl_down_sync(mask, value, delta),
                           host_shuffle(mask, value, host_executor::Shuffle::kDown, delta));
}
template <class T>
KEYE_DEVICE T shuffle_xor(T value, int lane_mask, uint32_t mask = kFullMask) {
  return KEYE_CUDA_OR_HOST(__shfl_xor_sync(mask, value, lane_mask),
                           host_shuffle(mask, value, host_executor::Shuffle::kXor, lane_mask));
}

KEYE_DEVICE uint32_t warp_ballot(bool predicate, uint32_t mask = kFullMask) {
  return KEYE_CUDA_OR_HOST(__ballot_sync(mask, predicate), host_executor::ballot(mask, predicate));
}
KEYE_DEVICE bool warp_any(bool predicate, uint32_t mask = kFullMask) {
  return KEYE_CUDA_OR_HOST(__any_sync(mask, predicate), host_executor::ballot(mask, predicate)) !=
         0;
}
KEYE_DEVICE bool warp_all(bool predicate, uint32_t mask = kFullMask) {
  return KEYE_CUDA_OR_HOST(__all_sync(mask, predicate) != 0,
                           host_executor::ballot(mask, !predicate) == 0);
}

// Over int or uint32_t.
#define KEYE_REDUX(name, intrinsic, op)                                                  \
  template <class T>                                                                     \
  KEYE_DEVICE T name(T value, uint32_t mask = kFullMask) {                               \
    return KEYE_CUDA_OR_HOST(                                                            \
        intrinsic(mask, value),                                                          \
        static_cast<T>(host_executor::reduce(mask, static_cast<uint32_t>(value),         \
                                             host_executor::Reduce::op, T(-1) < T(0)))); \
  }
KEYE_REDUX(reduce_add, __reduce_add_sync, kAdd)
KEYE_REDUX(reduce_min, __reduce_min_sync, kMin)
KEYE_REDUX(reduce_max, __reduce_max_sync, kMax)
KEYE_REDUX(reduce_and, __reduce_and_sync, kAnd)
KEYE_REDUX(reduce_or, __reduce_or_sync, kOr)
KEYE_REDUX(reduce_xor, __reduce_xor_sync, kXor)
#undef KEYE_REDUX

// The warp of this thread in its block; the shuffle tells the compiler that lanes agree.
KEYE_DEVICE int warp_in_block() { return shuffle(thread_idx() / kWarpSize, 0); }

// ---- arithmetic ----

KEYE_DEVICE int popcount(uint32_t bits) {
  return KEYE_CUDA_OR_HOST(__popc(bits), __builtin_popcount(bits));
}

// The other one where one is NaN, a signaling one too, with which C's fmax gives NaN.
KEYE_DEVICE float max_of(float a, float b) {
  return KEYE_CUDA_OR_HOST(fmaxf(a, b), std::isnan(a) || a < b ? b : a);
}
KEYE_DEVICE float log_of(float x) { return KEYE_CUDA_OR_HOST(logf(x), std::log(x)); }
KEYE_DEVICE float rsqrt_of(float x) {
  return KEYE_CUDA_OR_HOST(rsqrtf(x), static_cast<float>(1.0 / std::sqrt(double{x})));
}

}  // namespace keye_ops
