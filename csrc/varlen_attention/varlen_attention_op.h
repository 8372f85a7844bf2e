// varlen_attention: the host side that all devices share. Arguments are checked here, above the
// kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "common/dtype.h"
#include "common/export.h"
#include "varlen_attention/varlen_attention.h"

namespace keye_ops {

enum class AttentionDevice { kCpu = 0, kCuda = 1 };

// What a device offers. Launchers trust their params.
struct AttentionBackend {
  void (*forward)(const VarlenAttentionParams&, Dtype, int device_index);
  void (*backward)(const VarlenAttentionParams&, Dtype, int device_index);
  // Fills the memory of a plan, of attention_plan_words(), for the offsets of the params; tiles of
  // keys are for the backward only. Null for devices that need no plan.
  void (*plan)(const VarlenAttentionParams&, int32_t* memory, bool with_k_tiles, int device_index);
};

// The entry of a device, which its library fills when it registers the ops below.
KEYE_API AttentionBackend& attention_backend(AttentionDevice device);

KEYE_API std::tuple<torch::stable::Tensor, torch::stable::Tensor> varlen_attention(
    const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
    const torch::stable::Tensor& cu_seqlens_q, const torch::stable::Tensor& cu_seqlens_k,
    std::optional<int64_t> max_seqlen_q, std::optional<int64_t> max_seqlen_k,
    std::optional<double> softmax_scale, bool causal, bool return_lse,
    const std::optional<torch::stable::Tensor>& plan);

KEYE_API std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
varlen_attention_backward(const torch::stable::Tensor& dout, const torch::stable::Tensor& q,
                          const torch::stable::Tensor& k, const torch::stable::Tensor& v,
                          const torch::stable::Tensor& out,
                          const torch::stable::Tensor& softmax_lse,
                          const torch::stable::Tensor& cu_seqlens_q,
                          const torch::stable::Tensor& cu_seqlens_k,
                          std::optional<int64_t> max_seqlen_q, std::optional<int64_t> max_seqlen_k,
                          std::optional<double> softmax_scale, bool causal,
                          const std::optional<torch::stable::Tensor>& plan);

// An order of work that calls with these offsets may share; empty for devices that need none.
KEYE_API torch::stable::Tensor varlen_attention_plan(const torch::stable::Tensor& cu_seqlens_q,
                                                     const torch::stable::Tensor& cu_seqlens_k,
                                                     int64_t total_q, int64_t total_k, bool causal);

}  // namespace keye_ops
