// add_layer_norm: the host side that all devices share. Arguments are checked here, above the
// kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "add_layer_norm/add_layer_norm.h"
#include "common/backend.h"
#include "common/dtype.h"
#include "common/export.h"

namespace keye_ops {

enum class AddLayerNormDevice { kCpu = 0, kCuda = 1 };

// What a device offers. Launchers trust their params.
struct AddLayerNormBackend {
  void (*forward)(const AddLayerNormParams&, Dtype, int device_index);
  void (*backward)(const AddLayerNormParams&, Dtype, int device_index);
  int (*num_partials)(int64_t total);  // rows of the parameters' partial gradients
  BackendTraits traits;
};

// The entry of a device, which its library fills when it registers the ops below.
KEYE_API AddLayerNormBackend& add_layer_norm_backend(AddLayerNormDevice device);

KEYE_API std::tuple<torch::stable::Tensor, torch::stable::Tensor> add_layer_norm(
    const torch::stable::Tensor& x, std::optional<torch::stable::Tensor> residual,
    const torch::stable::Tensor& weight, const torch::stable::Tensor& bias, double eps);

KEYE_API std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
add_layer_norm_backward(std::optional<torch::stable::Tensor> dsum,
                        const torch::stable::Tensor& dnormed, const torch::stable::Tensor& sum,
                        const torch::stable::Tensor& weight, double eps);

}  // namespace keye_ops
