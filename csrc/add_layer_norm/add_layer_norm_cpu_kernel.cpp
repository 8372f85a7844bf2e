// add_layer_norm on the CPU: a row at a time. It comes from memory once; the passes after the first
// find it in L1.
#include "add_layer_norm/add_layer_norm_cpu.h"
#include "common/layer_norm.h"

namespace keye_ops::KEYE_ISA {
namespace {

// Writes x + residual, rounded, and returns the sum over the row of what it wrote.
template <class T, class C = Compute<T>>
double add_row(const T* x, const T* residual, T* sum, int64_t hidden) {
  RowSum<C> row_sum;
  const auto step = KEYE_STEP(kind, d, lane) {
    store_as(sum + d, load_as(kind, x + d) + load_as(kind, residual + d));
    row_sum.add(load_as(kind, sum + d), lane);
  };
  sum_lanes<C>(hidden, step, row_sum);
  return row_sum.total;
}

template <class T>
void forward_rows(const AddLayerNormParams& params, int64_t begin, int64_t end) {
  const int64_t hidden = params.hidden;
  const T* residual = static_cast<const T*>(params.residual);
  for (int64_t i = begin; i < end; i++) {
    const T* x = static_cast<const T*>(params.x) + i * params.x_stride;
    prefetch_row(x + params.x_stride, hidden);
    double row_sum;
    if (residual != nullptr) {
      prefetch_row(residual + (i + 1) * params.residual_stride, hidden);
      T* sum = static_cast<T*>(params.sum) + i * hidden;
      row_sum = add_row(x, residual + i * params.residual_stride, sum, hidden);
      x = sum;
    } else {
      row_sum = sum_of_row(one_piece(x), hidden);
    }
    const auto row = one_piece(x);
    const auto statistics = statistics_of_row(row, hidden, row_sum, params.eps);
    normalise_row(row, hidden, statistics, static_cast<const T*>(params.weight),
                  static_cast<const T*>(params.bias), static_cast<T*>(params.normed) + i * hidden);
  }
}

template <class T>
void backward_partial(const AddLayerNormParams& params, int64_t partial) {
  const int64_t hidden = params.hidden;
  double* dweight = static_cast<double*>(params.dweight_partial) + partial * hidden;
  double* dbias = static_cast<double*>(params.dbias_partial) + partial * hidden;
  for (int64_t d = 0; d < hidden; d++) dweight[d] = dbias[d] = 0;

  const T* dsum = static_cast<const T*>(params.dsum);
  const int64_t begin = partial * kAddLayerNormRowsPerPartial;
  for (int64_t i = begin; i < begin + kAddLayerNormRowsPerPartial && i < params.total; i++) {
    layer_norm_backward_row<T>(one_piece(static_cast<const T*>(params.x) + i * params.x_stride),
                               hidden, static_cast<const T*>(params.weight),
                               static_cast<const T*>(params.dnormed) + i * params.dnormed_stride,
                               dsum == nullptr ? nullptr : dsum + i * params.dsum_stride,
                               params.eps, one_piece(static_cast<T*>(params.dx) + i * hidden),
                               dweight, dbias);
  }
}

}  // namespace

void add_layer_norm_forward_rows(const AddLayerNormParams& params, Dtype dtype, int64_t begin,
                                 int64_t end) {
  with_type_of(dtype, [&](auto type) { forward_rows<decltype(type)>(params, begin, end); });
}

void add_layer_norm_backward_partial(const AddLayerNormParams& params, Dtype dtype,
                                     int64_t partial) {
  with_type_of(dtype, [&](auto type) { backward_partial<decltype(type)>(params, partial); });
}

}  // namespace keye_ops::KEYE_ISA
