// 2 to a power that is not positive, for a vector of floats and for double.
#pragma once

#include <cmath>

#include "common/simd.h"

namespace keye_ops {

// For x <= 0: relative error below 1.2e-7. Powers below -126.5 give 0; NaN stays NaN. The nearest
// integer is found by adding 1.5 * 2**23, which leaves it in the last bits; the polynomial is
// fitted to 2**f on [-0.5, 0.5] with an exact 1 at 0.
// 2 ** (x + low): low is what x lost when it was rounded.
KEYE_HOST_DEVICE Floats exp2_nonpositive(Floats x, Floats low = Floats{}) {
  constexpr float kRound = 12582912.0f;
  x = larger_of(Floats{} - 127.0f, x);
  const Floats shifted = x + kRound;
  const Floats f = (x - (shifted - kRound)) + low;
  Floats y = Floats{} + 1.5353362e-4f;
  y = y * f + 1.3398874e-3f;
  y = y * f + 9.6184370e-3f;
  y = y * f + 5.5503324e-2f;
  y = y * f + 2.4022648e-1f;
  y = y * f + 6.9314720e-1f;
  y = y * f + 1.0f;
  // An exponent of -127 is a factor of 0.
  return y * bit_cast<Floats>((bit_cast<Words>(shifted) + 127u) << 23);
}

KEYE_HOST_DEVICE double exp2_nonpositive(double x) { return std::exp2(x); }

}  // namespace keye_ops
