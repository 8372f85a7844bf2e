// 16 bytes of memory as fp32 values in registers.
#pragma once

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/memory.cuh"
#include "common/ptx/approx.cuh"

namespace keye_ops {

constexpr int kVectorBytes = 16;

template <class T>
constexpr int kVectorSize = kVectorBytes / static_cast<int>(sizeof(T));

// 16 bytes as they lie in memory.
struct alignas(16) Chunk {
  uint32_t values[4];
};

KEYE_DEVICE float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
KEYE_DEVICE uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

KEYE_DEVICE float to_float(BFloat16 x) { return float_of_bits(uint32_t{x.bits} << 16); }
KEYE_DEVICE float to_float(Half x) {
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(x.bits));
#else
  _Float16 half;
  memcpy(&half, &x.bits, sizeof(half));
  return half;
#endif
}

template <class T>
KEYE_DEVICE void unpack(const Chunk& chunk, float (&values)[kVectorSize<T>]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t word = chunk.values[i];
    if constexpr (sizeof(T) == 4) {
      values[i] = float_of_bits(word);
    } else {
      values[2 * i] = to_float(T{static_cast<uint16_t>(word)});
      values[2 * i + 1] = to_float(T{static_cast<uint16_t>(word >> 16)});
    }
  }
}

// Every two adjacent values swapped.
template <class T>
KEYE_DEVICE Chunk swap_adjacent(const Chunk& chunk) {
  Chunk swapped;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t word = chunk.values[i];
    swapped.values[i] = sizeof(T) == 2 ? word << 16 | word >> 16 : chunk.values[i ^ 1];
  }
  return swapped;
}

// p must be aligned to 16 bytes.
template <class T>
KEYE_DEVICE void load_vector(const T* p, float (&values)[kVectorSize<T>]) {
  unpack<T>(load_bytes<Chunk>(p), values);
}

// Rounded to T.
template <class T>
KEYE_DEVICE Chunk pack(const float (&values)[kVectorSize<T>]) {
  Chunk chunk;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 4) {
      chunk.values[i] = bits_of_float(values[i]);
    } else {
      chunk.values[i] = ptx::cvt_rn_x2<T>(values[2 * i], values[2 * i + 1]);
    }
  }
  return chunk;
}

// p must be aligned to 16 bytes.
template <class T>
KEYE_DEVICE void store_vector(T* p, const float (&values)[kVectorSize<T>]) {
  store_bytes(p, pack<T>(values));
}

}  // namespace keye_ops
