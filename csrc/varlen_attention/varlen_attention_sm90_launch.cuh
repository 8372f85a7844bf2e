// varlen_attention on sm_90a: tensor maps and launches.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/tensor_map.h"
#include "varlen_attention/varlen_attention_launch.cuh"
#include "varlen_attention/varlen_attention_sm90.cuh"

namespace keye_ops {

// Rows of [rows, heads, head_dim] in boxes of box_rows rows of a unit of columns.
template <class A>
TensorMap attention_map(const char* name, const AttentionTensor& x, int64_t rows, int64_t heads,
                        int64_t box_rows) {
  constexpr int64_t kSize = 2;  // bytes of a value
  // NOTE: the stride of a dimension of one element says nothing, and TMA wants a good one.
  const auto stride = [](int64_t size, int64_t elements) {
    return size > 1 ? elements * kSize : int64_t{A::kHeadDim} * kSize;
  };
  return make_tensor_map({name,
                          x.data,
                          static_cast<int>(kSize),
                          {A::kHeadDim, rows, heads},
                          {stride(rows, x.stride_row), stride(heads, x.stride_head)},
                          {A::kUnitColumns, box_rows, 1},
                          A::kSwizzle});
}

// A block for every multiprocessor, as far as there is work.
template <class A>
LaunchShape attention_sm90_shape(int64_t max_tiles, int num_heads, int num_sms) {
  const int64_t items = max_tiles * (kAttentionTileRows / A::BLOCK_M) * num_heads;
  return {std::min<int64_t>(items, num_sms), A::kNumThreads, A::kSharedBytes};
}

template <class T, int kHeadDim, int kConsumers>
void launch_attention_sm90(const VarlenAttentionParams& params, int num_sms, int device_index) {
  using A = AttentionSm90<T, kHeadDim, kConsumers>;
  AttentionSm90Params kernel_params{};
  kernel_params.op = params;
  kernel_params.scale = attention_scale(params.softmax_scale);
  // Without keys nothing is loaded.
  if (params.total_k > 0) {
    kernel_params.q = attention_map<A>("varlen_attention: q", params.q, params.total_q,
                                       params.num_heads, A::BLOCK_M);
    kernel_params.k = attention_map<A>("varlen_attention: k", params.k, params.total_k,
                                       params.num_kv_heads, A::BLOCK_N);
    kernel_params.v = attention_map<A>("varlen_attention: v", params.v, params.total_k,
                                       params.num_kv_heads, A::BLOCK_N);
  }
  launch("varlen_attention", &attention_sm90_kernel<T, kHeadDim, kConsumers>,
         attention_sm90_shape<A>(params.plan.max_q_tiles, params.num_heads, num_sms), device_index,
         kernel_params);
}

// Whether blocks take whole tiles of the plan, which spares loads, instead of halves: where there
// are enough for every multiprocessor and segments that fill them. Rows come out the same.
inline bool takes_whole_tiles(const VarlenAttentionParams& params, int num_sms) {
  const int64_t tiles = ceil_div(params.total_q, kAttentionTileRows);
  return 4 * tiles * params.num_heads >= 3 * int64_t{num_sms} &&
         2 * params.total_q > kAttentionTileRows * params.num_segments;
}

inline void launch_attention_sm90_forward(const VarlenAttentionParams& params, Dtype dtype,
                                          int num_sms, int device_index) {
  if (params.total_q == 0 || params.num_heads == 0) return;
  check_attention_values(params);
  with_attention_kernel(params, dtype, [&](auto type, auto head_dim) {
    using T = decltype(type);
    constexpr int kHeadDim = decltype(head_dim)::value;
    if constexpr (kHeadDim <= 72) {
      if (takes_whole_tiles(params, num_sms)) {
        return launch_attention_sm90<T, kHeadDim, 4>(params, num_sms, device_index);
      }
    }
    launch_attention_sm90<T, kHeadDim, 2>(params, num_sms, device_index);
  });
}

}  // namespace keye_ops
