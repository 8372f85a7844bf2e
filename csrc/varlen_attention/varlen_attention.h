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

constexpr double kAttentionLog2e = 1.4426950408889634;

// Scores are multiplied by the sign, 1, -1 or 0, and then by a positive factor that has log2(e) in
// it, so that the highest score has the highest weight.
struct AttentionScale {
  float scale_log2, sign;
};

// A tile of rows of one segment (queries or keys) and its counterpart in that segment: all that a
// block of a CUDA kernel has to know of cu_seqlens.
struct alignas(16) AttentionTile {
  int32_t row;          // the first row, of the whole batch
  int32_t rows_left;    // of the segment, from the first row on: the tile has at most these
  int32_t other_begin;  // the segment's keys (of a tile of queries) or queries (of keys)
  int32_t other_len;
};
constexpr int kAttentionTileRows = 256;

// Tiles that cover all rows, the most expensive first. Made on the device by
// varlen_attention_plan.cuh; rows that no valid segment has are in tiles without a counterpart.
struct AttentionPlan {
  const int32_t* num_tiles;      // [2]: of queries, of keys
  const AttentionTile* q_tiles;  // [max_q_tiles]
  const AttentionTile* k_tiles;  // [max_k_tiles]; backward only
  int64_t max_q_tiles, max_k_tiles;
};

// Memory of a plan: the two counts, then the tiles of queries, then those of keys.
constexpr int64_t kAttentionPlanHeader = 8;  // words
inline int64_t max_attention_tiles(int64_t total, int64_t num_segments) {
  return total / kAttentionTileRows + (num_segments < total ? num_segments + 1 : total);
}
inline int64_t attention_plan_words(int64_t total_q, int64_t total_k, int64_t num_segments) {
  return kAttentionPlanHeader + 4 * (max_attention_tiles(total_q, num_segments) +
                                     max_attention_tiles(total_k, num_segments));
}
inline AttentionPlan attention_plan_in(const int32_t* memory, int64_t total_q, int64_t total_k,
                                       int64_t num_segments) {
  AttentionPlan plan;
  plan.max_q_tiles = max_attention_tiles(total_q, num_segments);
  plan.max_k_tiles = max_attention_tiles(total_k, num_segments);
  plan.num_tiles = memory;
  plan.q_tiles = reinterpret_cast<const AttentionTile*>(memory + kAttentionPlanHeader);
  plan.k_tiles = plan.q_tiles + plan.max_q_tiles;
  return plan;
}

struct VarlenAttentionParams {
  AttentionTensor q, out;            // [total_q, num_heads, head_dim]
  AttentionTensor k, v;              // [total_k, num_kv_heads, head_dim]
  AttentionTensor dout, dq, dk, dv;  // backward only
  const int32_t* cu_seqlens_q;       // [num_segments + 1]
  const int32_t* cu_seqlens_k;       // [num_segments + 1]
  void* softmax_lse;                 // [num_heads, total_q], fp32 (fp64 for fp64), or null
  AttentionPlan plan;                // CUDA only
  float* delta;                      // [num_heads, total_q], CUDA backward's scratch memory
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

// How many keys of its segment the row `row` of a tile of queries sees.
KEYE_HOST_DEVICE int64_t visible_keys_of(bool causal, const AttentionTile& tile, int64_t row) {
  return visible_keys(causal, row, tile.rows_left, tile.other_len);
}

// The first row of a segment that sees key `key`.
KEYE_HOST_DEVICE int64_t first_row_seeing(bool causal, int64_t key, int64_t num_rows,
                                          int64_t num_keys) {
  const int64_t row = causal ? key + num_rows - num_keys : 0;
  return row < 0 ? 0 : row;
}

}  // namespace keye_ops
