// Approximations and conversions. Host twins round correctly, which is closer than the hardware
// promises; kernels must not depend on the last bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"
#include "common/thread.cuh"

namespace keye_ops::ptx {

#if !defined(__CUDACC__)
// Subnormal values become zeros of their sign.
KEYE_DEVICE float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? x * 0.0f : x; }

// The bits of a value rounded to 16 bits, to nearest even; every NaN is 0x7fff.
template <class T>
KEYE_DEVICE uint32_t rounded_bits(float x) {
  if (x != x) return 0x7fffu;
  if constexpr (std::is_same_v<T, Half>) {
    const _Float16 rounded = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &rounded, sizeof(bits));
    return bits;
  } else {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  }
}
#endif

// 2 to the x. #floating-point-instructions-ex2
KEYE_DEVICE float ex2_approx_ftz(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return flushed(static_cast<float>(std::exp2(double{flushed(x)})));
#endif
}

// 1 / x. #floating-point-instructions-rcp
KEYE_DEVICE float rcp_approx_ftz(float x) {
#if defined(__CUDACC__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return flushed(1.0f / flushed(x));
#endif
}

// 1 / sqrt(x). #floating-point-instructions-rsqrt
KEYE_DEVICE float rsqrt_approx_ftz(float x) {
#if defined(__CUDACC__)
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return static_cast<float>(1.0 / std::sqrt(double{flushed(x)}));
#endif
}

// cvt.rn.bf16x2.f32, cvt.rn.f16x2.f32: two values as T, the first in the lower half.
// #data-movement-and-conversion-instructions-cvt
template <class T>
KEYE_DEVICE uint32_t cvt_rn_x2(float low, float high) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>, "of 16 bits");
#if defined(__CUDACC__)
  uint32_t packed;
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
#else
  return rounded_bits<T>(low) | rounded_bits<T>(high) << 16;
#endif
}

}  // namespace keye_ops::ptx
