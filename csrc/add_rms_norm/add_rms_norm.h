// add_rms_norm: what a kernel is told. The formulas are those of common/rms_norm.h.
#pragma once

#include <cstdint>

namespace keye_ops {

// Strides are in elements; the last dimension of every tensor has stride 1.
struct AddRmsNormParams {
  const void* x;          // [total, hidden]; in the backward what was normalised: the sum, or x
  const void* residual;   // [total, hidden], or null
  const void* weight;     // [hidden]
  void* sum;              // [total, hidden], x + residual; null without one
  void* normed;           // [total, hidden]
  const void* dsum;       // [total, hidden] or null, backward only
  const void* dnormed;    // [total, hidden], backward only
  void* dx;               // [total, hidden], backward only
  void* dweight_partial;  // [num_partials, hidden], backward only
  int64_t x_stride, residual_stride, dsum_stride, dnormed_stride;
  int64_t total, hidden;
  int num_partials;
  double eps;
};

}  // namespace keye_ops
