// GELU and its derivative, exact and by tanh: for a vector of floats and for double on the host,
// for a float in kernels.
#pragma once

#include <cmath>
#include <type_traits>

#if defined(__CUDACC__) || defined(KEYE_HOST_EXECUTOR)
#include "common/float_math.cuh"
#else
#include "common/exp.h"
#endif

namespace keye_ops {

// gelu(x) = x * value, and gelu'(x) = value + x * slope: the slope is the value's derivative.
template <class V>
struct GeluGate {
  V value, slope;
};

// From here on both forms are 0 on the left and the identity on the right, in every dtype's steps.
constexpr float kGeluEnd = 15.0f;

// |x|, at most kGeluEnd; NaN stays NaN.
template <class V>
KEYE_HOST_DEVICE V gelu_magnitude(V x) {
  if constexpr (std::is_same_v<V, double>) {
    const double magnitude = std::fabs(x);
    return magnitude > 50.0 ? 50.0 : magnitude;  // fp64 has a longer left tail
  } else {
    return -larger_of(V{} - kGeluEnd, x < 0.0f ? x : -x);
  }
}

// The exact form: value is the normal distribution at x. Below zero it is exp(-x**2 / 2) times a
// smooth function of 1 / (1 + 0.35 |x|), so nothing cancels in the left tail: the relative error is
// below 5e-7 from -1 on and, as x**2 is rounded, below 1e-5 at -13.
template <class V>
KEYE_HOST_DEVICE GeluGate<V> gelu_gate(V x) {
  if constexpr (std::is_same_v<V, double>) {
    const double value = 0.5 * std::erfc(x * -0.70710678118654752440);
    return {value, 0.39894228040143267794 * std::exp(-0.5 * x * x)};
  } else {
    const V a = gelu_magnitude(x);
    const V t = reciprocal_of(1.0f + 0.35f * a);
    V y = V{} - 2.9163932e-2f;
    y = y * t + 1.4406084e-1f;
    y = y * t - 2.5590193e-1f;
    y = y * t + 1.5939298e-1f;
    y = y * t - 2.3263879e-2f;
    y = y * t + 1.0557482e-1f;
    y = y * t + 1.1981549e-1f;
    y = y * t + 1.3986434e-1f;
    y = y * t + 1.3962126e-1f;
    const V bell = exp2_nonpositive(-0.72134752f * (a * a));
    const V left = bell * (y * t);
    return {x > 0.0f ? 1.0f - left : left, 0.39894228f * bell};
  }
}

// The tanh form: (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x**3) is the logistic
// function of 2 u, which does not cancel.
template <class V>
KEYE_HOST_DEVICE GeluGate<V> gelu_tanh_gate(V x) {
  using C = std::conditional_t<std::is_same_v<V, double>, double, float>;
  constexpr C kOne = 1, kScale = C(-2 * 0.79788456080286535588 * 1.44269504088896340736);
  constexpr C kTwiceScale = C(2 * 0.79788456080286535588), kCubic = C(0.044715);
  const V a = gelu_magnitude(x);
  const V square = kCubic * (a * a);
  const V e = exp2_nonpositive(V(kScale * a * (kOne + square)));
  const V right = reciprocal_of(V(kOne + e)), left = e * right;
  return {x > C(0) ? right : left, kTwiceScale * (kOne + C(3) * square) * (left * right)};
}

// gelu(x), or a gradient's way back through it.
template <bool kTanh, class V>
KEYE_HOST_DEVICE V gelu(V x) {
  if constexpr (kTanh) return x * gelu_tanh_gate(x).value;
  return x * gelu_gate(x).value;
}
template <bool kTanh, class V>
KEYE_HOST_DEVICE V gelu_dx(V x, V dout) {
  const auto gate = kTanh ? gelu_tanh_gate(x) : gelu_gate(x);
  return dout * (gate.value + x * gate.slope);
}

}  // namespace keye_ops
