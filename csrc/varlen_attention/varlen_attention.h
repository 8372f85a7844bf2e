// varlen_attention: what a kernel is told, and the formulas, once for host and device.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace keye_ops {

// One of the tensors of rows [N, heads, head_dim]. Strides are in elements; head_dim has stride 1.
struct AttentionTensor {
  void* data;
  int64_t stride_row, stride_head;
};

struct VarlenAttentionParams {
  AttentionTensor q, out;            // [total_q, num_heads, head_dim]
  AttentionTensor k, v;              // [total_k, num_kv_heads, head_dim]
  AttentionTensor dout, dq, dk, dv;  // backward only
  const int32_t* cu_seqlens_q;       // [num_segments + 1]
  const int32_t* cu_seqlens_k;       // [num_segments + 1]
  void* softmax_lse;                 // [num_heads, total_q], fp32 (fp64 for fp64), or null
  int64_t total_q, total_k;
  int64_t num_segments;
  int num_heads, num_kv_heads, head_dim;
  double softmax_scale;
  bool causal;
};

// Keys that row `row` of a segment sees: the last row sees all of them.
KEYE_HOST_DEVICE int64_t visible_keys(bool causal, int64_t row, int64_t num_rows,
                                      int64_t num_keys) {
  if (!causal) return num_keys;
  const int64_t visible = row + 1 + num_keys - num_rows;
  return visible < 0 ? 0 : visible < num_keys ? visible : num_keys;
}

// The first row of a segment that sees key `key`.
KEYE_HOST_DEVICE int64_t first_row_seeing(bool causal, int64_t key, int64_t num_rows,
                                          int64_t num_keys) {
  const int64_t row = causal ? key + num_rows - num_keys : 0;
  return row < 0 ? 0 : row;
}

}  // namespace keye_ops
