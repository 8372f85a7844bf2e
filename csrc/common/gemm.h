// A product of bf16 matrices with a fused epilogue: what its launcher is told.
#pragma once

#include <cstdint>
#include <limits>

namespace keye_ops {

// out = epilogue(a @ b.T); rows are contiguous and start at multiples of 16 bytes.
struct GemmParams {
  const void* a;  // [m, k], row stride a_stride
  const void* b;  // [n, k], row stride b_stride
  void* out;      // [m, n], row stride n
  int64_t a_stride, b_stride;
  int64_t m, n, k;
};

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Whether the kernels take it: something to multiply, in rows of whole 16 bytes.
inline bool is_fit(const GemmParams& params) {
  constexpr int64_t kVector = 8, kMax = std::numeric_limits<int32_t>::max() - 1024;
  const int64_t sizes[] = {params.m, params.n, params.k};
  for (int64_t size : sizes) {
    if (size < 1 || size > kMax) return false;
  }
  return is_aligned(params.a) && is_aligned(params.b) && is_aligned(params.out) &&
         params.n % kVector == 0 && params.k % kVector == 0 && params.a_stride % kVector == 0 &&
         params.b_stride % kVector == 0 && params.a_stride >= params.k &&
         params.b_stride >= params.k;
}

}  // namespace keye_ops
