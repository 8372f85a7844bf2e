// varlen_attention's backward on sm_90a: tensor maps and launches.
#pragma once

#include <algorithm>

#include "varlen_attention/varlen_attention_backward_sm80_launch.cuh"
#include "varlen_attention/varlen_attention_backward_sm90.cuh"
#include "varlen_attention/varlen_attention_sm90_launch.cuh"

namespace keye_ops {

// Maps of what is kept in tiles of B's rows, and of what goes by in its blocks. Where there is
// nothing to go by, nothing is loaded.
template <class B>
AttentionBackwardSm90Params attention_backward_params(const VarlenAttentionParams& params,
                                                      bool keeps_queries) {
  AttentionBackwardSm90Params kernel_params{};
  kernel_params.op = params;
  if (params.total_q == 0 || params.total_k == 0) return kernel_params;
  const auto queries = [&](TensorMap(&maps)[2], int64_t rows) {
    maps[0] =
        attention_map<B>("varlen_attention: q", params.q, params.total_q, params.num_heads, rows);
    maps[1] = attention_map<B>("varlen_attention: dout", params.dout, params.total_q,
                               params.num_heads, rows);
  };
  const auto keys = [&](TensorMap(&maps)[2], int64_t rows) {
    maps[0] = attention_map<B>("varlen_attention: k", params.k, params.total_k, params.num_kv_heads,
                               rows);
    maps[1] = attention_map<B>("varlen_attention: v", params.v, params.total_k, params.num_kv_heads,
                               rows);
  };
  if (keeps_queries) {
    queries(kernel_params.kept, B::BLOCK_M);
    keys(kernel_params.streamed, B::BLOCK_N);
  } else {
    keys(kernel_params.kept, B::BLOCK_M);
    queries(kernel_params.streamed, B::BLOCK_N);
  }
  return kernel_params;
}

inline void launch_attention_dkdv_sm90(const VarlenAttentionParams& params, Dtype dtype,
                                       int num_sms, int device_index) {
  if (params.total_k == 0 || params.num_kv_heads == 0) return;
  with_attention_kernel(params, dtype, [&](auto type, auto head_dim) {
    using T = decltype(type);
    constexpr int kHeadDim = decltype(head_dim)::value;
    using B = AttentionDkdvSm90<T, kHeadDim>;
    launch("varlen_attention", &attention_dkdv_sm90_kernel<T, kHeadDim>,
           attention_sm90_shape<B>(params.plan.max_k_tiles, params.num_kv_heads, num_sms),
           device_index, attention_backward_params<B>(params, false));
  });
}

inline void launch_attention_dq_sm90(const VarlenAttentionParams& params, Dtype dtype, int num_sms,
                                     int device_index) {
  if (params.total_q == 0 || params.num_heads == 0) return;
  with_attention_kernel(params, dtype, [&](auto type, auto head_dim) {
    using T = decltype(type);
    constexpr int kHeadDim = decltype(head_dim)::value;
    using B = AttentionDqSm90<T, kHeadDim>;
    launch("varlen_attention", &attention_dq_sm90_kernel<T, kHeadDim>,
           attention_sm90_shape<B>(params.plan.max_q_tiles, params.num_heads, num_sms),
           device_index, attention_backward_params<B>(params, true));
  });
}

// Fills dq, dk and dv, and params.delta on the way; the params have a plan with tiles of keys.
inline void launch_attention_sm90_backward(const VarlenAttentionParams& params, Dtype dtype,
                                           int num_sms, int device_index) {
  check_attention_gradients(params);
  launch_attention_delta(params, dtype, device_index);
  launch_attention_dkdv_sm90(params, dtype, num_sms, device_index);
  launch_attention_dq_sm90(params, dtype, num_sms, device_index);
}

}  // namespace keye_ops
