// The second stage of a parameter's gradient: rows of partial sums, summed in a fixed order.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace keye_ops {

// [rows, width] -> [width] in the dtype of `like`.
inline torch::stable::Tensor sum_of_rows(const torch::stable::Tensor& partials,
                                         const torch::stable::Tensor& like) {
  const int64_t rows[] = {0};
  return torch::stable::to(torch::stable::sum(partials, rows), like.scalar_type());
}

}  // namespace keye_ops
