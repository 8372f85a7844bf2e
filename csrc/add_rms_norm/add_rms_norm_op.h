// add_rms_norm: the host side that all devices share. Arguments are checked here, above the
// kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "add_rms_norm/add_rms_norm.h"
#include "common/backend.h"
#include "common/dtype.h"
#include "common/export.h"

namespace keye_ops {

enum class AddRmsNormDevice { kCpu = 0, kCuda = 1 };

// What a device offers. Launchers trust their params.
struct AddRmsNormBackend {
  void (*forward)(const AddRmsNormParams&, Dtype, int device_index);
  void (*backward)(const AddRmsNormParams&, Dtype, int device_index);
  int (*num_partials)(int64_t total);  // rows of the weight's partial gradient
  BackendTraits traits;
};

// The entry of a device, which its library fills when it registers the ops below.
KEYE_API AddRmsNormBackend& add_rms_norm_backend(AddRmsNormDevice device);

KEYE_API std::tuple<torch::stable::Tensor, torch::stable::Tensor> add_rms_norm(
    const torch::stable::Tensor& x, std::optional<torch::stable::Tensor> residual,
    const torch::stable::Tensor& weight, double eps);

KEYE_API std::tuple<torch::stable::Tensor, torch::stable::Tensor> add_rms_norm_backward(
    std::optional<torch::stable::Tensor> dsum, const torch::stable::Tensor& dnormed,
    const torch::stable::Tensor& sum, const torch::stable::Tensor& weight, double eps);

}  // namespace keye_ops
