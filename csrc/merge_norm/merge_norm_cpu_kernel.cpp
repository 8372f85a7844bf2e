// merge_norm on the CPU: a merged token at a time. Its patches come from memory once; the passes
// after the first find them in L1.
#include "common/layer_norm.h"
#include "merge_norm/merge_norm_cpu.h"

namespace keye_ops::KEYE_ISA {
namespace {

// Where the patches of a merged token lie in a tensor [total, hidden].
template <class T>
RowPieces<T> pieces_of(const MergeNormParams& params, const MergedSquare& square, T* data,
                       int64_t stride) {
  return {data + square.corner * stride, square.row_step * stride, stride, params.side};
}

template <class T>
void forward_row(const MergeNormParams& params, const RowPieces<const T>& row, T* out) {
  const int64_t length = params.hidden;
  const auto statistics = statistics_of_row(row, length, sum_of_row(row, length), params.eps);
  normalise_row(row, length, statistics, static_cast<const T*>(params.weight),
                static_cast<const T*>(params.bias), out);
}

template <class T>
void forward_tokens(const MergeNormParams& params, int64_t begin, int64_t end) {
  const int64_t pieces = params.side * params.side;
  const int64_t next = (params.block_order ? pieces : params.side) * params.x_stride;
  for (int64_t token = begin; token < end; token++) {
    const auto row = pieces_of(params, merged_square(params, token),
                               static_cast<const T*>(params.x), params.x_stride);
    T* out = static_cast<T*>(params.out) + token * pieces * params.hidden;
    if (params.norm_first) {
      for (int64_t k = 0; k < pieces; k++) {
        prefetch_row(row.piece(k) + next, params.hidden);
        forward_row(params, one_piece(row.piece(k)), out + k * params.hidden);
      }
    } else {
      for (int64_t k = 0; k < pieces; k++) prefetch_row(row.piece(k) + next, params.hidden);
      forward_row(params, row, out);
    }
  }
}

template <class T>
void backward_partial(const MergeNormParams& params, int64_t partial) {
  const int64_t pieces = params.side * params.side, hidden = params.hidden;
  const int64_t tokens = params.total / pieces, normed = (params.norm_first ? 1 : pieces) * hidden;
  const T* weight = static_cast<const T*>(params.weight);
  double* dweight = static_cast<double*>(params.dweight_partial) + partial * normed;
  double* dbias = static_cast<double*>(params.dbias_partial) + partial * normed;
  for (int64_t i = 0; i < normed; i++) dweight[i] = dbias[i] = 0;

  const int64_t begin = partial * kMergeNormTokensPerPartial;
  for (int64_t token = begin; token < begin + kMergeNormTokensPerPartial && token < tokens;
       token++) {
    const MergedSquare square = merged_square(params, token);
    const auto row = pieces_of(params, square, static_cast<const T*>(params.x), params.x_stride);
    const auto dx = pieces_of(params, square, static_cast<T*>(params.dx), hidden);
    const T* dout = static_cast<const T*>(params.dout) + token * params.dout_stride;
    if (params.norm_first) {
      for (int64_t k = 0; k < pieces; k++) {
        layer_norm_backward_row<T>(one_piece(row.piece(k)), hidden, weight, dout + k * hidden,
                                   nullptr, params.eps, one_piece(dx.piece(k)), dweight, dbias);
      }
    } else {
      layer_norm_backward_row<T>(row, hidden, weight, dout, nullptr, params.eps, dx, dweight,
                                 dbias);
    }
  }
}

}  // namespace

void merge_norm_forward_tokens(const MergeNormParams& params, Dtype dtype, int64_t begin,
                               int64_t end) {
  with_type_of(dtype, [&](auto type) { forward_tokens<decltype(type)>(params, begin, end); });
}

void merge_norm_backward_partial(const MergeNormParams& params, Dtype dtype, int64_t partial) {
  with_type_of(dtype, [&](auto type) { backward_partial<decltype(type)>(params, partial); });
}

}  // namespace keye_ops::KEYE_ISA
