// 2 to a power that is not positive, for a vector of floats and for double.
#pragma once

#include <cmath>

#include "common/simd.h"

namespace keye_ops {

// 2 ** (x + low) for x <= 0, where low is what x lost when it was rounded. Powers below -126.5 give
// 0; NaN stays NaN. The nearest integer is found by adding 1.5 * 2**23, which leaves it in the last
// bits; the polynomials are fitted to 2**f on [-0.5, 0.5] with an exact 1 at 0.
template <class Low>
KEYE_HOST_DEVICE void split_power(Floats x, const Low& add_low, Floats& f, Floats& factor) {
  constexpr float kRound = 12582912.0f;
  x = larger_of(Floats{} - 127.0f, x);
  const Floats shifted = x + kRound;
  f = add_low(x - (shifted - kRound));
  factor = bit_cast<Floats>((bit_cast<Words>(shifted) + 127u) << 23);  // 0 for -127
}

// Relative error below 1.2e-7.
KEYE_HOST_DEVICE Floats exp2_polynomial(Floats f, Floats factor) {
  Floats y = Floats{} + 1.5353362e-4f;
  y = y * f + 1.3398874e-3f;
  y = y * f + 9.6184370e-3f;
  y = y * f + 5.5503324e-2f;
  y = y * f + 2.4022648e-1f;
  y = y * f + 6.9314720e-1f;
  return (y * f + 1.0f) * factor;
}

KEYE_HOST_DEVICE Floats exp2_nonpositive(Floats x) {
  Floats f, factor;
  split_power(x, [](Floats rest) __attribute__((always_inline)) { return rest; }, f, factor);
  return exp2_polynomial(f, factor);
}
KEYE_HOST_DEVICE Floats exp2_nonpositive(Floats x, Floats low) {
  Floats f, factor;
  split_power(
      x, [low](Floats rest) __attribute__((always_inline)) { return rest + low; }, f, factor);
  return exp2_polynomial(f, factor);
}
// One step less, for what becomes bf16: relative error below 2e-7.
KEYE_HOST_DEVICE Floats exp2_nonpositive_fast(Floats x) {
  Floats f, factor;
  split_power(x, [](Floats rest) __attribute__((always_inline)) { return rest; }, f, factor);
  Floats y = Floats{} + 1.3264727e-3f;
  y = y * f + 9.6715130e-3f;
  y = y * f + 5.5507336e-2f;
  y = y * f + 2.4022242e-1f;
  y = y * f + 6.9314700e-1f;
  return (y * f + 1.0f) * factor;
}

KEYE_HOST_DEVICE double exp2_nonpositive(double x) { return std::exp2(x); }

KEYE_HOST_DEVICE Floats reciprocal_of(Floats x) { return 1.0f / x; }
KEYE_HOST_DEVICE double reciprocal_of(double x) { return 1.0 / x; }

}  // namespace keye_ops
