// merge_norm: the host side that all devices share. Arguments are checked here, above the kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "common/backend.h"
#include "common/dtype.h"
#include "common/export.h"
#include "merge_norm/merge_norm.h"

namespace keye_ops {

enum class MergeNormDevice { kCpu = 0, kCuda = 1 };

// What a device offers. Launchers trust their params.
struct MergeNormBackend {
  void (*forward)(const MergeNormParams&, Dtype, int device_index);
  void (*backward)(const MergeNormParams&, Dtype, int device_index);
  int (*num_partials)(int64_t tokens);  // rows of the parameters' partial gradients
  BackendTraits traits;
};

// The entry of a device, which its library fills when it registers the ops below.
KEYE_API MergeNormBackend& merge_norm_backend(MergeNormDevice device);

KEYE_API torch::stable::Tensor merge_norm(const torch::stable::Tensor& x,
                                          const torch::stable::Tensor& weight,
                                          const torch::stable::Tensor& bias,
                                          const torch::stable::Tensor& grid,
                                          const torch::stable::Tensor& image_offsets,
                                          int64_t spatial_merge_size, bool block_order, double eps);

KEYE_API std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
merge_norm_backward(const torch::stable::Tensor& dout, const torch::stable::Tensor& x,
                    const torch::stable::Tensor& weight, const torch::stable::Tensor& grid,
                    const torch::stable::Tensor& image_offsets, int64_t spatial_merge_size,
                    bool block_order, double eps);

}  // namespace keye_ops
