// varlen_attention on the CPU, backward. Scores are computed again, transposed: rows are keys and
// columns are queries, so that weights and their gradients come out as the products of dv and dk
// take them. A task has all rows of its segments and adds in a fixed order.
#include <cmath>

#include "common/arena.h"
#include "common/exp.h"
#include "common/panel_product.h"
#include "varlen_attention/varlen_attention_cpu.h"

namespace keye_ops::KEYE_ISA {
namespace {

constexpr int kKeyBlock = 128;  // keys whose dk and dv are being summed
constexpr int kTile = 32;       // queries a tile

template <class W>
struct BackwardScratch {
  using S = Sum<W>;
  int words, columns;  // widths of packed rows, as inner dimension and as columns
  int64_t num_tiles;
  // Of every tile of queries.
  W *q_columns, *dout_columns;  // [words, kTile]
  W *q_rows, *dout_rows;        // [kTile / kElements, columns]
  S *lse, *lse_low;             // [kTile], powers of 2; low is what rounding took from lse
  S* delta;                     // [kTile], sums of out * dout
  S* dq;                        // [columns, kTile]
  // Of one block of keys.
  W *k_rows, *v_rows;    // [kKeyBlock, words]
  W* k_columns;          // [columns, kKeyBlock / kElements]
  S *dk, *dv;            // [kKeyBlock, columns]
  S *scores, *dweights;  // [kKeyBlock, kTile]
  W *weights, *dscores;  // [kKeyBlock, kTile / kElements]
  W* dscores_panel;      // [kKeyBlock / kElements, kTile]
  W* rows;               // [16, words or columns] on the way into a panel
  W* pair;               // [2, columns]

  BackwardScratch(const VarlenAttentionParams& params, int64_t longest, Arena& arena) {
    constexpr int e = kElements<W>;
    const int64_t group = params.num_heads / params.num_kv_heads;
    words = round_up((params.head_dim + e - 1) / e, kInnerUnit<W>);
    columns = round_up(params.head_dim, kColumnUnit);
    num_tiles = group * ((longest + kTile - 1) / kTile);
    const int panel_words = round_up(words, 16);
    q_columns = arena.take<W>(num_tiles * panel_words * kTile);
    dout_columns = arena.take<W>(num_tiles * panel_words * kTile);
    q_rows = arena.take<W>(num_tiles * (kTile / e) * columns);
    dout_rows = arena.take<W>(num_tiles * (kTile / e) * columns);
    lse = arena.take<S>(num_tiles * kTile);
    lse_low = arena.take<S>(num_tiles * kTile);
    delta = arena.take<S>(num_tiles * kTile);
    dq = arena.take<S>(num_tiles * columns * kTile);
    k_rows = arena.take<W>(int64_t{kKeyBlock} * words + kRowSlack);
    v_rows = arena.take<W>(int64_t{kKeyBlock} * words + kRowSlack);
    k_columns = arena.take<W>(int64_t{columns} * (kKeyBlock / e));
    dk = arena.take<S>(int64_t{kKeyBlock} * columns);
    dv = arena.take<S>(int64_t{kKeyBlock} * columns);
    scores = arena.take<S>(kKeyBlock * kTile);
    dweights = arena.take<S>(kKeyBlock * kTile);
    weights = arena.take<W>(kKeyBlock * kTile / e);
    dscores = arena.take<W>(kKeyBlock * kTile / e);
    dscores_panel = e == 1 ? dscores : arena.take<W>(kKeyBlock * kTile / e);
    rows = arena.take<W>(16 * (panel_words > columns ? panel_words : columns));
    pair = arena.take<W>(2 * int64_t{columns});
  }
};

// Rows of a tensor as rows of a panel: pairs of rows, where words are pairs. Row `count` and those
// behind it are zeros.
template <class T, class W>
void pack_inner_rows(const T* x, int64_t stride, int head_dim, int count, int total, W* panel,
                     int columns, W* pair) {
  constexpr int e = kElements<W>;
  for (int row = 0; row < total; row += e) {
    W* out = panel + int64_t{row} / e * columns;
    if constexpr (e == 1) {
      pack_row(x + (row < count ? row : 0) * stride, row < count ? head_dim : 0, out, columns);
    } else {
      for (int i = 0; i < 2; i++) {
        const bool exists = row + i < count;
        pack_row(x + (exists ? row + i : 0) * stride, exists ? head_dim : 0, pair + i * columns,
                 columns / 2);
      }
      interleave(reinterpret_cast<const uint16_t*>(pair),
                 reinterpret_cast<const uint16_t*>(pair + columns), out, columns);
    }
  }
}

// Rows of a tensor as columns of a panel.
template <class T, class W>
void pack_query_columns(const T* x, int64_t stride, int head_dim, int count, W* panel, int words,
                        W* rows) {
  const int row_words = round_up(words, 16);
  for (int first = 0; first < kTile; first += 16) {
    for (int i = 0; i < 16; i++) {
      const bool exists = first + i < count;
      pack_row(x + (exists ? first + i : 0) * stride, exists ? head_dim : 0, rows + i * row_words,
               row_words);
    }
    pack_columns(rows, row_words, words, panel + first, kTile);
  }
}

template <class T>
KEYE_HOST_DEVICE Compute<T> dot_rows(const T* a, const T* b, int size) {
  Compute<T> sum = 0;
  int d = 0;
  if constexpr (!std::is_same_v<T, double>) {
    Floats sums = {};
    for (; d + kSimdWidth <= size; d += kSimdWidth) sums += load_vector(a + d) * load_vector(b + d);
    sum = sum_of(sums);
  }
  for (; d < size; d++) sum += load(a + d) * load(b + d);
  return sum;
}

template <class S>
struct Scale {
  S log2_factor, factor;
};

// One key's weights and the gradients of its scores, for a tile of queries.
KEYE_HOST_DEVICE void differentiate(float* scores, float* dweights, const float* lse,
                                    const float* lse_low, const float* delta, Scale<float> scale) {
  for (int i = 0; i < kTile; i += kSimdWidth) {
    const Floats x = load_vector(scores + i) * scale.log2_factor - load_vector(lse + i);
    const Floats weight = exp2_nonpositive(x, -load_vector(lse_low + i));
    const Floats difference = load_vector(dweights + i) - load_vector(delta + i);
    store_vector(scores + i, weight);
    store_vector(dweights + i, weight * difference * scale.factor);
  }
}
KEYE_HOST_DEVICE void differentiate(double* scores, double* dweights, const double* lse,
                                    const double* /*lse_low*/, const double* delta,
                                    Scale<double> scale) {
  for (int i = 0; i < kTile; i++) {
    scores[i] = std::exp2(scores[i] * scale.log2_factor - lse[i]);
    dweights[i] = scores[i] * (dweights[i] - delta[i]) * scale.factor;
  }
}

template <class S>
KEYE_HOST_DEVICE void store_words(S* words, const S* values) {
  std::memcpy(words, values, sizeof(S) * kTile);
}
#if defined(__AVX512BF16__)
KEYE_HOST_DEVICE void store_words(BFloat16Pair* words, const float* values) {
  const __m512bh pairs = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(values + 16), _mm512_loadu_ps(values));
  std::memcpy(words, &pairs, sizeof(pairs));
}
#endif

// Adds the share of one tile of queries and the block of keys [first_key, first_key + count).
template <class W>
void add_tile(const VarlenAttentionParams& params, BackwardScratch<W>& scratch, int64_t tile,
              int64_t row, int rows, int64_t num_rows, int64_t first_key, int64_t num_keys,
              int count, Scale<Sum<W>> scale) {
  using S = Sum<W>;
  constexpr int e = kElements<W>;
  const int words = scratch.words, columns = scratch.columns, head_dim = params.head_dim;
  const int64_t panel = int64_t{round_up(words, 16)} * kTile;
  multiply(scratch.k_rows, words, scratch.q_columns + tile * panel, kTile, scratch.scores, kTile,
           count, kTile, words, false);
  multiply(scratch.v_rows, words, scratch.dout_columns + tile * panel, kTile, scratch.dweights,
           kTile, count, kTile, words, false);

  const int padded = round_up(count, kInnerUnit<W> * e);
  for (int j = 0; j < padded; j++) {
    S* weights = scratch.scores + j * kTile;
    S* dscores = scratch.dweights + j * kTile;
    int hidden = kTile;
    if (j < count) {
      differentiate(weights, dscores, scratch.lse + tile * kTile, scratch.lse_low + tile * kTile,
                    scratch.delta + tile * kTile, scale);
      const int64_t seen = first_row_seeing(params.causal, first_key + j, num_rows, num_keys) - row;
      hidden = static_cast<int>(seen < 0 ? 0 : seen < kTile ? seen : kTile);
    }
    for (int i = 0; i < hidden; i++) weights[i] = dscores[i] = 0;
    for (int i = rows; i < kTile; i++) weights[i] = dscores[i] = 0;
    store_words(scratch.weights + j * kTile / e, weights);
    store_words(scratch.dscores + j * kTile / e, dscores);
  }
  if constexpr (e == 2) {
    for (int j = 0; j < padded; j += 2) {
      const auto* first = reinterpret_cast<const uint16_t*>(scratch.dscores + j * kTile / 2);
      interleave(first, first + kTile, scratch.dscores_panel + j / 2 * kTile, kTile);
    }
  }

  multiply(scratch.weights, kTile / e, scratch.dout_rows + tile * (kTile / e) * columns, columns,
           scratch.dv, columns, count, head_dim, kTile / e, true);
  multiply(scratch.dscores, kTile / e, scratch.q_rows + tile * (kTile / e) * columns, columns,
           scratch.dk, columns, count, head_dim, kTile / e, true);
  multiply(scratch.k_columns, kKeyBlock / e, scratch.dscores_panel, kTile,
           scratch.dq + tile * columns * kTile, kTile, head_dim, kTile, padded / e, true);
}

template <class T, class W>
void pack_queries(const VarlenAttentionParams& params, BackwardScratch<W>& scratch, int64_t tile,
                  int head, int64_t row, int rows) {
  using S = Sum<W>;
  const int words = scratch.words, columns = scratch.columns, head_dim = params.head_dim;
  const auto at = [&](const AttentionTensor& x) {
    return static_cast<T*>(x.data) + row * x.stride_row + head * x.stride_head;
  };
  const T *q = at(params.q), *out = at(params.out), *dout = at(params.dout);
  const int64_t panel = int64_t{round_up(words, 16)} * kTile;
  const int64_t inner = int64_t{kTile / kElements<W>} * columns;
  pack_query_columns(q, params.q.stride_row, head_dim, rows, scratch.q_columns + tile * panel,
                     words, scratch.rows);
  pack_query_columns(dout, params.dout.stride_row, head_dim, rows,
                     scratch.dout_columns + tile * panel, words, scratch.rows);
  pack_inner_rows(q, params.q.stride_row, head_dim, rows, kTile, scratch.q_rows + tile * inner,
                  columns, scratch.pair);
  pack_inner_rows(dout, params.dout.stride_row, head_dim, rows, kTile,
                  scratch.dout_rows + tile * inner, columns, scratch.pair);
  const S* lse = static_cast<const S*>(params.softmax_lse) + head * params.total_q + row;
  for (int r = 0; r < kTile; r++) {
    const bool exists = r < rows;
    const double log2_sum = exists ? static_cast<double>(lse[r]) * 1.4426950408889634074 : 0;
    const S high = static_cast<S>(log2_sum);
    scratch.lse[tile * kTile + r] = high;
    scratch.lse_low[tile * kTile + r] = std::isfinite(high) ? static_cast<S>(log2_sum - high) : 0;
    scratch.delta[tile * kTile + r] = exists ? dot_rows(out + r * params.out.stride_row,
                                                        dout + r * params.dout.stride_row, head_dim)
                                             : 0;
  }
  std::memset(scratch.dq + tile * columns * kTile, 0, sizeof(S) * columns * kTile);
}

template <class T, class W>
void pack_key_block(const VarlenAttentionParams& params, BackwardScratch<W>& scratch, int kv_head,
                    int64_t first, int count) {
  constexpr int e = kElements<W>;
  const int words = scratch.words, columns = scratch.columns, head_dim = params.head_dim;
  const auto at = [&](const AttentionTensor& x) {
    return static_cast<const T*>(x.data) + first * x.stride_row + kv_head * x.stride_head;
  };
  const T *k = at(params.k), *v = at(params.v);
  for (int j = 0; j < count; j++) {
    pack_row(k + j * params.k.stride_row, head_dim, scratch.k_rows + j * words, words);
    pack_row(v + j * params.v.stride_row, head_dim, scratch.v_rows + j * words, words);
  }
  const int padded = round_up(count, 16 * e);
  for (int j = 0; j < padded; j += 16 * e) {
    const int rest = count - j;
    pack_inner_rows(k + j * params.k.stride_row, params.k.stride_row, head_dim, rest, 16 * e,
                    scratch.rows, columns, scratch.pair);
    pack_columns(scratch.rows, columns, columns, scratch.k_columns + j / e, kKeyBlock / e);
  }
  const size_t size = sizeof(Sum<W>) * kKeyBlock * columns;
  std::memset(scratch.dk, 0, size);
  std::memset(scratch.dv, 0, size);
}

template <class T, class S>
KEYE_HOST_DEVICE void write_rows(const AttentionTensor& x, int64_t first, int head, int count,
                                 const S* sums, int64_t row_stride, int64_t column_stride,
                                 int head_dim) {
  for (int i = 0; i < count; i++) {
    T* out = static_cast<T*>(x.data) + (first + i) * x.stride_row + head * x.stride_head;
    for (int d = 0; d < head_dim; d++) {
      store(out + d, sums[i * row_stride + d * column_stride]);
    }
  }
}

template <class T, class W>
void backward_segment(const VarlenAttentionParams& params, int kv_head, int64_t segment,
                      BackwardScratch<W>& scratch) {
  const int64_t start_q = params.cu_seqlens_q[segment], start_k = params.cu_seqlens_k[segment];
  const int64_t num_rows = params.cu_seqlens_q[segment + 1] - start_q;
  const int64_t num_keys = params.cu_seqlens_k[segment + 1] - start_k;
  const int group = params.num_heads / params.num_kv_heads;
  const int64_t tiles = (num_rows + kTile - 1) / kTile;
  const auto rows_of = [&](int64_t tile) {
    return static_cast<int>(num_rows - tile * kTile < kTile ? num_rows - tile * kTile : kTile);
  };
  const Scale<Sum<W>> scale{static_cast<Sum<W>>(params.softmax_scale * 1.4426950408889634074),
                            static_cast<Sum<W>>(params.softmax_scale)};

  for (int g = 0; g < group; g++) {
    for (int64_t tile = 0; tile < tiles; tile++) {
      pack_queries<T>(params, scratch, g * tiles + tile, kv_head * group + g,
                      start_q + tile * kTile, rows_of(tile));
    }
  }
  for (int64_t key = 0; key < num_keys; key += kKeyBlock) {
    const int count = static_cast<int>(num_keys - key < kKeyBlock ? num_keys - key : kKeyBlock);
    pack_key_block<T>(params, scratch, kv_head, start_k + key, count);
    const int64_t first = first_row_seeing(params.causal, key, num_rows, num_keys) / kTile;
    for (int g = 0; g < group; g++) {
      for (int64_t tile = first; tile < tiles; tile++) {
        add_tile(params, scratch, g * tiles + tile, tile * kTile, rows_of(tile), num_rows, key,
                 num_keys, count, scale);
      }
    }
    write_rows<T>(params.dk, start_k + key, kv_head, count, scratch.dk, scratch.columns, 1,
                  params.head_dim);
    write_rows<T>(params.dv, start_k + key, kv_head, count, scratch.dv, scratch.columns, 1,
                  params.head_dim);
  }
  for (int g = 0; g < group; g++) {
    for (int64_t tile = 0; tile < tiles; tile++) {
      write_rows<T>(params.dq, start_q + tile * kTile, kv_head * group + g, rows_of(tile),
                    scratch.dq + (g * tiles + tile) * scratch.columns * kTile, 1, kTile,
                    params.head_dim);
    }
  }
}

template <class T>
size_t backward_scratch(const VarlenAttentionParams& params, int64_t rows) {
  Arena arena{nullptr};
  BackwardScratch<Word<T>> scratch(params, rows, arena);
  return arena.used;
}

template <class T>
void backward_task(const VarlenAttentionParams& params, const AttentionTask& task, void* memory) {
  [[maybe_unused]] const TileRegisters registers;
  int64_t longest = 0;
  for (int64_t i = task.segment_begin; i < task.segment_end; i++) {
    const int64_t rows = params.cu_seqlens_q[i + 1] - params.cu_seqlens_q[i];
    longest = longest < rows ? rows : longest;
  }
  Arena arena{static_cast<char*>(memory)};
  BackwardScratch<Word<T>> scratch(params, longest, arena);
  for (int64_t i = task.segment_begin; i < task.segment_end; i++) {
    backward_segment<T>(params, task.kv_head, i, scratch);
  }
}

}  // namespace

size_t varlen_attention_backward_scratch(const VarlenAttentionParams& params, Dtype dtype,
                                         int64_t rows) {
  return with_type_of(dtype, [&](auto t) { return backward_scratch<decltype(t)>(params, rows); });
}

void varlen_attention_backward_task(const VarlenAttentionParams& params, Dtype dtype,
                                    const AttentionTask& task, void* scratch) {
  with_type_of(dtype, [&](auto t) { backward_task<decltype(t)>(params, task, scratch); });
}

}  // namespace keye_ops::KEYE_ISA
