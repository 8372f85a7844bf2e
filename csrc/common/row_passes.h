// Passes over a row on the CPU: vectors of it at a time, and sums over it.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace keye_ops {

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

}  // namespace keye_ops
