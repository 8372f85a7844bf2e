// varlen_attention on CUDA: the launch that plans its work.
#pragma once

#include "common/launch.cuh"
#include "varlen_attention/varlen_attention_plan.cuh"

namespace keye_ops {

// Fills a plan's memory; the params need offsets and totals only.
inline void launch_attention_plan(const VarlenAttentionParams& params, int32_t* memory,
                                  bool with_k_tiles, int device_index) {
  constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1;
  KEYE_CHECK(params.total_q <= kMaxRows && params.total_k <= kMaxRows,
             "varlen_attention: a batch on CUDA has at most 2**31 - 1 rows, got (", params.total_q,
             ", ", params.total_k, ")");
  const AttentionPlan plan =
      attention_plan_in(memory, params.total_q, params.total_k, params.num_segments);
  AttentionPlanParams kernel_params{};
  kernel_params.q = {params.cu_seqlens_q, params.total_q, const_cast<AttentionTile*>(plan.q_tiles),
                     plan.max_q_tiles};
  kernel_params.k = {params.cu_seqlens_k, params.total_k, const_cast<AttentionTile*>(plan.k_tiles),
                     plan.max_k_tiles};
  kernel_params.num_tiles = memory;
  kernel_params.error_word = error_word(device_index);
  kernel_params.num_segments = params.num_segments;
  kernel_params.causal = params.causal;
  kernel_params.with_k_tiles = with_k_tiles;
  launch("varlen_attention", &attention_plan_kernel, {1, kPlanThreads, sizeof(PlanShared)},
         device_index, kernel_params);
}

}  // namespace keye_ops
