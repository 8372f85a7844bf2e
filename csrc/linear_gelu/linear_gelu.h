// linear_gelu: what the elementwise pass after the matrix product is told.
#pragma once

#include <cstdint>

namespace keye_ops {

struct LinearGeluParams {
  void* out;           // [numel]: gelu(hidden), or dhidden; may be hidden
  const void* hidden;  // [numel]: x @ weight.T + bias
  const void* dout;    // [numel], or null forward
  int64_t numel;
  bool tanh;  // the approximation
};

}  // namespace keye_ops
