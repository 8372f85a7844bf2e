// Copies between memory and shared memory, and of matrices and words of shared memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/thread.cuh"

namespace keye_ops::ptx {

// ---- asynchronous copies: source_bytes are copied, the rest become zeros ----

// Through L1. #data-movement-and-conversion-instructions-cp-async
template <int kBytes>
KEYE_DEVICE void cp_async_ca(uint32_t shared, const void* global, int source_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async.ca copies 4, 8 or 16 bytes");
  KEYE_CUDA_OR_HOST(asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared),
                                 "l"(global), "n"(kBytes), "r"(source_bytes) : "memory"),
                    host_executor::cp_async(shared, global, kBytes, source_bytes));
}

// 16 bytes, past L1. #data-movement-and-conversion-instructions-cp-async
KEYE_DEVICE void cp_async_cg(uint32_t shared, const void* global, int source_bytes = 16) {
  KEYE_CUDA_OR_HOST(asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared),
                                 "l"(global), "r"(source_bytes) : "memory"),
                    host_executor::cp_async(shared, global, 16, source_bytes));
}

// #data-movement-and-conversion-instructions-cp-async-commit-group
KEYE_DEVICE void cp_async_commit_group() {
  KEYE_CUDA_OR_HOST(asm volatile("cp.async.commit_group;" :: : "memory"),
                    host_executor::cp_async_commit());
}

// Until at most kPending groups of this thread are on their way.
// #data-movement-and-conversion-instructions-cp-async-wait-group
template <int kPending>
KEYE_DEVICE void cp_async_wait_group() {
  KEYE_CUDA_OR_HOST(asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"),
                    host_executor::cp_async_wait(kPending));
}

// ---- 1, 2 or 4 matrices of 8 x 8 16-bit values; lane 8 i + j has the address of row j of the
// i-th ----

#if defined(__CUDACC__)
#define KEYE_LDMATRIX(variant)                                                      \
  if constexpr (kCount == 1) {                                                      \
    asm volatile("ldmatrix.sync.aligned.m8n8.x1" variant " {%0}, [%1];"             \
                 : "=r"(d[0])                                                       \
                 : "r"(shared)                                                      \
                 : "memory");                                                       \
  } else if constexpr (kCount == 2) {                                               \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" variant " {%0, %1}, [%2];"         \
                 : "=r"(d[0]), "=r"(d[1])                                           \
                 : "r"(shared)                                                      \
                 : "memory");                                                       \
  } else {                                                                          \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" variant " {%0, %1, %2, %3}, [%4];" \
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                   \
                 : "r"(shared)                                                      \
                 : "memory");                                                       \
  }
#define KEYE_STMATRIX(variant)                                                                     \
  if constexpr (kCount == 1) {                                                                     \
    asm volatile("stmatrix.sync.aligned.m8n8.x1" variant " [%0], {%1};" ::"r"(shared), "r"(a[0])   \
                 : "memory");                                                                      \
  } else if constexpr (kCount == 2) {                                                              \
    asm volatile("stmatrix.sync.aligned.m8n8.x2" variant " [%0], {%1, %2};" ::"r"(shared),         \
                 "r"(a[0]), "r"(a[1])                                                              \
                 : "memory");                                                                      \
  } else {                                                                                         \
    asm volatile("stmatrix.sync.aligned.m8n8.x4" variant " [%0], {%1, %2, %3, %4};" ::"r"(shared), \
                 "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])                                        \
                 : "memory");                                                                      \
  }
#endif

// #warp-level-matrix-instructions-ldmatrix
template <int kCount>
KEYE_DEVICE void ldmatrix(uint32_t (&d)[kCount], uint32_t shared) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "1, 2 or 4 matrices");
  KEYE_CUDA_OR_HOST(KEYE_LDMATRIX(".shared.b16"),
                    host_executor::ldmatrix(d, shared, kCount, false);)
}
template <int kCount>
KEYE_DEVICE void ldmatrix_trans(uint32_t (&d)[kCount], uint32_t shared) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "1, 2 or 4 matrices");
  KEYE_CUDA_OR_HOST(KEYE_LDMATRIX(".trans.shared.b16"),
                    host_executor::ldmatrix(d, shared, kCount, true);)
}

// #warp-level-matrix-instructions-stmatrix
template <int kCount>
KEYE_DEVICE void stmatrix(uint32_t shared, const uint32_t (&a)[kCount]) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "1, 2 or 4 matrices");
  KEYE_CUDA_OR_HOST(KEYE_STMATRIX(".shared.b16"),
                    host_executor::stmatrix(shared, a, kCount, false);)
}
template <int kCount>
KEYE_DEVICE void stmatrix_trans(uint32_t shared, const uint32_t (&a)[kCount]) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "1, 2 or 4 matrices");
  KEYE_CUDA_OR_HOST(KEYE_STMATRIX(".trans.shared.b16"),
                    host_executor::stmatrix(shared, a, kCount, true);)
}

// ---- shared memory of any block of the cluster ----

// The address of the same variable in another block.
// #data-movement-and-conversion-instructions-mapa
KEYE_DEVICE uint32_t mapa(uint32_t shared, uint32_t rank) {
#if defined(__CUDACC__)
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
#else
  return host_executor::map_shared_rank(shared, rank);
#endif
}

// 4, 8 or 16 bytes. #data-movement-and-conversion-instructions-ld
template <class V>
KEYE_DEVICE V ld_shared_cluster(uint32_t address) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "4, 8 or 16 bytes");
  V value;
#if defined(__CUDACC__)
  uint32_t w[sizeof(V) / 4];
  if constexpr (sizeof(V) == 4) {
    asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(w[0]) : "r"(address) : "memory");
  } else if constexpr (sizeof(V) == 8) {
    asm volatile("ld.shared::cluster.v2.b32 {%0, %1}, [%2];"
                 : "=r"(w[0]), "=r"(w[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ld.shared::cluster.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(address)
                 : "memory");
  }
  memcpy(&value, w, sizeof(V));
#else
  host_executor::load_shared(&value, address, sizeof(V));
#endif
  return value;
}

// 4, 8 or 16 bytes. #data-movement-and-conversion-instructions-st
template <class V>
KEYE_DEVICE void st_shared_cluster(uint32_t address, const V& value) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "4, 8 or 16 bytes");
#if defined(__CUDACC__)
  uint32_t w[sizeof(V) / 4];
  memcpy(w, &value, sizeof(V));
  if constexpr (sizeof(V) == 4) {
    asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(address), "r"(w[0]) : "memory");
  } else if constexpr (sizeof(V) == 8) {
    asm volatile("st.shared::cluster.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(w[0]), "r"(w[1])
                 : "memory");
  } else {
    asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(w[0]),
                 "r"(w[1]), "r"(w[2]), "r"(w[3])
                 : "memory");
  }
#else
  host_executor::store_shared(address, &value, sizeof(V));
#endif
}

}  // namespace keye_ops::ptx
