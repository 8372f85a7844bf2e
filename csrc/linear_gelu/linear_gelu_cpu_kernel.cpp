// linear_gelu on the CPU: GELU, or the gradient's way through it, in place over the hidden values.
#include <algorithm>
#include <type_traits>

#include "common/gelu.h"
#include "linear_gelu/linear_gelu_cpu.h"

namespace keye_ops::KEYE_ISA {
namespace {

template <bool kTanh, bool kBackward, class V>
KEYE_HOST_DEVICE V gelu_or_gradient(V hidden, V dout) {
  const auto gate = kTanh ? gelu_tanh_gate(hidden) : gelu_gate(hidden);
  return kBackward ? dout * (gate.value + hidden * gate.slope) : hidden * gate.value;
}

template <bool kTanh, bool kBackward, class T>
void pass(T* hidden, const T* dout, int64_t length) {
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t i = 0; i < length; i++) {
      hidden[i] = gelu_or_gradient<kTanh, kBackward>(hidden[i], kBackward ? dout[i] : 0.0);
    }
  } else {
    constexpr int64_t kStep = 2 * kSimdWidth;
    using Vectors = Pair<Floats>;
    const auto step = [](T* h, const T* d) __attribute__((always_inline)) {
      const Vectors x = load_as(Vectors{}, h), dx = kBackward ? load_as(Vectors{}, d) : Vectors{};
      store_as(h, Vectors{gelu_or_gradient<kTanh, kBackward>(x.first, dx.first),
                          gelu_or_gradient<kTanh, kBackward>(x.second, dx.second)});
    };
    int64_t i = 0;
    for (; i + kStep <= length; i += kStep) step(hidden + i, dout + i);
    if (i == length) return;
    // The rest goes through whole vectors too, so that its bits are the same.
    T h[kStep] = {}, d[kStep] = {};
    std::copy(hidden + i, hidden + length, h);
    if (kBackward) std::copy(dout + i, dout + length, d);
    step(h, d);
    std::copy(h, h + (length - i), hidden + i);
  }
}

}  // namespace

void linear_gelu_pass(const LinearGeluParams& params, Dtype dtype, int64_t begin, int64_t end) {
  with_type_of(dtype, [&](auto type) {
    using T = decltype(type);
    T* hidden = static_cast<T*>(params.hidden) + begin;
    const T* dout = static_cast<const T*>(params.dout);
    const int64_t length = end - begin;
    if (dout == nullptr) {
      params.tanh ? pass<true, false, T>(hidden, hidden, length)
                  : pass<false, false, T>(hidden, hidden, length);
    } else {
      params.tanh ? pass<true, true>(hidden, dout + begin, length)
                  : pass<false, true>(hidden, dout + begin, length);
    }
  });
}

}  // namespace keye_ops::KEYE_ISA
