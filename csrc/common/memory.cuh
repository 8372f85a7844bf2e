// Memory as kernels reach it: shared memory, accesses of up to 16 bytes, atomics.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/thread.cuh"

namespace keye_ops {

// ---- shared memory, vectors of bytes ----

// The dynamic shared memory of the block.
KEYE_DEVICE unsigned char* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(1024) unsigned char bytes[];
  return bytes;
#else
  return host_executor::shared_memory();
#endif
}

// The address of shared memory that PTX instructions take.
KEYE_DEVICE uint32_t shared_address(const void* memory) {
  return KEYE_CUDA_OR_HOST(static_cast<uint32_t>(__cvta_generic_to_shared(memory)),
                           host_executor::shared_address(memory));
}

#if defined(__CUDACC__)
template <int kBytes>
using VectorBits = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;
#endif

// One access of 2, 4, 8 or 16 bytes, to which the memory is aligned.
template <class V>
KEYE_DEVICE V load_bytes(const void* memory) {
  static_assert(sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16,
                "one access has 2, 4, 8 or 16 bytes");
  V value;
#if defined(__CUDACC__)
  const auto bits = *static_cast<const VectorBits<sizeof(V)>*>(memory);
  memcpy(&value, &bits, sizeof(V));
#else
  host_executor::load(&value, memory, sizeof(V));
#endif
  return value;
}
template <class V>
KEYE_DEVICE void store_bytes(void* memory, const V& value) {
  static_assert(sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16,
                "one access has 2, 4, 8 or 16 bytes");
#if defined(__CUDACC__)
  VectorBits<sizeof(V)> bits;
  memcpy(&bits, &value, sizeof(V));
  *static_cast<VectorBits<sizeof(V)>*>(memory) = bits;
#else
  host_executor::store(memory, &value, sizeof(V));
#endif
}

KEYE_DEVICE void thread_fence() {
  KEYE_CUDA_OR_HOST(__threadfence(), host_executor::thread_fence());
}

// ---- relaxed atomics on uint32_t and uint64_t; they return the old value ----

#if defined(__CUDACC__)
template <class T>
using AtomicWord = std::conditional_t<sizeof(T) == 8, unsigned long long, unsigned>;
#else
KEYE_DEVICE uint32_t host_atomic(host_executor::Atomic op, uint32_t* memory, uint32_t value,
                                 uint32_t compare = 0) {
  return host_executor::atomic32(op, memory, value, compare);
}
KEYE_DEVICE uint64_t host_atomic(host_executor::Atomic op, uint64_t* memory, uint64_t value,
                                 uint64_t compare = 0) {
  return host_executor::atomic64(op, memory, value, compare);
}
#endif

#define KEYE_ATOMIC(name, intrinsic, op)                                           \
  template <class T>                                                               \
  KEYE_DEVICE T name(T* memory, T value) {                                         \
    return KEYE_CUDA_OR_HOST(                                                      \
        intrinsic(reinterpret_cast<AtomicWord<T>*>(memory), AtomicWord<T>{value}), \
        host_atomic(host_executor::Atomic::op, memory, value));                    \
  }
KEYE_ATOMIC(atomic_add, atomicAdd, kAdd)
KEYE_ATOMIC(atomic_max, atomicMax, kMax)
KEYE_ATOMIC(atomic_or, atomicOr, kOr)
KEYE_ATOMIC(atomic_exchange, atomicExch, kExchange)
#undef KEYE_ATOMIC
template <class T>
KEYE_DEVICE T atomic_compare_and_swap(T* memory, T compare, T value) {
  return KEYE_CUDA_OR_HOST(
      atomicCAS(reinterpret_cast<AtomicWord<T>*>(memory), AtomicWord<T>{compare},
                AtomicWord<T>{value}),
      host_atomic(host_executor::Atomic::kCompareAndSwap, memory, value, compare));
}

}  // namespace keye_ops
