// C (+)= A B of small matrices that lie in cache, B in panels: rows of its inner dimension, each as
// wide as C. For files that are compiled once for every instruction set.
//
// Every element of C is added up over the inner dimension in the same order whatever tile it falls
// into: a row's result does not depend on its neighbours.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/simd.h"

namespace keye_ops::KEYE_ISA {
namespace {

// Two neighbours of the inner dimension, the first in the low half.
struct BFloat16Pair {
  uint32_t bits;
};

// What products multiply for tensors of T, and what they add up in.
#if defined(__AVX512BF16__)
template <class T>
using Word =
    std::conditional_t<std::is_same_v<T, double>, double,
                       std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16Pair, float>>;
#else
template <class T>
using Word = std::conditional_t<std::is_same_v<T, double>, double, float>;
#endif
template <class W>
using Sum = std::conditional_t<std::is_same_v<W, double>, double, float>;
template <class W>
constexpr int kElements = std::is_same_v<W, BFloat16Pair> ? 2 : 1;

// Storage of A and C has whole kRowUnits of rows, that of A and B whole units of the inner
// dimension (zeros behind the end), that of B and C whole vectors of columns.
constexpr int kRowUnit = 16;
#if defined(__AMX_BF16__)
template <class W>
constexpr int kInnerUnit = std::is_same_v<W, BFloat16Pair> ? 16 : 1;  // words
#else
template <class W>
constexpr int kInnerUnit = 1;
#endif
constexpr int kColumnUnit = 16;

constexpr int round_up(int x, int unit) { return (x + unit - 1) / unit * unit; }

// Registers hold kTileRows x kTileVectors sums, the vectors of a row of B, and one of A.
#if defined(__AVX512F__)
constexpr int kTileRows = 5, kTileVectors = 5;
#else
constexpr int kTileRows = 6, kTileVectors = 2;
#endif

KEYE_HOST_DEVICE Floats multiply_add(float a, const float* b, Floats sum) {
  return sum + a * load_vector(b);
}
#if defined(__AVX512BF16__)
KEYE_HOST_DEVICE Floats multiply_add(BFloat16Pair a, const BFloat16Pair* b, Floats sum) {
  const __m512i pair = _mm512_set1_epi32(static_cast<int>(a.bits));
  const __m512i row = _mm512_loadu_si512(b);
  return bit_cast<Floats>(
      _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(row), bit_cast<__m512bh>(pair)));
}
#endif

// Steps of the inner dimension that are added up before they join C: long chains lose accuracy.
template <class W>
constexpr int kChain = std::is_same_v<W, float> ? 32 : 128;

template <int kRows, int kVectors, class W>
void multiply_tile(const W* a, int64_t a_stride, const W* b, int64_t b_stride, float* c,
                   int64_t c_stride, int inner, bool accumulate) {
  for (int first = 0; first < inner; first += kChain<W>) {
    const int end = inner - first < kChain<W> ? inner : first + kChain<W>;
    Floats sums[kRows][kVectors] = {};
    for (int k = first; k < end; k++) {
      for (int r = 0; r < kRows; r++) {
        const W factor = a[r * a_stride + k];
        for (int v = 0; v < kVectors; v++) {
          sums[r][v] = multiply_add(factor, b + k * b_stride + v * kSimdWidth, sums[r][v]);
        }
      }
    }
    const bool adds = accumulate || first > 0;
    for (int r = 0; r < kRows; r++) {
      for (int v = 0; v < kVectors; v++) {
        float* sum = c + r * c_stride + v * kSimdWidth;
        store_vector(sum, adds ? load_vector(sum) + sums[r][v] : sums[r][v]);
      }
    }
  }
}

// Calls f with count as a type, for count in [1, kMost].
template <int kMost, class F>
KEYE_HOST_DEVICE void with_count(int count, const F& f) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_count<kMost - 1>(count, f);
  }
  f(std::integral_constant<int, kMost>{});
}

// c [rows, columns] (+)= a [rows, inner] b [inner, columns]; strides and inner are in words.
template <class W>
void multiply(const W* a, int64_t a_stride, const W* b, int64_t b_stride, float* c,
              int64_t c_stride, int rows, int columns, int inner, bool accumulate) {
  const int vectors = (columns + kSimdWidth - 1) / kSimdWidth;
  for (int first = 0; first < vectors; first += kTileVectors) {
    const int count = vectors - first < kTileVectors ? vectors - first : kTileVectors;
    with_count<kTileVectors>(count, [&](auto tile_vectors) {
      for (int row = 0; row < rows; row += kTileRows) {
        const int rest = rows - row < kTileRows ? rows - row : kTileRows;
        with_count<kTileRows>(rest, [&](auto tile_rows) {
          multiply_tile<decltype(tile_rows)::value, decltype(tile_vectors)::value>(
              a + row * a_stride, a_stride, b + first * kSimdWidth, b_stride,
              c + row * c_stride + first * kSimdWidth, c_stride, inner, accumulate);
        });
      }
    });
  }
}

// For gradient checks: speed does not matter.
inline void multiply(const double* a, int64_t a_stride, const double* b, int64_t b_stride,
                     double* c, int64_t c_stride, int rows, int columns, int inner,
                     bool accumulate) {
  for (int r = 0; r < rows; r++) {
    double* row = c + r * c_stride;
    for (int j = 0; j < columns && !accumulate; j++) row[j] = 0;
    for (int k = 0; k < inner; k++) {
      const double factor = a[r * a_stride + k];
      for (int j = 0; j < columns; j++) row[j] += factor * b[k * b_stride + j];
    }
  }
}

#if defined(__AMX_BF16__)

// 32 x 32 sums in four registers of 16 x 16, or fewer.
template <bool kTwoRows, bool kTwoColumns>
KEYE_HOST_DEVICE void start_amx_tile(const float* c, int64_t c_stride, bool accumulate) {
  const int64_t bytes = c_stride * 4;
  if (accumulate) {
    _tile_loadd(0, c, bytes);
    if constexpr (kTwoColumns) _tile_loadd(1, c + 16, bytes);
    if constexpr (kTwoRows) _tile_loadd(2, c + 16 * c_stride, bytes);
    if constexpr (kTwoRows && kTwoColumns) _tile_loadd(3, c + 16 * c_stride + 16, bytes);
  } else {
    _tile_zero(0);
    if constexpr (kTwoColumns) _tile_zero(1);
    if constexpr (kTwoRows) _tile_zero(2);
    if constexpr (kTwoRows && kTwoColumns) _tile_zero(3);
  }
}

// Sixteen words of the inner dimension.
template <bool kTwoRows, bool kTwoColumns>
KEYE_HOST_DEVICE void add_amx_tile(const BFloat16Pair* a, int64_t a_stride, const BFloat16Pair* b,
                                   int64_t b_stride) {
  const int64_t a_bytes = a_stride * 4, b_bytes = b_stride * 4;
  _tile_loadd(6, b, b_bytes);
  _tile_loadd(4, a, a_bytes);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kTwoColumns) {
    _tile_loadd(7, b + 16, b_bytes);
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (kTwoRows) {
    _tile_loadd(5, a + 16 * a_stride, a_bytes);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (kTwoColumns) _tile_dpbf16ps(3, 5, 7);
  }
}

template <bool kTwoRows, bool kTwoColumns>
KEYE_HOST_DEVICE void store_amx_tile(float* c, int64_t c_stride) {
  const int64_t bytes = c_stride * 4;
  _tile_stored(0, c, bytes);
  if constexpr (kTwoColumns) _tile_stored(1, c + 16, bytes);
  if constexpr (kTwoRows) _tile_stored(2, c + 16 * c_stride, bytes);
  if constexpr (kTwoRows && kTwoColumns) _tile_stored(3, c + 16 * c_stride + 16, bytes);
}

// Writes whole kRowUnits of rows.
inline void multiply(const BFloat16Pair* a, int64_t a_stride, const BFloat16Pair* b,
                     int64_t b_stride, float* c, int64_t c_stride, int rows, int columns, int inner,
                     bool accumulate) {
  for (int column = 0; column < columns; column += 32) {
    for (int row = 0; row < rows; row += 32) {
      const auto tile = [&](auto two_rows, auto two_columns) {
        constexpr bool kRows = decltype(two_rows)::value, kColumns = decltype(two_columns)::value;
        float* sums = c + row * c_stride + column;
        start_amx_tile<kRows, kColumns>(sums, c_stride, accumulate);
        for (int k = 0; k < inner; k += 16) {
          add_amx_tile<kRows, kColumns>(a + row * a_stride + k, a_stride, b + k * b_stride + column,
                                        b_stride);
        }
        store_amx_tile<kRows, kColumns>(sums, c_stride);
      };
      const bool two_rows = rows - row > 16, two_columns = columns - column > 16;
      if (two_rows && two_columns) tile(std::true_type{}, std::true_type{});
      if (two_rows && !two_columns) tile(std::true_type{}, std::false_type{});
      if (!two_rows && two_columns) tile(std::false_type{}, std::true_type{});
      if (!two_rows && !two_columns) tile(std::false_type{}, std::false_type{});
    }
  }
}

// The same products, a step of the inner dimension at a time, so that they run between other work:
// the tile unit is one of its own, and the sums stay in its registers.
template <class W>
class ProductQueue;
template <>
class ProductQueue<BFloat16Pair> {
 public:
  void add(const BFloat16Pair* a, int64_t a_stride, const BFloat16Pair* b, int64_t b_stride,
           float* c, int64_t c_stride, int rows, int columns, int inner, bool accumulate) {
    for (int column = 0; column < columns; column += 32) {
      for (int row = 0; row < rows; row += 32) {
        if (end_ == kCapacity) run_all();
        jobs_[end_++] = {a + row * a_stride,
                         b + column,
                         c + row * c_stride + column,
                         a_stride,
                         b_stride,
                         c_stride,
                         inner,
                         (rows - row > 16 ? 2 : 0) + (columns - column > 16 ? 1 : 0),
                         accumulate};
        steps_ += inner / 16;
      }
    }
  }

  // An equal share of what is queued, where it will be asked `times` times in all.
  void run_some(int times) {
    for (int i = (steps_ + times - 1) / times; i > 0; i--) step();
  }
  void run_all() {
    while (steps_ > 0) step();
    begin_ = end_ = 0;
  }

 private:
  struct Job {
    const BFloat16Pair *a, *b;
    float* c;
    int64_t a_stride, b_stride, c_stride;
    int inner, shape;
    bool accumulate;
  };

  void step() {
    const Job& job = jobs_[begin_];
    switch (job.shape) {
      case 0:
        return step_of<false, false>(job);
      case 1:
        return step_of<false, true>(job);
      case 2:
        return step_of<true, false>(job);
      default:
        return step_of<true, true>(job);
    }
  }
  template <bool kTwoRows, bool kTwoColumns>
  KEYE_HOST_DEVICE void step_of(const Job& job) {
    if (k_ == 0) start_amx_tile<kTwoRows, kTwoColumns>(job.c, job.c_stride, job.accumulate);
    add_amx_tile<kTwoRows, kTwoColumns>(job.a + k_, job.a_stride, job.b + k_ * job.b_stride,
                                        job.b_stride);
    k_ += 16;
    steps_--;
    if (k_ < job.inner) return;
    store_amx_tile<kTwoRows, kTwoColumns>(job.c, job.c_stride);
    k_ = 0;
    begin_++;
  }

  static constexpr int kCapacity = 64;
  Job jobs_[kCapacity];
  int begin_ = 0, end_ = 0, k_ = 0, steps_ = 0;
};

// While it lives the tile registers are 16 rows of 64 bytes.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

#else

struct TileRegisters {
  TileRegisters() {}  // not trivial: no warning that it goes unused
};

#endif

#if defined(__AMX_BF16__)
template <class W>
constexpr bool kInBackground = std::is_same_v<W, BFloat16Pair>;
#else
template <class W>
constexpr bool kInBackground = false;
#endif

// Without a unit of its own nothing is gained by waiting.
template <class W>
class ProductQueue {
 public:
  template <class... Args>
  void add(const Args&... args) {
    multiply(args...);
  }
  void run_some(int) {}
  void run_all() {}
};

// ---- packing ----

// A row of x as words, with zeros up to `words`, and where words are pairs up to 15 behind them:
// pack rows in order, and leave kRowSlack behind the last. factor is exact: -1, 0 or 1.
constexpr int kRowSlack = 16;
template <class T, class W>
KEYE_HOST_DEVICE void pack_row(const T* x, int size, W* row, int words, Sum<W> factor = 1) {
  if constexpr (std::is_same_v<W, BFloat16Pair>) {
#if defined(__AVX512BF16__)
    for (int w = 0; w < words; w += 16) {
      const int rest = size - 2 * w;
      const __mmask32 mask = rest >= 32  ? ~__mmask32{0}
                             : rest <= 0 ? 0
                                         : (__mmask32{1} << rest) - 1;
      _mm512_storeu_si512(row + w, _mm512_maskz_loadu_epi16(mask, x + 2 * w));
    }
#endif
    if (factor == 1) return;
    auto* values = reinterpret_cast<BFloat16*>(row);
    for (int d = 0; d < size; d++) store(values + d, load(values + d) * factor);
  } else {
    int d = 0;
    if constexpr (std::is_same_v<W, float>) {
      for (; d + kSimdWidth <= size; d += kSimdWidth) {
        store_vector(row + d, load_vector(x + d) * factor);
      }
    }
    for (; d < size; d++) row[d] = load(x + d) * factor;
    for (; d < words; d++) row[d] = 0;
  }
}

#if defined(__AVX512F__)
// Sixteen rows of sixteen words, transposed.
KEYE_HOST_DEVICE void transpose_words(const void* in, int64_t in_stride, void* out,
                                      int64_t out_stride) {
  const auto* source = static_cast<const uint32_t*>(in);
  auto* target = static_cast<uint32_t*>(out);
  __m512i x[16], y[16];
  for (int i = 0; i < 16; i++) x[i] = _mm512_loadu_si512(source + i * in_stride);
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    const __m512i low = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    y[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
    y[i + 8] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    y[i + 4] = _mm512_shuffle_i32x4(high, high2, 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
  for (int i = 0; i < 16; i++) _mm512_storeu_si512(target + i * out_stride, y[i]);
}
#endif

// Sixteen rows of `words` words (storage: whole kColumnUnits) as sixteen columns of a panel.
template <class W>
KEYE_HOST_DEVICE void pack_columns(const W* rows, int64_t row_stride, int words, W* panel,
                                   int64_t panel_stride) {
#if defined(__AVX512F__)
  if constexpr (sizeof(W) == 4) {
    for (int w = 0; w < words; w += 16) {
      transpose_words(rows + w, row_stride, panel + w * panel_stride, panel_stride);
    }
    return;
  }
#endif
  for (int i = 0; i < 16; i++) {
    for (int w = 0; w < words; w++) panel[w * panel_stride + i] = rows[i * row_stride + w];
  }
}

// Two rows as one row of pairs.
KEYE_HOST_DEVICE void interleave(const uint16_t* first, const uint16_t* second, BFloat16Pair* out,
                                 int columns) {
  for (int j = 0; j < columns; j += kSimdWidth) {
    const Words pairs = load_halves(first + j) | (load_halves(second + j) << 16);
    std::memcpy(out + j, &pairs, sizeof(pairs));
  }
}

}  // namespace
}  // namespace keye_ops::KEYE_ISA
