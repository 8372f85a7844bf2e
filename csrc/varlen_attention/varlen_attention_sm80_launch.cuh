// varlen_attention on CUDA from sm_80 on: launches; for a GPU and for the host executor.
#pragma once

#include "varlen_attention/varlen_attention_launch.cuh"
#include "varlen_attention/varlen_attention_sm80.cuh"

namespace keye_ops {

inline void launch_attention_sm80_forward(const VarlenAttentionParams& params, Dtype dtype,
                                          int device_index) {
  if (params.total_q == 0 || params.num_heads == 0) return;
  check_attention_values(params);
  with_attention_kernel(params, dtype, [&](auto type, auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    using A = AttentionSm80<kHeadDim>;
    const AttentionSm80Params kernel_params{params, attention_scale(params.softmax_scale)};
    launch("varlen_attention", &attention_sm80_kernel<decltype(type), kHeadDim>,
           {attention_blocks<A::BLOCK_M>(params.plan.max_q_tiles, params.num_heads), A::kNumThreads,
            A::kSharedBytes},
           device_index, kernel_params);
  });
}

}  // namespace keye_ops
