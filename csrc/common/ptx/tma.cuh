// Copies by the tensor memory accelerator: boxes of a tensor, and plain bytes.
#pragma once

#if defined(__CUDACC__)
#include <cuda.h>
#endif

#include <cstdint>

#include "common/thread.cuh"

namespace keye_ops {

// A parameter of the kernel; tensor_map.h makes it.
using TensorMap = KEYE_CUDA_OR_HOST(CUtensorMap, host_executor::TensorMap);

namespace ptx {

// ---- boxes; coordinates count elements, dimension 0 first ----

// Into shared memory aligned to 128 bytes (to the swizzle's period), zeros outside the tensor; the
// bytes of the whole box count on the barrier.
// #data-movement-and-conversion-instructions-cp-async-bulk-tensor
template <int kRank>
KEYE_DEVICE void cp_async_bulk_tensor_load(uint32_t shared, const TensorMap& map,
                                           const int (&coords)[kRank], uint32_t mbarrier) {
  static_assert(kRank >= 1 && kRank <= 5, "a tensor map has 1 to 5 dimensions");
#if defined(__CUDACC__)
#define KEYE_TMA_LOAD(rank, registers, ...)                                                       \
  asm volatile("cp.async.bulk.tensor." rank                                                       \
               ".shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {" registers \
               "}], [%2];" ::"r"(shared),                                                         \
               "l"(&map), "r"(mbarrier), __VA_ARGS__                                              \
               : "memory")
#define KEYE_COORD(i) "r"(coords[i])
  if constexpr (kRank == 1) {
    KEYE_TMA_LOAD("1d", "%3", KEYE_COORD(0));
  } else if constexpr (kRank == 2) {
    KEYE_TMA_LOAD("2d", "%3, %4", KEYE_COORD(0), KEYE_COORD(1));
  } else if constexpr (kRank == 3) {
    KEYE_TMA_LOAD("3d", "%3, %4, %5", KEYE_COORD(0), KEYE_COORD(1), KEYE_COORD(2));
  } else if constexpr (kRank == 4) {
    KEYE_TMA_LOAD("4d", "%3, %4, %5, %6", KEYE_COORD(0), KEYE_COORD(1), KEYE_COORD(2),
                  KEYE_COORD(3));
  } else {
    KEYE_TMA_LOAD("5d", "%3, %4, %5, %6, %7", KEYE_COORD(0), KEYE_COORD(1), KEYE_COORD(2),
                  KEYE_COORD(3), KEYE_COORD(4));
  }
#undef KEYE_TMA_LOAD
#else
  host_executor::tma_load(kRank, shared, &map, coords, mbarrier);
#endif
}

// What lies outside the tensor is dropped.
// #data-movement-and-conversion-instructions-cp-async-bulk-tensor
template <int kRank>
KEYE_DEVICE void cp_async_bulk_tensor_store(const TensorMap& map, const int (&coords)[kRank],
                                            uint32_t shared) {
  static_assert(kRank >= 1 && kRank <= 5, "a tensor map has 1 to 5 dimensions");
#if defined(__CUDACC__)
#define KEYE_TMA_STORE(rank, registers, ...)                                                       \
  asm volatile("cp.async.bulk.tensor." rank ".global.shared::cta.tile.bulk_group [%0, {" registers \
               "}], [%1];" ::"l"(&map),                                                            \
               "r"(shared), __VA_ARGS__                                                            \
               : "memory")
  if constexpr (kRank == 1) {
    KEYE_TMA_STORE("1d", "%2", KEYE_COORD(0));
  } else if constexpr (kRank == 2) {
    KEYE_TMA_STORE("2d", "%2, %3", KEYE_COORD(0), KEYE_COORD(1));
  } else if constexpr (kRank == 3) {
    KEYE_TMA_STORE("3d", "%2, %3, %4", KEYE_COORD(0), KEYE_COORD(1), KEYE_COORD(2));
  } else if constexpr (kRank == 4) {
    KEYE_TMA_STORE("4d", "%2, %3, %4, %5", KEYE_COORD(0), KEYE_COORD(1), KEYE_COORD(2),
                   KEYE_COORD(3));
  } else {
    KEYE_TMA_STORE("5d", "%2, %3, %4, %5, %6", KEYE_COORD(0), KEYE_COORD(1), KEYE_COORD(2),
                   KEYE_COORD(3), KEYE_COORD(4));
  }
#undef KEYE_TMA_STORE
#undef KEYE_COORD
#else
  host_executor::tma_store(kRank, &map, shared, coords);
#endif
}

// #data-movement-and-conversion-instructions-prefetch-prefetchu
KEYE_DEVICE void prefetch_tensormap([[maybe_unused]] const TensorMap& map) {
  KEYE_CUDA_OR_HOST(asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"), void());
}

// ---- bytes: addresses and count are multiples of 16 ----

// #data-movement-and-conversion-instructions-cp-async-bulk
KEYE_DEVICE void cp_async_bulk_load(uint32_t shared, const void* global, uint32_t bytes,
                                    uint32_t mbarrier) {
  KEYE_CUDA_OR_HOST(
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], "
                   "%2, [%3];" ::"r"(shared),
                   "l"(global), "r"(bytes), "r"(mbarrier) : "memory"),
      host_executor::bulk_load(shared, global, bytes, mbarrier));
}
KEYE_DEVICE void cp_async_bulk_store(void* global, uint32_t shared, uint32_t bytes) {
  KEYE_CUDA_OR_HOST(
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                   "r"(shared), "r"(bytes) : "memory"),
      host_executor::bulk_store(global, shared, bytes));
}

// ---- groups of stores ----

// #data-movement-and-conversion-instructions-cp-async-bulk-commit-group
KEYE_DEVICE void cp_async_bulk_commit_group() {
  KEYE_CUDA_OR_HOST(asm volatile("cp.async.bulk.commit_group;" :: : "memory"),
                    host_executor::bulk_commit());
}

// Until at most kPending groups of this thread are incomplete.
// #data-movement-and-conversion-instructions-cp-async-bulk-wait-group
template <int kPending>
KEYE_DEVICE void cp_async_bulk_wait_group() {
  KEYE_CUDA_OR_HOST(asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory"),
                    host_executor::bulk_wait(kPending, false));
}
// Until at most kPending groups of this thread have yet to read their shared memory.
template <int kPending>
KEYE_DEVICE void cp_async_bulk_wait_group_read() {
  KEYE_CUDA_OR_HOST(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory"),
                    host_executor::bulk_wait(kPending, true));
}

}  // namespace ptx
}  // namespace keye_ops
