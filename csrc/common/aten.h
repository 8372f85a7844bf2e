// Operators of torch that its stable headers do not have, by its dispatcher.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <utility>

namespace keye_ops {

// Autocast may have chosen another dtype for the product.
inline torch::stable::Tensor in_dtype_of(const torch::stable::Tensor& product,
                                         const torch::stable::Tensor& like) {
  const bool same = product.scalar_type() == like.scalar_type();
  const torch::stable::Tensor fit = same ? product : torch::stable::to(product, like.scalar_type());
  return fit.is_contiguous() ? fit : torch::stable::contiguous(fit);
}

// x [N, K] times weight [C, K] transposed, plus bias [C]: contiguous [N, C] in the weight's dtype.
inline torch::stable::Tensor aten_linear(const torch::stable::Tensor& x,
                                         const torch::stable::Tensor& weight,
                                         const std::optional<torch::stable::Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return in_dtype_of(torch::stable::detail::to<torch::stable::Tensor>(stack[0]), weight);
}

// x [N] in ascending order, and where each value was; equal values keep their order.
inline std::pair<torch::stable::Tensor, torch::stable::Tensor> aten_stable_sort(
    const torch::stable::Tensor& x) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(x), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<torch::stable::Tensor>(stack[0]),
          torch::stable::detail::to<torch::stable::Tensor>(stack[1])};
}

}  // namespace keye_ops
