// varlen_attention: the host side that all devices share. Arguments are checked here, above the
// kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "common/export.h"
#include "varlen_attention/varlen_attention.h"

namespace keye_ops {

enum class AttentionDevice { kCpu = 0, kCuda = 1 };

// What a device offers. Launchers trust their params.
struct AttentionBackend {
  void (*forward)(const VarlenAttentionParams&, torch::headeronly::ScalarType, int device_index);
  void (*backward)(const VarlenAttentionParams&, torch::headeronly::ScalarType, int device_index);
};

// The entry of a device, which its library fills when it registers the ops below.
KEYE_API AttentionBackend& attention_backend(AttentionDevice device);

KEYE_API std::tuple<torch::stable::Tensor, torch::stable::Tensor> varlen_attention(
    const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
    const torch::stable::Tensor& cu_seqlens_q, const torch::stable::Tensor& cu_seqlens_k,
    std::optional<int64_t> max_seqlen_q, std::optional<int64_t> max_seqlen_k,
    std::optional<double> softmax_scale, bool causal, bool return_lse);

KEYE_API std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
varlen_attention_backward(const torch::stable::Tensor& dout, const torch::stable::Tensor& q,
                          const torch::stable::Tensor& k, const torch::stable::Tensor& v,
                          const torch::stable::Tensor& out,
                          const torch::stable::Tensor& softmax_lse,
                          const torch::stable::Tensor& cu_seqlens_q,
                          const torch::stable::Tensor& cu_seqlens_k,
                          std::optional<int64_t> max_seqlen_q, std::optional<int64_t> max_seqlen_k,
                          std::optional<double> softmax_scale, bool causal);

}  // namespace keye_ops
