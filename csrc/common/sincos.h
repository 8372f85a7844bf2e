// sin and cos of one angle, for float, for a vector of floats, and for device code.
#pragma once

#include <cmath>

#include "common/fused_multiply_add.h"
#include "common/host_device.h"

namespace keye_ops {

#if defined(__CUDACC__)
KEYE_HOST_DEVICE float floor_of(float x) { return floorf(x); }
KEYE_HOST_DEVICE float round_of(float x) { return rintf(x); }
#endif

// Absolute error below 6e-8 for |angle| <= 2**20 and 1.2e-7 up to 2**24. The angle is reduced by
// multiples of pi / 2 in fused steps (Cody and Waite) to a sum of two floats, then two polynomials
// apply, fitted to the least largest relative error on [-pi/4, pi/4] (4e-9 and 2e-10). Quadrants
// are chosen by arithmetic with exact 0 and 1, so that one source serves scalars, vectors and
// device code.
template <class V>
KEYE_HOST_DEVICE void sincos(V angle, V& sin_out, V& cos_out) {
  constexpr float kTwoOverPi = 0.636619772367581343f;
  const V kPiOver2High = V{} + 1.57079637050628662109375f;
  const V kPiOver2Middle = V{} - 4.37113900018624283e-8f;
  const V kPiOver2Low = V{} - 1.71512322e-15f;

  // NOTE: rounding a product above 2**23 can miss the nearest multiple by one; a second look finds
  // it.
  V n = round_of(angle * kTwoOverPi);
  V first = fused_multiply_add(-n, kPiOver2High, angle);  // exact
  const V missed = round_of(fused_multiply_add(-n, kPiOver2Middle, first) * kTwoOverPi);
  n += missed;
  first = fused_multiply_add(-missed, kPiOver2High, first);
  const V r = fused_multiply_add(-n, kPiOver2Middle, first);
  const V lost = fused_multiply_add(-n, kPiOver2Middle, first - r);  // by the rounding of r
  const V r_low = fused_multiply_add(-n, kPiOver2Low, lost);

  const V z = r * r;
  const V half_z = 0.5f * z;
  const V one_minus = 1.0f - half_z;
  const V s =
      r + (r * z * (-1.6666654573e-1f + z * (8.3321583996e-3f + z * -1.9514956546e-4f)) + r_low);
  const V c_low = z * z * (4.1666645618e-2f + z * (-1.3887313044e-3f + z * 2.4432783229e-5f));
  const V c = one_minus + (((1.0f - one_minus) - half_z) + (c_low - r * r_low));

  // Odd quadrants swap sine and cosine; quadrants 2 and 3 negate both.
  const V half = floor_of(n * 0.5f);
  const V odd = n - 2.0f * half;
  const V sign = 1.0f - 2.0f * (half - 2.0f * floor_of(half * 0.5f));
  sin_out = sign * (s * (1.0f - odd) + c * odd);
  cos_out = sign * (c * (1.0f - odd) - s * odd);
}

// fp64 exists for gradient checks only, where speed does not matter.
KEYE_HOST_DEVICE void sincos(double angle, double& sin_out, double& cos_out) {
  sin_out = ::sin(angle);
  cos_out = ::cos(angle);
}

}  // namespace keye_ops
