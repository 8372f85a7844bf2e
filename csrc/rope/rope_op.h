// rope: the host side that all devices share. Arguments are checked here, above the kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "common/backend.h"
#include "common/dtype.h"
#include "common/export.h"
#include "rope/rope.h"

namespace keye_ops {

enum class RopeDevice { kCpu = 0, kCuda = 1 };

// What a device offers. Launchers trust their params.
struct RopeBackend {
  void (*forward)(const RopeParams&, Dtype, int device_index);
  void (*backward)(const RopeParams&, Dtype, int device_index);
  int (*num_partials)(int64_t total);  // rows of the norm weights' partial gradients
  BackendTraits traits;
};

// The entry of a device, which its library fills when it registers the ops below.
KEYE_API RopeBackend& rope_backend(RopeDevice device);

KEYE_API std::tuple<torch::stable::Tensor, torch::stable::Tensor> rope(
    const torch::stable::Tensor& q, const torch::stable::Tensor& k,
    const torch::stable::Tensor& position_ids, const torch::stable::Tensor& inv_freq,
    const torch::stable::Tensor& axis, bool interleaved, bool inverse,
    std::optional<torch::stable::Tensor> q_norm_weight,
    std::optional<torch::stable::Tensor> k_norm_weight, double norm_eps);

KEYE_API void rope_inplace(const torch::stable::Tensor& q, const torch::stable::Tensor& k,
                           const torch::stable::Tensor& position_ids,
                           const torch::stable::Tensor& inv_freq, const torch::stable::Tensor& axis,
                           bool interleaved, bool inverse,
                           std::optional<torch::stable::Tensor> q_norm_weight,
                           std::optional<torch::stable::Tensor> k_norm_weight, double norm_eps);

KEYE_API std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
                    torch::stable::Tensor>
rope_backward(const torch::stable::Tensor& dq, const torch::stable::Tensor& dk,
              const torch::stable::Tensor& q, const torch::stable::Tensor& k,
              const torch::stable::Tensor& position_ids, const torch::stable::Tensor& inv_freq,
              const torch::stable::Tensor& axis, const torch::stable::Tensor& q_norm_weight,
              const torch::stable::Tensor& k_norm_weight, bool interleaved, double norm_eps);

}  // namespace keye_ops
