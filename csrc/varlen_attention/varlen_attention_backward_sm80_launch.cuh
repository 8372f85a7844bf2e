// varlen_attention's backward on CUDA from sm_80 on: which kernels, on how many blocks; for a GPU
// and for the host executor.
#pragma once

#include <algorithm>

#include "varlen_attention/varlen_attention_backward_sm80.cuh"
#include "varlen_attention/varlen_attention_launch.cuh"

namespace keye_ops {

// Fills params.delta.
inline void launch_attention_delta(const VarlenAttentionParams& params, Dtype dtype,
                                   int device_index) {
  if (params.total_q == 0 || params.num_heads == 0) return;
  const int64_t num_blocks = std::min(ceil_div(params.total_q, kDeltaRows), kMaxAttentionBlocks);
  with_attention_kernel(params, dtype, [&](auto type, auto head_dim) {
    launch("varlen_attention", &attention_delta_kernel<decltype(type), decltype(head_dim)::value>,
           {num_blocks, kDeltaThreads}, device_index, params);
  });
}

inline void launch_attention_dkdv_sm80(const VarlenAttentionParams& params, Dtype dtype,
                                       int device_index) {
  if (params.total_k == 0 || params.num_kv_heads == 0) return;
  with_attention_kernel(params, dtype, [&](auto type, auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    using B = AttentionDkdvBlock<kHeadDim>;
    launch("varlen_attention", &attention_dkdv_sm80_kernel<decltype(type), kHeadDim>,
           {attention_blocks<B::BLOCK_M>(params.plan.max_k_tiles, params.num_kv_heads),
            B::kNumThreads, B::kSharedBytes},
           device_index, params);
  });
}

inline void launch_attention_dq_sm80(const VarlenAttentionParams& params, Dtype dtype,
                                     int device_index) {
  if (params.total_q == 0 || params.num_heads == 0) return;
  with_attention_kernel(params, dtype, [&](auto type, auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    using B = AttentionDqBlock<kHeadDim>;
    launch("varlen_attention", &attention_dq_sm80_kernel<decltype(type), kHeadDim>,
           {attention_blocks<B::BLOCK_M>(params.plan.max_q_tiles, params.num_heads), B::kNumThreads,
            B::kSharedBytes},
           device_index, params);
  });
}

// Fills dq, dk and dv, and params.delta on the way; the params have a plan with tiles of keys.
inline void launch_attention_sm80_backward(const VarlenAttentionParams& params, Dtype dtype,
                                           int device_index) {
  check_attention_gradients(params);
  launch_attention_delta(params, dtype, device_index);
  launch_attention_dkdv_sm80(params, dtype, device_index);
  launch_attention_dq_sm80(params, dtype, device_index);
}

}  // namespace keye_ops
