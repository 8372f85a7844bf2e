// The softmax of scores as mma.sync and wgmma leave them in registers: of every 8 columns a thread
// has two, 2 (lane % 4) + {0, 1}, of the rows lane / 4 and lane / 4 + 8 of its warp's 16.
#pragma once

#include "common/ptx.cuh"
#include "common/thread.cuh"
#include "varlen_attention/varlen_attention.h"

namespace keye_ops {

// What a thread knows of its two rows, lane / 4 and lane / 4 + 8 of its warp's 16.
struct AttentionRowState {
  float max[2];    // of the scores
  float shift[2];  // its multiple that is subtracted: max * scale_log2, or 0 where there is none
  float sum[2];    // of the weights of this thread's columns
};

// Scores times 1, -1 or 0.
template <int kCount>
KEYE_DEVICE void attention_sign(float (&scores)[kCount], float sign) {
  if (sign == 1.0f) return;
#pragma unroll
  for (int i = 0; i < kCount; i++) scores[i] *= sign;
}

// Hides keys that a row does not see. `limits` counts those that it sees from this block on.
template <int kCount>
KEYE_DEVICE void attention_mask(float (&scores)[kCount], const int (&limits)[2]) {
  const int first = thread_idx() % 4 * 2;
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    const int column = i / 4 * 8 + i % 2 + first;
    if (column >= limits[i / 2 % 2]) scores[i] = -INFINITY;
  }
}

// Scores become weights. The factors that what was summed before has to be multiplied by.
template <int kCount>
KEYE_DEVICE void attention_softmax(float (&scores)[kCount], AttentionRowState& rows,
                                   float scale_log2, float (&factors)[2]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float highest = scores[r * 2];
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      highest = max_of(highest, max_of(scores[i + r * 2], scores[i + r * 2 + 1]));
    }
    highest = max_of(highest, shuffle_xor(highest, 1));
    highest = max_of(highest, shuffle_xor(highest, 2));

    // NOTE: with a threshold, to rescale less often, the highest weight would not be an exact 1,
    // and the mean error of bf16 outputs 4 to 6 % above that of plain PyTorch.
    factors[r] = 1.0f;
    if (highest > rows.max[r]) {
      const float before = rows.max[r] == -INFINITY ? -INFINITY : rows.shift[r];
      rows.max[r] = highest;
      rows.shift[r] = highest * scale_log2;
      factors[r] = ptx::ex2_approx_ftz(before - rows.shift[r]);
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float& score = scores[i + r * 2 + j];
        score = ptx::ex2_approx_ftz(score * scale_log2 - rows.shift[r]);
        sum += score;
      }
    }
    rows.sum[r] = rows.sum[r] * factors[r] + sum;
  }
}

template <int kCount>
KEYE_DEVICE void attention_rescale(float (&out)[kCount], const float (&factors)[2]) {
  if (!warp_any(factors[0] != 1.0f || factors[1] != 1.0f)) return;
#pragma unroll
  for (int i = 0; i < kCount; i++) out[i] *= factors[i / 2 % 2];
}

// What becomes of a row when all of its keys have been seen.
struct AttentionRowEnd {
  float inverse;  // of the sum of its weights; 0 where it has seen no key
  float lse;
};
KEYE_DEVICE AttentionRowEnd attention_row_end(const AttentionRowState& rows, int r) {
  constexpr float kLn2 = 0.693147180559945309f;
  float sum = rows.sum[r];
  sum += shuffle_xor(sum, 1);
  sum += shuffle_xor(sum, 2);
  if (sum == 0.0f) return {0.0f, -INFINITY};
  return {1.0f / sum, rows.shift[r] * kLn2 + log_of(sum)};
}

}  // namespace keye_ops
