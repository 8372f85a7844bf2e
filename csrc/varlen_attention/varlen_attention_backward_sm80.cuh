// varlen_attention's gradients for every GPU from sm_80 on, by mma.sync. One kernel goes through
// keys for dk and dv and one through queries for dq; both compute S and dP. That is 7 products in
// place of 5, but no sum is made by atomics: a gradient has the same bits every time.
#pragma once

#include <algorithm>

#include "common/vec.cuh"
#include "varlen_attention/varlen_attention_gradients.cuh"
#include "varlen_attention/varlen_attention_part.cuh"
#include "varlen_attention/varlen_attention_tile_sm80.cuh"

namespace keye_ops {

// ---- delta: the sum of dout * out over head_dim ----

constexpr int kDeltaThreads = 128;
constexpr int kDeltaLanes = 8;  // for each row of a head
constexpr int kDeltaRows = 8;   // of a block, for each head

template <class T, int kHeadDim>
KEYE_KERNEL(kDeltaThreads, 1)
attention_delta_kernel(KEYE_PARAMS VarlenAttentionParams params) {
  constexpr int kChunks = kHeadDim / kVectorSize<T>;
  constexpr int kChunksPerLane = (kChunks + kDeltaLanes - 1) / kDeltaLanes;
  constexpr int kPerWarp = kWarpSize / kDeltaLanes, kPerBlock = kDeltaThreads / kDeltaLanes;
  const int lane_idx = thread_idx() % kWarpSize, warp_idx = warp_in_block();
  const int num_items = kDeltaRows * params.num_heads;
  for (int64_t first_row = block_idx() * kDeltaRows; first_row < params.total_q;
       first_row += grid_size() * kDeltaRows) {
    // NOTE: the lanes of a warp leave together, since all take part in its sums.
    for (int first = warp_idx * kPerWarp; first < num_items; first += kPerBlock) {
      const int item = first + lane_idx / kDeltaLanes;
      const int head = item % params.num_heads;
      const int64_t row = first_row + item / params.num_heads;
      const bool inside = item < num_items && row < params.total_q;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kChunksPerLane; i++) {
        const int chunk = lane_idx % kDeltaLanes + i * kDeltaLanes;
        if (inside && chunk < kChunks) {
          const auto row_of = [&](const AttentionTensor& x) {
            return static_cast<const T*>(x.data) + row * x.stride_row + head * x.stride_head;
          };
          float dout[kVectorSize<T>], out[kVectorSize<T>];
          load_vector(row_of(params.dout) + chunk * kVectorSize<T>, dout);
          load_vector(row_of(params.out) + chunk * kVectorSize<T>, out);
#pragma unroll
          for (int j = 0; j < kVectorSize<T>; j++) sum += dout[j] * out[j];
        }
      }
#pragma unroll
      for (int lanes = kDeltaLanes / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
      if (inside && lane_idx % kDeltaLanes == 0) params.delta[head * params.total_q + row] = sum;
    }
  }
}

// ---- what the kernels of products share ----

// A block keeps BLOCK_M rows of two tensors, of which every warp has kTilesM times 16, and goes
// through blocks of BLOCK_N rows of two others, in steps of kStep. Products of a step are sums over
// head_dim, with the kept rows as rows; they become operands of the next product in the registers
// where they are. kNumInRegisters of the kept tensors stay there, and stages take their place.
template <int kHeadDim_, int kTilesM_, int kNumInRegisters_, int kBlockN, int kStep_>
struct AttentionBackwardBlock {
  using Layout = AttentionTileLayout<kHeadDim_>;
  static constexpr int kHeadDim = kHeadDim_, kTilesM = kTilesM_, kStep = kStep_;
  static constexpr int kNumInRegisters = kNumInRegisters_;
  static constexpr int BLOCK_M = 128, BLOCK_N = kBlockN;
  static constexpr int kWarpRows = 16 * kTilesM;
  static constexpr int kNumThreads = BLOCK_M / kWarpRows * kWarpSize;
  static constexpr int kMinBlocks = 256 / kNumThreads;  // as many as registers allow
  static constexpr int kNumStages = 2;

  static constexpr uint32_t kTileBytesM = BLOCK_M * Layout::kPitch;
  static constexpr uint32_t kTileBytesN = BLOCK_N * Layout::kPitch;
  static constexpr uint32_t kStatsBytes = BLOCK_N * sizeof(float);
  static constexpr uint32_t kStageBytes = 2 * kTileBytesN + 2 * kStatsBytes;
  static constexpr uint32_t kStages = (2 - kNumInRegisters) * kTileBytesM;  // where they begin
  static constexpr uint32_t kSharedBytes = std::max(2 * kTileBytesM,        //
                                                    kStages + kNumStages * kStageBytes);

  static_assert(kStep % 16 == 0 && BLOCK_N % kStep == 0, "steps are whole operands");
  static_assert(2 * BLOCK_N <= kNumThreads, "a thread copies one word of lse or delta");
  static_assert(kSharedBytes <= 99 * 1024, "more than a block has on sm_86, sm_89 and sm_120");
};

// NOTE: the largest of each that leave no register to memory. Two tiles of 16 rows share what a
// warp reads of a stage, which shared memory has just the bandwidth for with one.
template <int kHeadDim>
using AttentionDkdvBlock = AttentionBackwardBlock<kHeadDim, kHeadDim <= 72 ? 2 : 1,
                                                  kHeadDim <= 72   ? 0
                                                  : kHeadDim <= 96 ? 2
                                                                   : 1,
                                                  kHeadDim <= 96 ? 64 : 32, 16>;
template <int kHeadDim>
using AttentionDqBlock = AttentionBackwardBlock<kHeadDim, kHeadDim <= 80 ? 2 : 1,
                                                kHeadDim == 72 || kHeadDim == 80 ? 1 : 2, 64, 16>;

struct AttentionScoreStats {
  float lse_log2, delta;
  bool visible;
};

// P and dS = P (dP - delta) from S and dP; stats_of(m, n, v) tells about a value.
template <class B, class F>
KEYE_DEVICE void scores_to_gradients(AttentionScores<B>& s, AttentionScores<B>& dp,
                                     float scale_log2, const F& stats_of) {
#pragma unroll
  for (int m = 0; m < B::kTilesM; m++) {
#pragma unroll
    for (int n = 0; n < B::kStep / 8; n++) {
#pragma unroll
      for (int v = 0; v < 4; v++) {
        const AttentionScoreStats stats = stats_of(m, n, v);
        const float p = ptx::ex2_approx_ftz(s[m][n][v] * scale_log2 - stats.lse_log2);
        const float ds = p * (dp[m][n][v] - stats.delta);
        s[m][n][v] = stats.visible ? p : 0.0f;
        dp[m][n][v] = stats.visible ? ds : 0.0f;
      }
    }
  }
}

// One factor for all rows.
template <class B>
struct Factors {
  float values[B::kTilesM][2];
  KEYE_DEVICE explicit Factors(float factor) {
#pragma unroll
    for (int m = 0; m < B::kTilesM; m++) values[m][0] = values[m][1] = factor;
  }
};

// The kept rows of a block. The second tensor's come first in memory, since registers take the
// first tensor's before them.
template <class B>
using AttentionFirstRows = AttentionRows<B, (B::kNumInRegisters > 0)>;
template <class B>
using AttentionSecondRows = AttentionRows<B, (B::kNumInRegisters > 1)>;

template <class T, class B>
KEYE_DEVICE void load_kept_rows(AttentionFirstRows<B>& first, AttentionSecondRows<B>& second,
                                const T* first_source, int64_t first_stride, const T* second_source,
                                int64_t second_stride, int num_rows) {
  const uint32_t shared = shared_address(shared_memory());
  load_attention_tile<B::kHeadDim, B::BLOCK_M, B::kNumThreads>(
      shared + B::kTileBytesM, first_source, first_stride, num_rows);
  load_attention_tile<B::kHeadDim, B::BLOCK_M, B::kNumThreads>(shared, second_source, second_stride,
                                                               num_rows);
  if constexpr (B::kNumInRegisters > 0) {
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    syncthreads();
    first.keep();
    if constexpr (B::kNumInRegisters > 1) second.keep();
    syncthreads();
  }
}

// ---- dk and dv: a tile of keys, all heads of queries that share them, queries that see them ----

template <class T, int kHeadDim>
KEYE_KERNEL(AttentionDkdvBlock<kHeadDim>::kNumThreads, AttentionDkdvBlock<kHeadDim>::kMinBlocks)
attention_dkdv_sm80_kernel(KEYE_PARAMS VarlenAttentionParams params) {
  using B = AttentionDkdvBlock<kHeadDim>;
  const uint32_t shared = shared_address(shared_memory()), stages = shared + B::kStages;
  const int lane_idx = thread_idx() % kWarpSize;
  const int warp_row = warp_in_block() * B::kWarpRows;
  const int group_size = params.num_heads / params.num_kv_heads;
  const float scale = static_cast<float>(params.softmax_scale);
  const float scale_log2 = static_cast<float>(params.softmax_scale * kAttentionLog2e);
  constexpr int kParts = kAttentionTileRows / B::BLOCK_M;
  const int64_t num_items = int64_t{params.plan.num_tiles[1]} * kParts * params.num_kv_heads;
  for (int64_t item = block_idx(); item < num_items; item += grid_size()) {
    const AttentionTile tile =
        attention_part<B::BLOCK_M>(params.plan.k_tiles, item / params.num_kv_heads);
    if (tile.rows_left <= 0) continue;
    const int kv_head = static_cast<int>(item % params.num_kv_heads);
    const int num_queries = tile.other_len;
    const int first_query = static_cast<int>(
        min(first_row_seeing(params.causal, 0, num_queries, tile.rows_left), int64_t{num_queries}));
    const int num_blocks = (num_queries - first_query + B::BLOCK_N - 1) / B::BLOCK_N;
    const int num_steps = num_blocks * group_size;

    // How many of the tile's keys a query sees; the last one sees all that are left.
    const auto visible_of = [&](int query) {
      if (query >= num_queries) return 0;
      return params.causal ? query - num_queries + 1 + tile.rows_left : tile.rows_left;
    };

    // A step is a block of queries of one head. Groups are committed past the last, too.
    const auto load_stage = [&](int step) {
      if (step < num_steps) {
        const uint32_t stage =
            stages + static_cast<uint32_t>(step % B::kNumStages) * B::kStageBytes;
        const int head = kv_head * group_size + step / num_blocks;
        const int query = first_query + step % num_blocks * B::BLOCK_N;
        const int64_t row = int64_t{tile.other_begin} + query;
        const int num_rows = num_queries - query;
        load_attention_tile<kHeadDim, B::BLOCK_N, B::kNumThreads>(
            stage, rows_of<const T>(params.q, row, head), params.q.stride_row, num_rows);
        load_attention_tile<kHeadDim, B::BLOCK_N, B::kNumThreads>(
            stage + B::kTileBytesN, rows_of<const T>(params.dout, row, head),
            params.dout.stride_row, num_rows);
        // Of lse, then of delta.
        const int idx = thread_idx() % B::BLOCK_N;
        const bool inside = idx < num_rows;
        const float* stats = thread_idx() < B::BLOCK_N
                                 ? static_cast<const float*>(params.softmax_lse)
                                 : params.delta;
        if (thread_idx() < 2 * B::BLOCK_N) {
          ptx::cp_async_ca<4>(stage + 2 * B::kTileBytesN + static_cast<uint32_t>(thread_idx()) * 4,
                              stats + head * params.total_q + row + (inside ? idx : 0),
                              inside ? 4 : 0);
        }
      }
      ptx::cp_async_commit_group();
    };

    AttentionSums<B> dk = {}, dv = {};
    AttentionFirstRows<B> k(shared + B::kTileBytesM);
    AttentionSecondRows<B> v(shared);
    if (num_steps > 0) {
      load_kept_rows<T>(k, v, rows_of<const T>(params.k, tile.row, kv_head), params.k.stride_row,
                        rows_of<const T>(params.v, tile.row, kv_head), params.v.stride_row,
                        tile.rows_left);
      load_stage(0);
    }
    for (int step = 0; step < num_steps; step++) {
      // The stage has arrived for every thread, and all have left the other, which is refilled.
      ptx::cp_async_wait_group<0>();
      syncthreads();
      load_stage(step + 1);

      const uint32_t stage_offset = static_cast<uint32_t>(step % B::kNumStages) * B::kStageBytes;
      const uint32_t q_tile = stages + stage_offset, dout_tile = q_tile + B::kTileBytesN;
      const unsigned char* stats = shared_memory() + B::kStages + stage_offset + 2 * B::kTileBytesN;
      const int query = first_query + step % num_blocks * B::BLOCK_N;
      if (warp_row >= tile.rows_left) continue;
#pragma unroll
      for (int first = 0; first < B::BLOCK_N; first += B::kStep) {
        // The last of these queries sees the most keys, the first the fewest.
        if (visible_of(min(query + first + B::kStep, num_queries) - 1) <= warp_row ||
            query + first >= num_queries) {
          continue;
        }
        const bool masked = query + first + B::kStep > num_queries ||
                            (params.causal && visible_of(query + first) < warp_row + B::kWarpRows);
        AttentionScores<B> s, dp;
        multiply_rows<T, B>(s, k, q_tile, first);
        multiply_rows<T, B>(dp, v, dout_tile, first);
        float lse_log2[B::kStep / 8][2], delta[B::kStep / 8][2];
        int visible[B::kStep / 8][2];
#pragma unroll
        for (int n = 0; n < B::kStep / 8; n++) {
          struct alignas(8) Pair {
            float values[2];
          };
          const int column = first + n * 8 + lane_idx % 4 * 2;
          const uint32_t at = static_cast<uint32_t>(column) * 4;
          const Pair lse_pair = load_bytes<Pair>(stats + at);
          const Pair delta_pair = load_bytes<Pair>(stats + B::kStatsBytes + at);
#pragma unroll
          for (int i = 0; i < 2; i++) {
            lse_log2[n][i] = attention_lse_log2(lse_pair.values[i]);
            delta[n][i] = delta_pair.values[i];
            visible[n][i] = visible_of(query + column + i) - warp_row - lane_idx / 4;
          }
        }
        if (masked) {
          scores_to_gradients<B>(s, dp, scale_log2,
                                 [&](int m, int n, int i) -> AttentionScoreStats {
                                   return {lse_log2[n][i % 2], delta[n][i % 2],
                                           m * 16 + i / 2 * 8 < visible[n][i % 2]};
                                 });
        } else {
          scores_to_gradients<B>(s, dp, scale_log2, [&](int, int n, int i) -> AttentionScoreStats {
            return {lse_log2[n][i % 2], delta[n][i % 2], true};
          });
        }
        AttentionWeights<B> weights;
        round_scores<T, B>(weights, s);
        add_weighted_rows<T, B>(dv, weights, dout_tile, first);
        round_scores<T, B>(weights, dp);
        add_weighted_rows<T, B>(dk, weights, q_tile, first);
      }
    }

    syncthreads();
    const uint32_t offset = B::Layout::offset(warp_row, 0);
    const int num_rows = tile.rows_left - warp_row;
    const int64_t row = int64_t{tile.row} + warp_row;
    store_sums<T, B>(rows_of<T>(params.dk, row, kv_head), params.dk.stride_row, num_rows, dk,
                     Factors<B>(scale).values, offset);
    store_sums<T, B>(rows_of<T>(params.dv, row, kv_head), params.dv.stride_row, num_rows, dv,
                     Factors<B>(1.0f).values, B::kTileBytesM + offset);
    syncthreads();
  }
}

// ---- dq: a tile of queries of a head, keys that they see ----

template <class T, int kHeadDim>
KEYE_KERNEL(AttentionDqBlock<kHeadDim>::kNumThreads, AttentionDqBlock<kHeadDim>::kMinBlocks)
attention_dq_sm80_kernel(KEYE_PARAMS VarlenAttentionParams params) {
  using B = AttentionDqBlock<kHeadDim>;
  const uint32_t shared = shared_address(shared_memory()), stages = shared + B::kStages;
  const int lane_idx = thread_idx() % kWarpSize;
  const int warp_row = warp_in_block() * B::kWarpRows;
  const int group_size = params.num_heads / params.num_kv_heads;
  const float scale = static_cast<float>(params.softmax_scale);
  const float scale_log2 = static_cast<float>(params.softmax_scale * kAttentionLog2e);
  constexpr int kParts = kAttentionTileRows / B::BLOCK_M;
  const int64_t num_items = int64_t{params.plan.num_tiles[0]} * kParts * params.num_heads;
  for (int64_t item = block_idx(); item < num_items; item += grid_size()) {
    const AttentionTile tile =
        attention_part<B::BLOCK_M>(params.plan.q_tiles, item / params.num_heads);
    if (tile.rows_left <= 0) continue;
    const int head = static_cast<int>(item % params.num_heads), kv_head = head / group_size;
    const auto visible_of = [&](int row) {
      return static_cast<int>(visible_keys_of(params.causal, tile, row));
    };
    const int num_keys = visible_of(min(tile.rows_left, B::BLOCK_M) - 1);
    const int num_steps = (num_keys + B::BLOCK_N - 1) / B::BLOCK_N;

    // A step is a block of keys. Groups are committed past the last, too.
    const auto load_stage = [&](int step) {
      if (step < num_steps) {
        const uint32_t stage =
            stages + static_cast<uint32_t>(step % B::kNumStages) * B::kStageBytes;
        const int key = step * B::BLOCK_N;
        const int64_t row = int64_t{tile.other_begin} + key;
        const int num_rows = tile.other_len - key;
        load_attention_tile<kHeadDim, B::BLOCK_N, B::kNumThreads>(
            stage, rows_of<const T>(params.k, row, kv_head), params.k.stride_row, num_rows);
        load_attention_tile<kHeadDim, B::BLOCK_N, B::kNumThreads>(
            stage + B::kTileBytesN, rows_of<const T>(params.v, row, kv_head), params.v.stride_row,
            num_rows);
      }
      ptx::cp_async_commit_group();
    };

    AttentionSums<B> dq = {};
    AttentionFirstRows<B> q(shared + B::kTileBytesM);
    AttentionSecondRows<B> dout(shared);
    float lse_log2[B::kTilesM][2], delta[B::kTilesM][2];
    int visible[B::kTilesM][2];
    if (num_steps > 0) {
      load_kept_rows<T>(q, dout, rows_of<const T>(params.q, tile.row, head), params.q.stride_row,
                        rows_of<const T>(params.dout, tile.row, head), params.dout.stride_row,
                        tile.rows_left);
      load_stage(0);
#pragma unroll
      for (int m = 0; m < B::kTilesM; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int row = min(warp_row + m * 16 + half * 8 + lane_idx / 4, tile.rows_left - 1);
          const int64_t at = head * params.total_q + tile.row + row;
          lse_log2[m][half] = attention_lse_log2(
              load_bytes<float>(static_cast<const float*>(params.softmax_lse) + at));
          delta[m][half] = load_bytes<float>(params.delta + at);
          visible[m][half] = visible_of(row);
        }
      }
    }
    // The last of a warp's rows sees the most keys, the first the fewest.
    const int most = visible_of(min(warp_row + B::kWarpRows, tile.rows_left) - 1);
    const int fewest = visible_of(warp_row);
    for (int step = 0; step < num_steps; step++) {
      // The stage has arrived for every thread, and all have left the other, which is refilled.
      ptx::cp_async_wait_group<0>();
      syncthreads();
      load_stage(step + 1);

      const uint32_t k_tile = stages + static_cast<uint32_t>(step % B::kNumStages) * B::kStageBytes;
      const uint32_t v_tile = k_tile + B::kTileBytesN;
      if (warp_row >= tile.rows_left) continue;
#pragma unroll
      for (int first = 0; first < B::BLOCK_N; first += B::kStep) {
        const int key = step * B::BLOCK_N + first;
        if (key >= most) continue;
        AttentionScores<B> s, dp;
        multiply_rows<T, B>(s, q, k_tile, first);
        multiply_rows<T, B>(dp, dout, v_tile, first);
        if (key + B::kStep > fewest) {
          const int column = key + lane_idx % 4 * 2;
          scores_to_gradients<B>(s, dp, scale_log2,
                                 [&](int m, int n, int i) -> AttentionScoreStats {
                                   return {lse_log2[m][i / 2], delta[m][i / 2],
                                           column + n * 8 + i % 2 < visible[m][i / 2]};
                                 });
        } else {
          scores_to_gradients<B>(s, dp, scale_log2, [&](int m, int, int i) -> AttentionScoreStats {
            return {lse_log2[m][i / 2], delta[m][i / 2], true};
          });
        }
        AttentionWeights<B> weights;
        round_scores<T, B>(weights, dp);
        add_weighted_rows<T, B>(dq, weights, k_tile, first);
      }
    }

    syncthreads();
    store_sums<T, B>(rows_of<T>(params.dq, int64_t{tile.row} + warp_row, head),
                     params.dq.stride_row, tile.rows_left - warp_row, dq, Factors<B>(scale).values,
                     B::Layout::offset(warp_row, 0));
    syncthreads();
  }
}

}  // namespace keye_ops
