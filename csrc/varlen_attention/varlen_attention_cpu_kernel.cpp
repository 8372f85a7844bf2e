// varlen_attention on the CPU, forward: online softmax over blocks of keys, packed once a task.
#include <cmath>
#include <limits>

#include "common/arena.h"
#include "common/exp.h"
#include "common/panel_product.h"
#include "varlen_attention/varlen_attention_cpu.h"

namespace keye_ops::KEYE_ISA {
namespace {

constexpr int kKeyBlock = 256;                // keys that are packed at a time
constexpr int kPanel = 64;                    // keys of a panel of K
constexpr int kQueryTile = 32;                // rows whose scores are held
constexpr int kScoreStride = kKeyBlock + 16;  // apart from a power of two: no aliasing in L1

// What a task works on. Rows of a query head lie together, padded to whole tiles.
template <class W>
struct ForwardScratch {
  using S = Sum<W>;
  int key_words, value_columns;  // widths of packed rows
  W* q;                          // [group * padded_rows, key_words]
  W* k;                          // [kKeyBlock / kPanel][key_words, kPanel]
  W* v;                          // [kKeyBlock / kElements, value_columns]
  W* visible_v;                  // like v: without the keys that a row does not see
  W* row;                        // [16, key_words or value_columns], on the way into a panel
  S* scores[2];                  // [kQueryTile, kScoreStride], of two tiles of queries
  W* weights[2];                 // [kQueryTile, kScoreStride / kElements]; scores, unless pairs
  S* out;                        // [group * padded_rows, value_columns]
  S* one;                        // [kRowUnit, value_columns]
  S* max;                        // [group * padded_rows]
  S* sum;                        // [group * padded_rows]
  int64_t padded_rows;

  ForwardScratch(const VarlenAttentionParams& params, int64_t rows, Arena& arena) {
    const int group = params.num_heads / params.num_kv_heads;
    key_words = round_up((params.head_dim + kElements<W> - 1) / kElements<W>, kInnerUnit<W>);
    value_columns = round_up(params.head_dim, kColumnUnit);
    padded_rows = (rows + kQueryTile - 1) / kQueryTile * kQueryTile;
    const int64_t all = group * padded_rows;
    const int row_words = round_up(key_words > value_columns ? key_words : value_columns, 16);
    q = arena.take<W>(all * key_words + kRowSlack);
    k = arena.take<W>(int64_t{kKeyBlock} * round_up(key_words, 16));
    v = arena.take<W>(int64_t{kKeyBlock} / kElements<W> * value_columns);
    visible_v = arena.take<W>(int64_t{kKeyBlock} / kElements<W> * value_columns);
    row = arena.take<W>(16 * row_words);
    for (int i = 0; i < 2; i++) {
      scores[i] = arena.take<S>(kQueryTile * kScoreStride);
      if constexpr (kElements<W> == 1) {
        weights[i] = scores[i];
      } else {
        weights[i] = arena.take<W>(kQueryTile * kScoreStride / kElements<W>);
      }
    }
    out = arena.take<S>(all * value_columns);
    one = arena.take<S>(kRowUnit * value_columns);
    max = arena.take<S>(all);
    sum = arena.take<S>(all);
  }
};

// Scores are multiplied by a positive factor: a negative scale turns the sign of q instead, and a
// scale of 0 makes q 0, so that the largest score stays the largest.
template <class S>
struct Scale {
  S sign, factor;  // factor includes log2(e): powers are of 2
  explicit Scale(double scale)
      : sign(scale < 0   ? -1
             : scale > 0 ? 1
                         : 0),
        factor(scale == 0 ? S{1} : static_cast<S>(std::fabs(scale) * 1.4426950408889634074)) {}
};

// Keys [first, first + count) of K as panels: keys are columns.
template <class T, class W>
void pack_keys(const T* k, int64_t stride, int head_dim, int64_t first, int count,
               ForwardScratch<W>& scratch) {
  const int words = scratch.key_words, row_words = round_up(words, 16);
  for (int key = 0; key < count; key += 16) {
    for (int i = 0; i < 16; i++) {
      W* row = scratch.row + i * row_words;
      const bool exists = key + i < count;
      pack_row(k + (exists ? first + key + i : 0) * stride, exists ? head_dim : 0, row, row_words);
    }
    W* panel = scratch.k + (key / kPanel) * row_words * kPanel + key % kPanel;
    pack_columns(scratch.row, row_words, words, panel, kPanel);
  }
}

// Keys [first, first + count) of V as rows (of pairs), zeros up to whole units.
template <class T, class W>
void pack_values(const T* v, int64_t stride, int head_dim, int64_t first, int count,
                 ForwardScratch<W>& scratch) {
  constexpr int kStep = kElements<W>;
  const int columns = scratch.value_columns;
  const int padded = round_up(count, kInnerUnit<W> * kStep);
  for (int key = 0; key < padded; key += kStep) {
    W* row = scratch.v + int64_t{key} / kStep * columns;
    if constexpr (kStep == 1) {
      pack_row(v + (first + key) * stride, head_dim, row, columns);
    } else {
      W* pair[2] = {scratch.row, scratch.row + columns};
      for (int i = 0; i < 2; i++) {
        const bool exists = key + i < count;
        pack_row(v + (exists ? first + key + i : 0) * stride, exists ? head_dim : 0, pair[i],
                 columns / 2);
      }
      interleave(reinterpret_cast<const uint16_t*>(pair[0]),
                 reinterpret_cast<const uint16_t*>(pair[1]), row, columns);
    }
  }
}

// Whether a packed value is not finite.
template <class W>
bool has_special_values(const ForwardScratch<W>& scratch, int count) {
  const int64_t words =
      int64_t{round_up(count, kInnerUnit<W> * kElements<W>)} / kElements<W> * scratch.value_columns;
  bool special = false;
  for (int64_t i = 0; i < words; i++) {
    if constexpr (kElements<W> == 1) {
      special |= !(std::fabs(scratch.v[i]) <= std::numeric_limits<Sum<W>>::max());
    } else {
      const uint32_t bits = scratch.v[i].bits;
      special |= (bits & 0x7f80u) == 0x7f80u || (bits & 0x7f800000u) == 0x7f800000u;
    }
  }
  return special;
}

KEYE_HOST_DEVICE Floats weight_of(const float*, Floats x) { return exp2_nonpositive(x); }
KEYE_HOST_DEVICE Floats weight_of(const BFloat16Pair*, Floats x) {
  return exp2_nonpositive_fast(x);
}

KEYE_HOST_DEVICE void store_weights(float* weights, int at, Floats low, Floats high) {
  store_vector(weights + at, low);
  store_vector(weights + at + kSimdWidth, high);
}
#if defined(__AVX512BF16__)
KEYE_HOST_DEVICE void store_weights(BFloat16Pair* weights, int at, Floats low, Floats high) {
  const __m512bh pairs = _mm512_cvtne2ps_pbh(bit_cast<__m512>(high), bit_cast<__m512>(low));
  std::memcpy(weights + at / 2, &pairs, sizeof(pairs));
}
#endif

// Scores [count] of a row become weights [padded], zeros behind the count. Updates the largest
// score and the sum of weights so far, and gives the factor for what was summed up before.
template <class W>
float soften(float* scores, W* weights, int count, int padded, float factor, float& max,
             float& sum) {
  constexpr int kStep = 2 * kSimdWidth;
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  const int end = round_up(count, kStep);
  for (int i = count; i < end; i++) scores[i] = kNone;
  Floats most = load_vector(scores), most_too = load_vector(scores + kSimdWidth);
  for (int i = kStep; i < end; i += kStep) {
    most = larger_of(load_vector(scores + i), most);
    most_too = larger_of(load_vector(scores + i + kSimdWidth), most_too);
  }
  most = larger_of(most, most_too);
  const float before = max, here = largest_of(most);
  if (max < here) max = here;
  // Nothing but -inf so far: every weight is 0, and the row is NaN at the end if that stays so.
  const float reference = max == kNone ? 0.0f : max * factor;
  Floats total = {}, total_too = {};
  for (int i = 0; i < end; i += kStep) {
    const Floats low = weight_of(weights, load_vector(scores + i) * factor - reference);
    const Floats high =
        weight_of(weights, load_vector(scores + i + kSimdWidth) * factor - reference);
    total += low;
    total_too += high;
    store_weights(weights, i, low, high);
  }
  for (int i = end; i < padded; i += kStep) store_weights(weights, i, Floats{}, Floats{});
  const float correction = before == max     ? 1.0f
                           : before == kNone ? 0.0f
                                             : std::exp2(before * factor - reference);
  sum = sum * correction + sum_of(total + total_too);
  return correction;
}

inline double soften(double* scores, double* weights, int count, int padded, double factor,
                     double& max, double& sum) {
  constexpr double kNone = -std::numeric_limits<double>::infinity();
  const double before = max;
  for (int i = 0; i < count; i++) max = max < scores[i] ? scores[i] : max;
  const double reference = max == kNone ? 0 : max * factor;
  double total = 0;
  for (int i = 0; i < padded; i++) {
    weights[i] = i < count ? std::exp2(scores[i] * factor - reference) : 0;
    total += weights[i];
  }
  const double correction = before == max     ? 1
                            : before == kNone ? 0
                                              : std::exp2(before * factor - reference);
  sum = sum * correction + total;
  return correction;
}

// One tile of rows of a query head, and the keys that they see of the packed block.
struct RowTile {
  int64_t at;             // its first row in the scratch memory
  int rows, most, inner;  // inner: keys that products add up, `most` in whole units
  int counts[kQueryTile];
  bool masked;  // not all rows see `most`
};

// Weights of 0 times V of NaN would be NaN: rows one by one, with the keys that they see.
template <class W>
void add_visible_values(ForwardScratch<W>& scratch, const RowTile& tile, const W* weights,
                        Sum<W>* out, bool accumulate) {
  const int columns = scratch.value_columns, stride = kScoreStride / kElements<W>;
  std::memcpy(scratch.visible_v, scratch.v,
              sizeof(W) * (int64_t{tile.inner} / kElements<W>)*columns);
  int end = tile.inner;
  for (int r = tile.rows - 1; r >= 0; r--) {
    for (int key = tile.counts[r]; key < end; key++) {
      W* row = scratch.visible_v + int64_t{key} / kElements<W> * columns;
      for (int j = 0; j < columns; j++) {
        if constexpr (kElements<W> == 2) {
          row[j].bits &= key % 2 == 0 ? 0xffff0000u : 0x0000ffffu;
        } else {
          row[j] = 0;
        }
      }
    }
    end = tile.counts[r];
    std::memcpy(scratch.one, out + r * columns, sizeof(Sum<W>) * columns);
    multiply(weights + r * stride, stride, scratch.visible_v, columns, scratch.one, columns, 1,
             columns, tile.inner / kElements<W>, accumulate);
    std::memcpy(out + r * columns, scratch.one, sizeof(Sum<W>) * columns);
  }
}

// All tiles of rows against the packed block of keys, the first of its segment or a later one.
// Products are queued: where the CPU has tiles, they run while the weights of a neighbouring tile
// are computed.
template <class W>
class BlockOfKeys {
 public:
  BlockOfKeys(const VarlenAttentionParams& params, ForwardScratch<W>& scratch, bool first,
              bool special, Sum<W> factor)
      : params_(params), scratch_(scratch), first_(first), special_(special), factor_(factor) {}

  void add(const RowTile& tile) {
    tiles_[count_ % 3] = tile;
    compute_scores(count_);
    if (count_ > 0) finish(count_ - 1);
    count_++;
  }
  void flush() {
    if (count_ > 0) finish(count_ - 1);
    if (kInBackground<W> && count_ > 0) add_values(count_ - 1);
    queue_.run_all();
  }

 private:
  void finish(int i) {
    if (kInBackground<W> && i > 0) add_values(i - 1);
    compute_weights(i);
    queue_.run_all();
    if (!kInBackground<W>) add_values(i);
  }

  void compute_scores(int i) {
    const RowTile& tile = tiles_[i % 3];
    const int words = scratch_.key_words;
    for (int key = 0; key < tile.most; key += kPanel) {
      const int width = tile.most - key < kPanel ? tile.most - key : kPanel;
      queue_.add(scratch_.q + tile.at * words, words,
                 scratch_.k + key / kPanel * round_up(words, 16) * kPanel, kPanel,
                 scratch_.scores[i % 2] + key, kScoreStride, tile.rows, width, words, false);
    }
    if (i == 0) queue_.run_all();
  }

  void compute_weights(int i) {
    const RowTile& tile = tiles_[i % 3];
    const int columns = scratch_.value_columns;
    const int padded = round_up(tile.most, 2 * kSimdWidth);  // zeros behind a row's weights
    static_assert(kInnerUnit<W> * kElements<W> <= 2 * kSimdWidth, "weights end with whole units");
    for (int r = 0; r < tile.rows; r++) {
      W* weights = scratch_.weights[i % 2] + r * kScoreStride / kElements<W>;
      queue_.run_some(tile.rows - r);
      if (tile.counts[r] == 0) {  // sees none of this block, nor of those behind it
        std::memset(weights, 0, sizeof(W) * padded / kElements<W>);
        continue;
      }
      const int64_t at = tile.at + r;
      const Sum<W> correction =
          soften(scratch_.scores[i % 2] + r * kScoreStride, weights, tile.counts[r], padded,
                 factor_, scratch_.max[at], scratch_.sum[at]);
      if (first_ || correction == 1) continue;
      Sum<W>* out = scratch_.out + at * columns;
      for (int j = 0; j < columns; j++) out[j] *= correction;
    }
  }

  void add_values(int i) {
    const RowTile& tile = tiles_[i % 3];
    const int columns = scratch_.value_columns;
    const W* weights = scratch_.weights[i % 2];
    Sum<W>* out = scratch_.out + tile.at * columns;
    if (special_ && tile.masked) {
      queue_.run_all();
      add_visible_values(scratch_, tile, weights, out, !first_);
    } else {
      queue_.add(weights, kScoreStride / kElements<W>, scratch_.v, columns, out, columns, tile.rows,
                 params_.head_dim, tile.inner / kElements<W>, !first_);
    }
  }

  const VarlenAttentionParams& params_;
  ForwardScratch<W>& scratch_;
  const bool first_, special_;
  const Sum<W> factor_;
  ProductQueue<W> queue_;
  RowTile tiles_[3];
  int count_ = 0;
};

template <class T, class W>
void attend_segment(const VarlenAttentionParams& params, const AttentionTask& task, int64_t segment,
                    ForwardScratch<W>& scratch) {
  using S = Sum<W>;
  const int64_t start_q = params.cu_seqlens_q[segment], start_k = params.cu_seqlens_k[segment];
  const int64_t num_rows = params.cu_seqlens_q[segment + 1] - start_q;
  const int64_t num_keys = params.cu_seqlens_k[segment + 1] - start_k;
  const int64_t begin = task.row_begin, end = task.row_end < num_rows ? task.row_end : num_rows;
  const int group = params.num_heads / params.num_kv_heads, head_dim = params.head_dim;
  const int first_head = task.kv_head * group;
  const Scale<S> scale(params.softmax_scale);
  constexpr S kNone = -std::numeric_limits<S>::infinity();
  if (begin >= end) return;

  // Pack the queries.
  const T* q = static_cast<const T*>(params.q.data) + start_q * params.q.stride_row;
  for (int g = 0; g < group; g++) {
    for (int64_t row = begin; row < end; row++) {
      const int64_t at = g * scratch.padded_rows + row - begin;
      pack_row(q + row * params.q.stride_row + (first_head + g) * params.q.stride_head, head_dim,
               scratch.q + at * scratch.key_words, scratch.key_words, scale.sign);
      scratch.max[at] = kNone;
      scratch.sum[at] = 0;
    }
  }

  // Go through the keys that the last row sees.
  const T* k = static_cast<const T*>(params.k.data) + start_k * params.k.stride_row +
               task.kv_head * params.k.stride_head;
  const T* v = static_cast<const T*>(params.v.data) + start_k * params.v.stride_row +
               task.kv_head * params.v.stride_head;
  const int64_t last = visible_keys(params.causal, end - 1, num_rows, num_keys);
  for (int64_t key = 0; key < last; key += kKeyBlock) {
    const int count = static_cast<int>(last - key < kKeyBlock ? last - key : kKeyBlock);
    pack_keys(k, params.k.stride_row, head_dim, key, count, scratch);
    pack_values(v, params.v.stride_row, head_dim, key, count, scratch);
    const bool special = params.causal && has_special_values(scratch, count);
    BlockOfKeys<W> block(params, scratch, key == 0, special, scale.factor);
    for (int64_t row = begin; row < end; row += kQueryTile) {
      RowTile tile;
      tile.rows = static_cast<int>(end - row < kQueryTile ? end - row : kQueryTile);
      for (int r = 0; r < tile.rows; r++) {
        const int64_t seen = visible_keys(params.causal, row + r, num_rows, num_keys) - key;
        tile.counts[r] = static_cast<int>(seen < 0 ? 0 : seen < count ? seen : count);
      }
      tile.most = tile.counts[tile.rows - 1];
      tile.inner = round_up(tile.most, kInnerUnit<W> * kElements<W>);
      tile.masked = tile.counts[0] < tile.most;
      if (tile.most == 0) continue;
      for (int g = 0; g < group; g++) {
        tile.at = g * scratch.padded_rows + row - begin;
        block.add(tile);
      }
    }
    block.flush();
  }

  // Divide, and write.
  for (int g = 0; g < group; g++) {
    const int head = first_head + g;
    for (int64_t row = begin; row < end; row++) {
      const int64_t at = g * scratch.padded_rows + row - begin;
      T* out = static_cast<T*>(params.out.data) + (start_q + row) * params.out.stride_row +
               head * params.out.stride_head;
      const bool sees = visible_keys(params.causal, row, num_rows, num_keys) > 0;
      const S* sums = scratch.out + at * scratch.value_columns;
      const S inverse = 1 / scratch.sum[at];
      int d = 0;
      if constexpr (std::is_same_v<S, float>) {
        for (; sees && d + kSimdWidth <= head_dim; d += kSimdWidth) {
          store_vector(out + d, load_vector(sums + d) * inverse);
        }
      }
      for (; d < head_dim; d++) store(out + d, sees ? sums[d] * inverse : S{0});
      if (params.softmax_lse == nullptr) continue;
      const S largest = scratch.max[at] * scale.factor;
      const double log2_sum =
          static_cast<double>(largest) + std::log2(static_cast<double>(scratch.sum[at]));
      static_cast<S*>(params.softmax_lse)[head * params.total_q + start_q + row] =
          sees ? static_cast<S>(log2_sum * 0.69314718055994530942) : kNone;
    }
  }
}

template <class T>
size_t forward_scratch(const VarlenAttentionParams& params, int64_t rows) {
  Arena arena{nullptr};
  ForwardScratch<Word<T>> scratch(params, rows, arena);
  return arena.used;
}

template <class T>
void forward_task(const VarlenAttentionParams& params, const AttentionTask& task, void* memory) {
  [[maybe_unused]] const TileRegisters registers;
  int64_t longest = 0;
  for (int64_t i = task.segment_begin; i < task.segment_end; i++) {
    const int64_t rows = params.cu_seqlens_q[i + 1] - params.cu_seqlens_q[i];
    longest = longest < rows ? rows : longest;
  }
  const int64_t rows = task.row_end - task.row_begin;
  Arena arena{static_cast<char*>(memory)};
  ForwardScratch<Word<T>> scratch(params, rows < longest ? rows : longest, arena);
  for (int64_t i = task.segment_begin; i < task.segment_end; i++) {
    attend_segment<T>(params, task, i, scratch);
  }
}

}  // namespace

size_t varlen_attention_scratch(const VarlenAttentionParams& params, Dtype dtype, int64_t rows) {
  return with_type_of(dtype, [&](auto t) { return forward_scratch<decltype(t)>(params, rows); });
}

void varlen_attention_task(const VarlenAttentionParams& params, Dtype dtype,
                           const AttentionTask& task, void* scratch) {
  with_type_of(dtype, [&](auto t) { forward_task<decltype(t)>(params, task, scratch); });
}

}  // namespace keye_ops::KEYE_ISA
