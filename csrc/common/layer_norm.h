// LayerNorm of a row: the formulas, once for host and device, and the passes over a row on the CPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"
#if !defined(__CUDACC__) && !defined(KEYE_HOST_EXECUTOR)
#include "common/row_passes.h"
#endif

namespace keye_ops {

// A first guess at the mean comes from the sum of the row; what it misses by, from the sum of what
// is left. So neither a large offset nor the rounding of the guess gets into the result.
template <class S>
struct RowStatistics {
  S guess;   // of the mean
  S rstd;    // 1 / sqrt(variance + eps)
  S offset;  // (guess - mean) * rstd
};

// From the sums over the row of x - guess and of its square.
template <class S>
KEYE_HOST_DEVICE RowStatistics<S> statistics_from_sums(S guess, S sum, S squares, S size, S eps) {
  const S missed = sum / size;
  const S variance = squares / size - missed * missed;
  const S rstd = 1 / std::sqrt((variance < 0 ? 0 : variance) + eps);  // keeps NaN
  // A small mean goes into the offset alone: x is exact, x - guess is rounded.
  const S mean = guess + missed, offset = -mean * rstd;
  if (offset > -1 && offset < 1) return {0, rstd, offset};
  return {guess, rstd, -missed * rstd};
}

// With one rounding, which is what makes an fp32 result as good as torch's.
template <class V>
KEYE_HOST_DEVICE V multiply_add(V a, V b, V c) {
#if defined(__CUDACC__)
  return a * b + c;  // nvcc makes it one instruction
#elif defined(KEYE_HOST_EXECUTOR)
  return std::fma(a, b, c);
#else
  return fused_multiply_add(a, b, c);
#endif
}

// (x - mean) * rstd.
template <class V, class S>
KEYE_HOST_DEVICE V normalised(V x, const RowStatistics<S>& statistics) {
  return multiply_add(x - statistics.guess, V{} + statistics.rstd, V{} + statistics.offset);
}

// Gradient of y = normed * weight + bias with respect to x. The means are those over the row of
// dy * weight and of dy * weight * normed.
template <class V, class S>
KEYE_HOST_DEVICE V layer_norm_dx(V dy, V weight, V normed, S rstd, S mean, S mean_of_products) {
  const V centred = multiply_add(dy, weight, V{} - mean);
  return rstd * multiply_add(normed, V{} - mean_of_products, centred);
}

#if !defined(__CUDACC__) && !defined(KEYE_HOST_EXECUTOR)

template <class T, class C = Compute<T>>
KEYE_HOST_DEVICE double sum_of_row(const RowPieces<const T>& row, int64_t length) {
  RowSum<C> sum;
  for (int64_t k = 0; k < row.side * row.side; k++) {
    const T* x = row.piece(k);
    sum_lanes<C>(length, KEYE_STEP(kind, d, lane) { sum.add(load_as(kind, x + d), lane); }, sum);
  }
  return sum.total;
}

template <class T, class C = Compute<T>>
KEYE_HOST_DEVICE RowStatistics<C> statistics_of_row(const RowPieces<const T>& row, int64_t length,
                                                    double row_sum, double eps) {
  const double size = static_cast<double>(row.side * row.side * length);
  const C guess = static_cast<C>(row_sum / size);
  RowSum<C> sum, squares;
  for (int64_t k = 0; k < row.side * row.side; k++) {
    const T* x = row.piece(k);
    const auto step = KEYE_STEP(kind, d, lane) {
      const auto centred = load_as(kind, x + d) - guess;
      sum.add(centred, lane);
      squares.add(centred * centred, lane);
    };
    sum_lanes<C>(length, step, sum, squares);
  }
  const auto statistics = statistics_from_sums<double>(guess, sum.total, squares.total, size, eps);
  return {static_cast<C>(statistics.guess), static_cast<C>(statistics.rstd),
          static_cast<C>(statistics.offset)};
}

// out is contiguous.
template <class T, class C = Compute<T>>
KEYE_HOST_DEVICE void normalise_row(const RowPieces<const T>& row, int64_t length,
                                    const RowStatistics<C>& statistics, const T* weight,
                                    const T* bias, T* out) {
  for (int64_t k = 0; k < row.side * row.side; k++) {
    const T* x = row.piece(k);
    const int64_t first = k * length;
    const auto step = KEYE_STEP(kind, d, lane) {
      const int64_t i = first + d;
      const auto normed = normalised(load_as(kind, x + d), statistics);
      store_as(out + i, multiply_add(normed, load_as(kind, weight + i), load_as(kind, bias + i)));
    };
    for_each_lanes<C>(0, length, step);
  }
}

// Gradients of one row. dy and dsum, which is added to dx unless it is null, are contiguous; the
// row's shares of the parameters' gradients are added to dweight and dbias.
template <class T, class C = Compute<T>>
KEYE_HOST_DEVICE void layer_norm_backward_row(const RowPieces<const T>& row, int64_t length,
                                              const T* weight, const T* dy, const T* dsum,
                                              double eps, const RowPieces<T>& dx, double* dweight,
                                              double* dbias) {
  const int64_t pieces = row.side * row.side;
  const RowStatistics<C> statistics = statistics_of_row(row, length, sum_of_row(row, length), eps);
  RowSum<C> weighted_sum, product_sum;
  for (int64_t k = 0; k < pieces; k++) {
    const T* x = row.piece(k);
    const int64_t first = k * length;
    const auto step = KEYE_STEP(kind, d, lane) {
      const int64_t i = first + d;
      const auto normed = normalised(load_as(kind, x + d), statistics);
      const auto grad = load_as(kind, dy + i);
      const auto weighted = grad * load_as(kind, weight + i);
      add_to(dweight + i, grad, normed);
      add_to(dbias + i, grad);
      weighted_sum.add(weighted, lane);
      product_sum.add(weighted * normed, lane);
    };
    sum_lanes<C, Order::kInMemory>(length, step, weighted_sum, product_sum);
  }
  const double size = static_cast<double>(pieces * length);
  const C mean = static_cast<C>(weighted_sum.total / size);
  const C mean_of_products = static_cast<C>(product_sum.total / size);
  for (int64_t k = 0; k < pieces; k++) {
    const T* x = row.piece(k);
    T* out = dx.piece(k);
    const int64_t first = k * length;
    const auto step = KEYE_STEP(kind, d, lane) {
      const int64_t i = first + d;
      const auto normed = normalised(load_as(kind, x + d), statistics);
      auto grad = layer_norm_dx(load_as(kind, dy + i), load_as(kind, weight + i), normed,
                                statistics.rstd, mean, mean_of_products);
      if (dsum != nullptr) grad = grad + load_as(kind, dsum + i);
      store_as(out + d, grad);
    };
    for_each_lanes<C>(0, length, step);
  }
}

#endif

}  // namespace keye_ops
