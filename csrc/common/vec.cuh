// 16 bytes of memory as fp32 values in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/thread.cuh"

namespace keye_ops {

constexpr int kVectorBytes = 16;

template <class T>
constexpr int kVectorSize = kVectorBytes / static_cast<int>(sizeof(T));

KEYE_DEVICE float to_float(float x) { return x; }
KEYE_DEVICE float to_float(__half x) { return __half2float(x); }
KEYE_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

KEYE_DEVICE float float_of_bits(uint32_t bits) {
  union {
    uint32_t word;
    float value;
  };
  word = bits;
  return value;
}

template <class T>
KEYE_DEVICE T from_float(float x);
template <>
KEYE_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
KEYE_DEVICE __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
KEYE_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// 16 bytes as they lie in memory.
struct alignas(16) Chunk {
  uint32_t values[4];
};

// p must be aligned to 16 bytes.
template <class T>
KEYE_DEVICE Chunk load_chunk(const T* p) {
  const uint4 bits = *reinterpret_cast<const uint4*>(p);
  return {{bits.x, bits.y, bits.z, bits.w}};
}

template <class T>
KEYE_DEVICE void unpack(const Chunk& chunk, float (&values)[kVectorSize<T>]) {
  union {
    Chunk bits;
    T elements[kVectorSize<T>];
  };
  bits = chunk;
#pragma unroll
  for (int i = 0; i < kVectorSize<T>; i++) values[i] = to_float(elements[i]);
}
// NOTE: two instructions a word where the general form takes three.
template <>
KEYE_DEVICE void unpack<__nv_bfloat16>(const Chunk& chunk, float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    values[2 * i] = float_of_bits(chunk.values[i] << 16);
    values[2 * i + 1] = float_of_bits(chunk.values[i] & 0xffff0000u);
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
  unpack<T>(load_chunk(p), values);
}

// p must be aligned to 16 bytes.
template <class T>
KEYE_DEVICE void store_vector(T* p, const float (&values)[kVectorSize<T>]) {
  union {
    uint4 bits;
    T elements[kVectorSize<T>];
  };
#pragma unroll
  for (int i = 0; i < kVectorSize<T>; i++) elements[i] = from_float<T>(values[i]);
  *reinterpret_cast<uint4*>(p) = bits;
}

}  // namespace keye_ops
