// linear_gelu on the CPU: GELU of the hidden values, or the gradient's way through it.
#include <algorithm>
#include <type_traits>

#include "common/gelu.h"
#include "linear_gelu/linear_gelu_cpu.h"

namespace keye_ops::KEYE_ISA {
namespace {

template <bool kTanh, bool kBackward, class V>
KEYE_HOST_DEVICE V gelu_or_gradient(V hidden, V dout) {
  return kBackward ? gelu_dx<kTanh>(hidden, dout) : gelu<kTanh>(hidden);
}

template <bool kTanh, bool kBackward, class T>
void pass(T* out, const T* hidden, const T* dout, int64_t length) {
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t i = 0; i < length; i++) {
      out[i] = gelu_or_gradient<kTanh, kBackward>(hidden[i], kBackward ? dout[i] : 0.0);
    }
  } else {
    constexpr int64_t kStep = 2 * kSimdWidth;
    using Vectors = Pair<Floats>;
    const auto step = [](T* o, const T* h, const T* d) __attribute__((always_inline)) {
      const Vectors x = load_as(Vectors{}, h), dx = kBackward ? load_as(Vectors{}, d) : Vectors{};
      store_as(o, Vectors{gelu_or_gradient<kTanh, kBackward>(x.first, dx.first),
                          gelu_or_gradient<kTanh, kBackward>(x.second, dx.second)});
    };
    int64_t i = 0;
    for (; i + kStep <= length; i += kStep) step(out + i, hidden + i, dout + i);
    if (i == length) return;
    // The rest goes through whole vectors too, so that its bits are the same.
    T h[kStep] = {}, d[kStep] = {};
    std::copy(hidden + i, hidden + length, h);
    if (kBackward) std::copy(dout + i, dout + length, d);
    step(h, h, d);
    std::copy(h, h + (length - i), out + i);
  }
}

}  // namespace

void linear_gelu_pass(const LinearGeluParams& params, Dtype dtype, int64_t begin, int64_t end) {
  with_type_of(dtype, [&](auto type) {
    using T = decltype(type);
    T* out = static_cast<T*>(params.out) + begin;
    const T* hidden = static_cast<const T*>(params.hidden) + begin;
    const T* dout = static_cast<const T*>(params.dout);
    const int64_t length = end - begin;
    if (dout == nullptr) {
      params.tanh ? pass<true, false>(out, hidden, hidden, length)
                  : pass<false, false>(out, hidden, hidden, length);
    } else {
      params.tanh ? pass<true, true>(out, hidden, dout + begin, length)
                  : pass<false, true>(out, hidden, dout + begin, length);
    }
  });
}

}  // namespace keye_ops::KEYE_ISA
