// varlen_attention for every GPU from sm_80 on, forward, by mma.sync: a warp has 16 queries, whose
// scores and weights stay in its registers, and a block goes through the keys that its tile sees.
// head_dim 72 is a contraction of 4 x 16 and 8, and an output of 9 x 8.
#pragma once

#include "varlen_attention/varlen_attention_part.cuh"
#include "varlen_attention/varlen_attention_softmax.cuh"
#include "varlen_attention/varlen_attention_tile_sm80.cuh"

namespace keye_ops {

struct AttentionSm80Params {
  VarlenAttentionParams op;
  AttentionScale scale;
};

template <int kHeadDim_>
struct AttentionSm80 {
  using Layout = AttentionTileLayout<kHeadDim_>;
  static constexpr int kHeadDim = kHeadDim_, kTilesM = 1, kStep = 64;
  static constexpr int BLOCK_M = 128, BLOCK_N = kStep;
  static constexpr int kWarpRows = 16 * kTilesM;
  static constexpr int kNumThreads = BLOCK_M / kWarpRows * kWarpSize;
  static constexpr int kNumStages = 2;

  // Stages of K and V; the tile of Q, and that of out, take their place at the ends.
  static constexpr uint32_t kTileBytes = BLOCK_N * Layout::kPitch;
  static constexpr uint32_t kStageBytes = 2 * kTileBytes;
  static constexpr uint32_t kSharedBytes = kNumStages * kStageBytes;
  static_assert(BLOCK_M * Layout::kPitch <= kSharedBytes, "the tile of Q fits");
  static_assert(kSharedBytes <= 99 * 1024, "more than a block has on sm_86, sm_89 and sm_120");
};

// What a thread holds of its warp's 16 queries.
template <class A>
struct AttentionSm80State {
  AttentionRows<A, true> q;
  AttentionRowState rows;
  AttentionSums<A> out;
};

// 8 kColumns keys of a stage from `first` on. limits: how many of them each of a thread's rows
// sees, or more than there are.
template <class T, class A, int kColumns>
KEYE_DEVICE void attention_sm80_step(AttentionSm80State<A>& state, const AttentionScale& scale,
                                     uint32_t stage, int first, const int (&limits)[2]) {
  float scores[1][kColumns][4];
  multiply_rows<T, A>(scores, state.q, stage, first);
  float (&flat)[kColumns * 4] = reinterpret_cast<float (&)[kColumns * 4]>(scores);
  attention_sign(flat, scale.sign);
  if (limits[0] < 8 * kColumns || limits[1] < 8 * kColumns) attention_mask(flat, limits);
  float factors[2];
  attention_softmax(flat, state.rows, scale.scale_log2, factors);
  attention_rescale(reinterpret_cast<float (&)[A::kHeadDim / 2]>(state.out), factors);
  uint32_t weights[1][kColumns / 2][4];
  round_scores<T, A>(weights, scores);
  add_weighted_rows<T, A>(state.out, weights, stage + A::kTileBytes, first);
}

template <class T, int kHeadDim>
KEYE_KERNEL(AttentionSm80<kHeadDim>::kNumThreads, 1)
attention_sm80_kernel(KEYE_PARAMS AttentionSm80Params params) {
  using A = AttentionSm80<kHeadDim>;
  const VarlenAttentionParams& op = params.op;
  const uint32_t stages = shared_address(shared_memory());
  const int lane_idx = thread_idx() % kWarpSize;
  const int warp_row = warp_in_block() * A::kWarpRows;
  const int group = op.num_heads / op.num_kv_heads;
  const int64_t num_items =
      int64_t{op.plan.num_tiles[0]} * (kAttentionTileRows / A::BLOCK_M) * op.num_heads;
  for (int64_t item = block_idx(); item < num_items; item += grid_size()) {
    const AttentionTile tile = attention_part<A::BLOCK_M>(op.plan.q_tiles, item / op.num_heads);
    if (tile.rows_left <= 0) continue;
    const int head = static_cast<int>(item % op.num_heads), kv_head = head / group;
    const auto visible_of = [&](int row) {
      return static_cast<int>(visible_keys_of(op.causal, tile, row));
    };
    const int num_keys = visible_of(min(tile.rows_left, A::BLOCK_M) - 1);
    const int num_blocks = (num_keys + A::BLOCK_N - 1) / A::BLOCK_N;

    // Groups are committed past the last, too.
    const auto load_stage = [&](int block) {
      if (block < num_blocks) {
        const uint32_t stage =
            stages + static_cast<uint32_t>(block % A::kNumStages) * A::kStageBytes;
        const int key = block * A::BLOCK_N;
        const int64_t row = int64_t{tile.other_begin} + key;
        const int num_rows = tile.other_len - key;
        load_attention_tile<kHeadDim, A::BLOCK_N, A::kNumThreads>(
            stage, rows_of<const T>(op.k, row, kv_head), op.k.stride_row, num_rows);
        load_attention_tile<kHeadDim, A::BLOCK_N, A::kNumThreads>(
            stage + A::kTileBytes, rows_of<const T>(op.v, row, kv_head), op.v.stride_row, num_rows);
      }
      ptx::cp_async_commit_group();
    };

    AttentionSm80State<A> state{
        AttentionRows<A, true>(stages), {{-INFINITY, -INFINITY}, {0.0f, 0.0f}, {0.0f, 0.0f}}, {}};
    if (num_blocks > 0) {
      load_attention_tile<kHeadDim, A::BLOCK_M, A::kNumThreads>(
          stages, rows_of<const T>(op.q, tile.row, head), op.q.stride_row, tile.rows_left);
      ptx::cp_async_commit_group();
      ptx::cp_async_wait_group<0>();
      syncthreads();
      state.q.keep();
      syncthreads();
      load_stage(0);
    }

    // The last of a warp's rows sees the most keys, the first the fewest.
    const int most = warp_row < tile.rows_left
                         ? visible_of(min(warp_row + A::kWarpRows, tile.rows_left) - 1)
                         : 0;
    const int rows_see[2] = {visible_of(warp_row + lane_idx / 4),
                             visible_of(warp_row + lane_idx / 4 + 8)};
    for (int block = 0; block < num_blocks; block++) {
      // The stage has arrived for every thread, and all have left the other, which is refilled.
      ptx::cp_async_wait_group<0>();
      syncthreads();
      load_stage(block + 1);

      const uint32_t stage = stages + static_cast<uint32_t>(block % A::kNumStages) * A::kStageBytes;
      const int key = block * A::BLOCK_N;
      if (key + A::BLOCK_N <= most) {
        attention_sm80_step<T, A, A::BLOCK_N / 8>(state, params.scale, stage, 0,
                                                  {rows_see[0] - key, rows_see[1] - key});
        continue;
      }
      // What is left of the last block, 16 keys at a time.
      for (int first = 0; key + first < most; first += 16) {
        const int before = key + first;
        attention_sm80_step<T, A, 2>(state, params.scale, stage, first,
                                     {rows_see[0] - before, rows_see[1] - before});
      }
    }

    // Divide by the sums, and store through shared memory, which all warps have left.
    syncthreads();
    float inverse[1][2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = warp_row + lane_idx / 4 + r * 8;
      const AttentionRowEnd end = attention_row_end(state.rows, r);
      inverse[0][r] = end.inverse;
      if (op.softmax_lse != nullptr && lane_idx % 4 == 0 && row < tile.rows_left) {
        static_cast<float*>(op.softmax_lse)[head * op.total_q + tile.row + row] = end.lse;
      }
    }
    store_sums<T, A>(rows_of<T>(op.out, int64_t{tile.row} + warp_row, head), op.out.stride_row,
                     tile.rows_left - warp_row, state.out, inverse, A::Layout::offset(warp_row, 0));
    syncthreads();
  }
}

}  // namespace keye_ops
