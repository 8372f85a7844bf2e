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

// p must be aligned to 16 bytes.
template <class T>
KEYE_DEVICE void load_vector(const T* p, float (&values)[kVectorSize<T>]) {
  union {
    uint4 bits;
    T elements[kVectorSize<T>];
  };
  bits = *reinterpret_cast<const uint4*>(p);
#pragma unroll
  for (int i = 0; i < kVectorSize<T>; i++) values[i] = to_float(elements[i]);
}

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
