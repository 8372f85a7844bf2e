// P and dS = P (dP - delta) from S and dP, in the registers of a warpgroup.
#pragma once

#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "common/thread.cuh"
#include "varlen_attention/varlen_attention.h"

namespace keye_ops {

// Of a query.
struct alignas(8) AttentionStats {
  float lse_log2;  // the exponent of 2 that is subtracted; infinite in a row without a visible key
  float delta;
};

// P = 0 in a row without a visible key.
KEYE_DEVICE float attention_lse_log2(float lse) {
  return lse == -INFINITY ? INFINITY : lse * static_cast<float>(kAttentionLog2e);
}

// Of place `at` in [num_heads, total_q].
KEYE_DEVICE AttentionStats attention_stats(const VarlenAttentionParams& op, int64_t at) {
  const float lse = load_bytes<float>(static_cast<const float*>(op.softmax_lse) + at);
  return {attention_lse_log2(lse), load_bytes<float>(op.delta + at)};
}

// Scores become weights; lse_log2_of(i) is that of value i's query.
template <int kCount, class F>
KEYE_DEVICE void attention_weights(float (&scores)[kCount], float scale_log2,
                                   const F& lse_log2_of) {
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    scores[i] = ptx::ex2_approx_ftz(scores[i] * scale_log2 - lse_log2_of(i));
  }
}

template <int kCount, class F>
KEYE_DEVICE void attention_score_gradients(float (&gradients)[kCount],
                                           const float (&weights)[kCount], const F& delta_of) {
#pragma unroll
  for (int i = 0; i < kCount; i++) gradients[i] = weights[i] * (gradients[i] - delta_of(i));
}

// Zeros, whatever was computed, in place of values that are hidden.
template <int kCount, class F>
KEYE_DEVICE void attention_hide(float (&values)[kCount], const F& is_hidden) {
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    if (is_hidden(i)) values[i] = 0.0f;
  }
}

}  // namespace keye_ops
