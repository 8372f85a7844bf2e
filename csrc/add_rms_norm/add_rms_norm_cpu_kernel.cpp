// add_rms_norm on the CPU: a row at a time. It comes from memory once; the passes after the first
// find it in L1.
#include "add_rms_norm/add_rms_norm_cpu.h"
#include "common/rms_norm.h"
#include "common/row_passes.h"

namespace keye_ops::KEYE_ISA {
namespace {

// Writes x + residual, rounded, and returns the sum over the row of the squares of what it wrote.
template <class T, class C = Compute<T>>
double add_row(const T* x, const T* residual, T* sum, int64_t hidden) {
  RowSum<C> squares;
  const auto step = KEYE_STEP(kind, d, lane) {
    store_as(sum + d, load_as(kind, x + d) + load_as(kind, residual + d));
    const auto rounded = load_as(kind, sum + d);
    squares.add(rounded * rounded, lane);
  };
  sum_lanes<C>(hidden, step, squares);
  return squares.total;
}

template <class T, class C = Compute<T>>
double squares_of_row(const T* x, int64_t hidden) {
  RowSum<C> squares;
  const auto step = KEYE_STEP(kind, d, lane) {
    const auto value = load_as(kind, x + d);
    squares.add(value * value, lane);
  };
  sum_lanes<C>(hidden, step, squares);
  return squares.total;
}

template <class C>
C rstd_of_row(double squares, const AddRmsNormParams& params) {
  const double size = static_cast<double>(params.hidden);
  return static_cast<C>(rms_norm_rstd(squares, size, params.eps));
}

template <class T, class C = Compute<T>>
void forward_rows(const AddRmsNormParams& params, int64_t begin, int64_t end) {
  const int64_t hidden = params.hidden;
  const T* weight = static_cast<const T*>(params.weight);
  const T* residual = static_cast<const T*>(params.residual);
  for (int64_t i = begin; i < end; i++) {
    const T* x = static_cast<const T*>(params.x) + i * params.x_stride;
    T* normed = static_cast<T*>(params.normed) + i * hidden;
    prefetch_row(x + params.x_stride, hidden);
    double squares;
    if (residual != nullptr) {
      prefetch_row(residual + (i + 1) * params.residual_stride, hidden);
      T* sum = static_cast<T*>(params.sum) + i * hidden;
      squares = add_row(x, residual + i * params.residual_stride, sum, hidden);
      x = sum;
    } else {
      squares = squares_of_row(x, hidden);
    }
    const C rstd = rstd_of_row<C>(squares, params);
    for_each_lanes<C>(
        0, hidden, KEYE_STEP(kind, d, lane) {
          store_as(normed + d, rstd * load_as(kind, x + d) * load_as(kind, weight + d));
        });
  }
}

// dx of a row; its share of the weight's gradient is added to dweight.
template <class T, class C = Compute<T>>
void backward_row(const AddRmsNormParams& params, int64_t i, double* dweight) {
  const int64_t hidden = params.hidden;
  const T* x = static_cast<const T*>(params.x) + i * params.x_stride;
  const T* dnormed = static_cast<const T*>(params.dnormed) + i * params.dnormed_stride;
  const T* weight = static_cast<const T*>(params.weight);
  T* dx = static_cast<T*>(params.dx) + i * hidden;
  const C rstd = rstd_of_row<C>(squares_of_row(x, hidden), params);

  RowSum<C> products;
  const auto sum_step = KEYE_STEP(kind, d, lane) {
    const auto normed = rstd * load_as(kind, x + d);
    const auto grad = load_as(kind, dnormed + d);
    add_to(dweight + d, grad, normed);
    products.add(grad * load_as(kind, weight + d) * normed, lane);
  };
  sum_lanes<C, Order::kInMemory>(hidden, sum_step, products);

  const C correlation = static_cast<C>(products.total / static_cast<double>(hidden));
  const T* dsum = static_cast<const T*>(params.dsum);
  if (dsum != nullptr) dsum += i * params.dsum_stride;
  for_each_lanes<C>(
      0, hidden, KEYE_STEP(kind, d, lane) {
        const auto normed = rstd * load_as(kind, x + d);
        const auto weighted = load_as(kind, dnormed + d) * load_as(kind, weight + d);
        auto grad = rms_norm_dx(weighted, normed, rstd, correlation);
        if (dsum != nullptr) grad = grad + load_as(kind, dsum + d);
        store_as(dx + d, grad);
      });
}

template <class T>
void backward_partial(const AddRmsNormParams& params, int64_t partial) {
  double* dweight = static_cast<double*>(params.dweight_partial) + partial * params.hidden;
  for (int64_t d = 0; d < params.hidden; d++) dweight[d] = 0;
  const int64_t begin = partial * kAddRmsNormRowsPerPartial;
  for (int64_t i = begin; i < begin + kAddRmsNormRowsPerPartial && i < params.total; i++) {
    backward_row<T>(params, i, dweight);
  }
}

}  // namespace

void add_rms_norm_forward_rows(const AddRmsNormParams& params, Dtype dtype, int64_t begin,
                               int64_t end) {
  with_type_of(dtype, [&](auto type) { forward_rows<decltype(type)>(params, begin, end); });
}

void add_rms_norm_backward_partial(const AddRmsNormParams& params, Dtype dtype, int64_t partial) {
  with_type_of(dtype, [&](auto type) { backward_partial<decltype(type)>(params, partial); });
}

}  // namespace keye_ops::KEYE_ISA
