// LayerNorm of a row: the formulas, once for host and device, and the passes over a row on the CPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"
#if !defined(__CUDACC__)
#include "common/simd.h"
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

#if !defined(__CUDACC__)

// The values of a row: side * side pieces of equal length, in the order (row, column) of a square.
// A piece is contiguous.
template <class T>
struct RowPieces {
  T* corner;
  int64_t stride_row, stride_column;  // between pieces, in elements
  int64_t side;

  KEYE_HOST_DEVICE T* piece(int64_t k) const {
    return side == 1 ? corner : corner + k / side * stride_row + k % side * stride_column;
  }
};

template <class T>
KEYE_HOST_DEVICE RowPieces<T> one_piece(T* row) {
  return {row, 0, 0, 1};
}

// Asks for a row that a later call reads: the passes over one row leave the memory idle.
template <class T>
KEYE_HOST_DEVICE void prefetch_row(const T* row, int64_t length) {
  for (int64_t d = 0; d < length; d += 64 / static_cast<int64_t>(sizeof(T))) {
    __builtin_prefetch(row + d);
  }
}

// Calls step(kind, d, lane) for pairs of vectors from d on, for a vector, then for single values;
// kind is a value of the type to load. Neighbouring steps have other lanes, so that sums need not
// wait. Pairs lie in an order of their own; kInMemory does without.
enum class Order { kAny, kInMemory };

template <class C, Order kOrder = Order::kAny, class F>
KEYE_HOST_DEVICE void for_each_lanes(int64_t begin, int64_t end, const F& step) {
  int64_t d = begin;
  if constexpr (kOrder == Order::kAny) {
    for (; d + 4 * kSimdWidth <= end; d += 4 * kSimdWidth) {
      step(Pair<Lanes<C>>{}, d, 0);
      step(Pair<Lanes<C>>{}, d + 2 * kSimdWidth, 1);
    }
    for (; d + 2 * kSimdWidth <= end; d += 2 * kSimdWidth) step(Pair<Lanes<C>>{}, d, 0);
  }
  for (; d + kSimdWidth <= end; d += kSimdWidth) step(Lanes<C>{}, d, 0);
  for (; d < end; d++) step(C{}, d, 0);
}

// NOTE: steps are inlined by force, as all host code that several instruction sets share.
#define KEYE_STEP(kind, d, lane) \
  [&](auto kind, int64_t d, [[maybe_unused]] int lane) __attribute__((always_inline))

// A sum over a row. Short sums in the type of the values go into one in fp64.
constexpr int64_t kSumBlock = 1536;

template <class C>
struct RowSum {
  Pair<Lanes<C>> lanes[2] = {};
  C rest = 0;
  double total = 0;

  KEYE_HOST_DEVICE void add(Pair<Lanes<C>> x, int lane) { lanes[lane] = lanes[lane] + x; }
  KEYE_HOST_DEVICE void add(Lanes<C> x, int lane) { lanes[lane].first += x; }
  KEYE_HOST_DEVICE void add(C x, int) { rest += x; }
  KEYE_HOST_DEVICE void flush() {
    const Pair<Lanes<C>> pair = lanes[0] + lanes[1];
    total += static_cast<double>(sum_of(pair.first + pair.second)) + rest;
    lanes[0] = lanes[1] = Pair<Lanes<C>>{};
    rest = 0;
  }
};

// for_each_lanes whose steps add to sums.
template <class C, Order kOrder = Order::kAny, class F, class... Sums>
KEYE_HOST_DEVICE void sum_lanes(int64_t length, const F& step, Sums&... sums) {
  for (int64_t begin = 0; begin < length; begin += kSumBlock) {
    const int64_t rest = length - begin;
    for_each_lanes<C, kOrder>(begin, begin + (rest < kSumBlock ? rest : kSumBlock), step);
    (sums.flush(), ...);
  }
}

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
