// patchify on the CPU: 16 rows at a time are turned on their side, so that the horizontal pass has
// a row in every lane; turned back they wait in a ring for the vertical pass, which has a column
// in every lane.
#include <cstring>

#include "common/arena.h"
#include "common/simd.h"
#include "patchify/patchify_cpu.h"

namespace keye_ops::KEYE_ISA {
namespace {

constexpr int kLanes = kPatchifyRows;
constexpr int kParts = kLanes / kSimdWidth;
static_assert(kLanes == 16, "a square of bytes is turned in four steps");

typedef uint8_t Bytes16 __attribute__((vector_size(16)));

// ---- 16 bytes as 16 words, and back ----

inline Ints load_levels(const uint8_t* p) {
#if defined(__AVX512F__)
  return bit_cast<Ints>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return bit_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Ints x;
  for (int i = 0; i < kSimdWidth; i++) x[i] = p[i];
  return x;
#endif
}

// Of values from 0 to 255.
inline void store_levels(uint8_t* p, Ints x) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_cvtepi32_epi8(bit_cast<__m512i>(x));
  std::memcpy(p, &bytes, sizeof(bytes));
#elif defined(__AVX2__)
  const __m256i words = _mm256_packus_epi32(bit_cast<__m256i>(x), bit_cast<__m256i>(x));
  const __m128i halves = _mm256_castsi256_si128(_mm256_permute4x64_epi64(words, 0x08));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
#else
  for (int i = 0; i < kSimdWidth; i++) p[i] = static_cast<uint8_t>(x[i]);
#endif
}

inline Ints clamped(Ints x) {
  x = x < 0 ? Ints{} : x;
  return x > 255 ? Ints{} + 255 : x;
}

// ---- the two arithmetics: sums of 16 lanes, and what is kept between the passes ----

struct IntegerSums {
  using Weight = int32_t;
  using Between = uint8_t;
  Ints sums[kParts];

  static IntegerSums start(int precision) {
    IntegerSums s;
    for (Ints& part : s.sums) part = Ints{} + (1 << (precision - 1));
    return s;
  }
  void add(int32_t weight, const uint8_t* p) {
    for (int i = 0; i < kParts; i++) sums[i] += load_levels(p + i * kSimdWidth) * weight;
  }
  void store(uint8_t* p, int precision) const {
    for (int i = 0; i < kParts; i++)
      store_levels(p + i * kSimdWidth, clamped(sums[i] >> precision));
  }
  void store_between(uint8_t* p, int precision) const { store(p, precision); }
};

struct FloatSums {
  using Weight = float;
  using Between = float;
  Floats sums[kParts];

  static FloatSums start(int) { return {}; }
  void add(float weight, Floats x, int i) {
    sums[i] = fused_multiply_add(Floats{} + weight, x, sums[i]);
  }
  void add(float weight, const uint8_t* p) {
    for (int i = 0; i < kParts; i++) {
      add(weight, __builtin_convertvector(load_levels(p + i * kSimdWidth), Floats), i);
    }
  }
  void add(float weight, const float* p) {
    for (int i = 0; i < kParts; i++) add(weight, load_vector(p + i * kSimdWidth), i);
  }
  void store(uint8_t* p, int) const {
    for (int i = 0; i < kLanes; i++) {
      p[i] = static_cast<uint8_t>(patchify_level(sums[i / kSimdWidth][i % kSimdWidth]));
    }
  }
  void store_between(float* p, int) const {
    for (int i = 0; i < kParts; i++) store_vector(p + i * kSimdWidth, sums[i]);
  }
};

// ---- squares of 16 x 16 turned: rows become columns ----

inline Bytes16 load16(const uint8_t* p) {
  Bytes16 x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

// Interleaving the first half with the second four times turns a square.
inline void turn(Bytes16 (&x)[16]) {
  for (int step = 0; step < 4; step++) {
    Bytes16 y[16];
    for (int i = 0; i < 8; i++) {
      y[2 * i] = __builtin_shufflevector(x[i], x[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21,
                                         6, 22, 7, 23);
      y[2 * i + 1] = __builtin_shufflevector(x[i], x[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28,
                                             13, 29, 14, 30, 15, 31);
    }
    for (int i = 0; i < 16; i++) x[i] = y[i];
  }
}

// num_bytes of 16 rows to [num_bytes][16].
void turn_rows(const uint8_t* const (&rows)[kLanes], int64_t offset, int64_t num_bytes,
               uint8_t* turned) {
  for (int64_t at = 0; at < num_bytes; at += 16) {
    Bytes16 square[16];
    const int64_t rest = num_bytes - at;
    for (int i = 0; i < 16; i++) {
      square[i] = Bytes16{};
      const uint8_t* p = rows[i] + offset + at;
      if (rest >= 16) {
        square[i] = load16(p);
      } else {
        std::memcpy(&square[i], p, rest);
      }
    }
    turn(square);
    std::memcpy(turned + at * 16, square, sizeof(square));
  }
}

// [count][16] to 16 rows; up to 15 values behind count are written, too.
void turn_back(const uint8_t* turned, int count, uint8_t* const (&rows)[kLanes]) {
  for (int at = 0; at < count; at += 16) {
    Bytes16 square[16];
    std::memcpy(square, turned + at * 16, sizeof(square));
    turn(square);
    for (int i = 0; i < 16; i++) std::memcpy(rows[i] + at, &square[i], 16);
  }
}
void turn_back(const float* turned, int count, float* const (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; i++) {
    for (int at = 0; at < count; at++) rows[i][at] = turned[at * kLanes + i];
  }
}

// ---- the passes ----

template <class B>
struct Scratch {
  uint8_t* turned;   // [turned_bytes][16]
  B* filtered;       // [3][kPatchifyColumns][16]
  B* ring;           // [ring_rows][3][pitch]
  const B** behind;  // rows behind an output row
  uint8_t* row;      // [3][pitch]
  uint8_t* tall;     // [16][3 * source width], for the vertical pass first
};

template <class B>
Scratch<B> make_scratch(const PatchifyCpuParams& params, Arena& arena) {
  Scratch<B> s;
  s.turned = arena.take<uint8_t>(int64_t{params.turned_bytes} * kLanes);
  s.filtered = arena.take<B>(3 * kPatchifyColumns * kLanes);
  s.ring = arena.take<B>(int64_t{params.ring_rows} * 3 * params.pitch);
  s.behind = arena.take<const B*>(params.down.taps);
  s.row = arena.take<uint8_t>(3 * params.pitch);
  const int64_t tall = int64_t{kLanes} * 3 * params.patchify.across.source;
  s.tall = arena.take<uint8_t>(params.patchify.vertical_first ? tall : 0);
  return s;
}

// 16 rows of pixels to 16 rows of [3][pitch].
template <class S, class B>
void filter_across(const PatchifyCpuParams& params, const Scratch<B>& scratch,
                   const uint8_t* const (&rows)[kLanes], B* const (&out)[kLanes]) {
  const PatchifyTable& table = params.across;
  const auto* weights = static_cast<const typename S::Weight*>(table.weights);
  const int size = params.patchify.across.size, precision = params.patchify.across.precision;
  for (int begin = 0; begin < size; begin += kPatchifyColumns) {
    const int end = begin + kPatchifyColumns < size ? begin + kPatchifyColumns : size;
    const int64_t first = table.first[begin];
    const int64_t behind = table.first[end - 1] + table.count[end - 1] - first;
    turn_rows(rows, first * 3, behind * 3, scratch.turned);
    for (int x = begin; x < end; x++) {
      S sums[3] = {S::start(precision), S::start(precision), S::start(precision)};
      const uint8_t* pixel = scratch.turned + (table.first[x] - first) * 3 * kLanes;
      const auto* weight = weights + int64_t{x} * table.taps;
      for (int tap = 0; tap < table.count[x]; tap++, pixel += 3 * kLanes) {
        for (int c = 0; c < 3; c++) sums[c].add(weight[tap], pixel + c * kLanes);
      }
      for (int c = 0; c < 3; c++) {
        sums[c].store_between(scratch.filtered + (c * kPatchifyColumns + x - begin) * kLanes,
                              precision);
      }
    }
    for (int c = 0; c < 3; c++) {
      B* places[kLanes];
      for (int i = 0; i < kLanes; i++) places[i] = out[i] + c * params.pitch + begin;
      turn_back(scratch.filtered + c * kPatchifyColumns * kLanes, end - begin, places);
    }
  }
}

// One output row of num_values from the rows behind it.
template <class S, class B>
void filter_down(const PatchifyCpuParams& params, int y, const B* const* behind, int64_t num_values,
                 uint8_t* out) {
  const PatchifyTable& table = params.down;
  const auto* weight =
      static_cast<const typename S::Weight*>(table.weights) + int64_t{y} * table.taps;
  const int count = table.count[y], precision = params.patchify.down.precision;
  constexpr int kGroup = 4;
  int64_t at = 0;
  for (; at + kGroup * kLanes <= num_values; at += kGroup * kLanes) {
    S sums[kGroup];
    for (S& one : sums) one = S::start(precision);
    for (int tap = 0; tap < count; tap++) {
      for (int i = 0; i < kGroup; i++) sums[i].add(weight[tap], behind[tap] + at + i * kLanes);
    }
    for (int i = 0; i < kGroup; i++) sums[i].store(out + at + i * kLanes, precision);
  }
  for (; at < num_values; at += kLanes) {
    // Of the last lanes some may be missing.
    const int64_t rest = num_values - at < kLanes ? num_values - at : kLanes;
    S sums = S::start(precision);
    for (int tap = 0; tap < count; tap++) {
      B lanes[kLanes] = {};
      std::memcpy(lanes, behind[tap] + at, rest * sizeof(B));
      sums.add(weight[tap], lanes);
    }
    uint8_t levels[kLanes];
    sums.store(levels, precision);
    std::memcpy(out + at, levels, rest);
  }
}

// One row of pixels [3][pitch] to where it belongs in the patches of its frame.
void scatter(const PatchifyCpuParams& params, int y, const uint8_t* row, uint8_t* patches) {
  const int side = params.patchify.patch_size;
  const int64_t grid_w = params.patchify.across.size / side;
  uint8_t* out = patches + (y / side * grid_w * 3 * side + y % side) * side;
  for (int64_t patch = 0; patch < grid_w; patch++) {
    for (int c = 0; c < 3; c++) {
      const uint8_t* from = row + c * params.pitch + patch * side;
      uint8_t* to = out + (patch * 3 + c) * side * side;
      if (side == 14) {  // Keye's: a copy of known length
        std::memcpy(to, from, 14);
      } else {
        std::memcpy(to, from, side);
      }
    }
  }
}

// ---- the two orders of the passes ----

template <class S>
void across_then_down(const PatchifyCpuParams& params, const uint8_t* frame, int begin, int end,
                      const Scratch<typename S::Between>& scratch, uint8_t* patches) {
  using B = typename S::Between;
  const PatchifyTable& down = params.down;
  const int64_t row_values = int64_t{3} * params.pitch;
  const int last_row = params.patchify.down.source - 1;
  const auto ring_row = [&](int y) { return scratch.ring + y % params.ring_rows * row_values; };

  int done = down.first[begin];  // source rows before it are in the ring, as far as they matter
  for (int y = begin; y < end; y++) {
    // Filter as many rows as this one needs.
    for (; done < down.first[y] + down.count[y]; done += kLanes) {
      const uint8_t* rows[kLanes];
      B* places[kLanes];
      for (int i = 0; i < kLanes; i++) {
        const int64_t source = done + i < last_row ? done + i : last_row;
        rows[i] = frame + source * params.patchify.stride_row;
        places[i] = ring_row(done + i);
      }
      filter_across<S, B>(params, scratch, rows, places);
    }
    for (int tap = 0; tap < down.count[y]; tap++)
      scratch.behind[tap] = ring_row(down.first[y] + tap);
    filter_down<S, B>(params, y, scratch.behind, row_values, scratch.row);
    scatter(params, y, scratch.row, patches);
  }
}

void down_then_across(const PatchifyCpuParams& params, const uint8_t* frame, int begin, int end,
                      const Scratch<uint8_t>& scratch, uint8_t* patches) {
  const PatchifyTable& down = params.down;
  const int64_t row_bytes = int64_t{3} * params.patchify.across.source;
  for (int y = begin; y < end; y += kLanes) {
    const uint8_t* rows[kLanes];
    uint8_t* places[kLanes];
    for (int i = 0; i < kLanes; i++) {
      rows[i] = scratch.tall + (y + i < end ? i : 0) * row_bytes;
      places[i] = scratch.ring + i * int64_t{3} * params.pitch;
      if (y + i >= end) continue;
      for (int tap = 0; tap < down.count[y + i]; tap++) {
        scratch.behind[tap] = frame + (down.first[y + i] + tap) * params.patchify.stride_row;
      }
      filter_down<IntegerSums, uint8_t>(params, y + i, scratch.behind, row_bytes,
                                        scratch.tall + i * row_bytes);
    }
    filter_across<IntegerSums, uint8_t>(params, scratch, rows, places);
    for (int i = 0; i < kLanes && y + i < end; i++) scatter(params, y + i, places[i], patches);
  }
}

}  // namespace

int64_t patchify_scratch_bytes(const PatchifyCpuParams& params) {
  Arena arena{nullptr};
  if (params.patchify.is_float) {
    make_scratch<float>(params, arena);
  } else {
    make_scratch<uint8_t>(params, arena);
  }
  return arena.used;
}

void patchify_bands(const PatchifyCpuParams& params, int64_t frame, int begin, int end,
                    char* memory) {
  const PatchifyParams& p = params.patchify;
  const int side = p.patch_size;
  const uint8_t* source = p.frames + frame * p.stride_frame;
  uint8_t* patches = p.out + frame * p.down.size * p.across.size * 3;
  Arena arena{memory};
  if (p.is_float) {
    across_then_down<FloatSums>(params, source, begin * side, end * side,
                                make_scratch<float>(params, arena), patches);
    return;
  }
  const auto scratch = make_scratch<uint8_t>(params, arena);
  if (p.vertical_first) {
    down_then_across(params, source, begin * side, end * side, scratch, patches);
  } else {
    across_then_down<IntegerSums>(params, source, begin * side, end * side, scratch, patches);
  }
}

}  // namespace keye_ops::KEYE_ISA
