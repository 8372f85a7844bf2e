// linear_gelu: the host side that all devices share. Arguments are checked here, above the kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>

#include "common/dtype.h"
#include "common/export.h"
#include "linear_gelu/linear_gelu.h"
#include "linear_gelu/linear_gelu_gemm.h"

namespace keye_ops {

enum class LinearGeluDevice { kCpu = 0, kCuda = 1 };

// What a device offers. It trusts its params.
struct LinearGeluBackend {
  void (*pass)(const LinearGeluParams&, Dtype, int device_index);
  // All in one GEMM of bf16, or false where torch's GEMM and the pass are to run; null without any.
  bool (*fused)(const LinearGeluGemmParams&, int device_index);
};

// The entry of a device, which its library fills when it registers the ops below.
KEYE_API LinearGeluBackend& linear_gelu_backend(LinearGeluDevice device);

KEYE_API torch::stable::Tensor linear_gelu(const torch::stable::Tensor& x,
                                           const torch::stable::Tensor& weight,
                                           const torch::stable::Tensor& bias,
                                           const std::string& approximate);

// The result and what its gradient needs: x @ weight.T + bias.
KEYE_API std::tuple<torch::stable::Tensor, torch::stable::Tensor> linear_gelu_forward(
    const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
    const torch::stable::Tensor& bias, const std::string& approximate);

KEYE_API std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
linear_gelu_backward(const torch::stable::Tensor& dout, const torch::stable::Tensor& x,
                     const torch::stable::Tensor& weight, const torch::stable::Tensor& hidden,
                     const std::string& approximate);

}  // namespace keye_ops
