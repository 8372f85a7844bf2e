// varlen_attention's gradients on sm_90a. As for sm_80, one kernel goes through queries for dk and
// dv and one through keys for dq, each computing S and dP: 7 products in place of 5, and no sum
// that depends on who comes first. A block keeps rows of two tensors in shared memory; one warp
// brings tiles of two others by TMA. P and dS become operands in the registers where they are.
#pragma once

#include "varlen_attention/varlen_attention_gradients.cuh"
#include "varlen_attention/varlen_attention_part.cuh"
#include "varlen_attention/varlen_attention_tile_sm90.cuh"

namespace keye_ops {

// kept: k and v for dk and dv, q and dout for dq; streamed are the others, in the same order.
struct AttentionBackwardSm90Params {
  TensorMap kept[2], streamed[2];  // [heads, rows, head_dim]; boxes are a unit of a tile
  VarlenAttentionParams op;
};

template <class T, int kHeadDim, int kConsumers, int kBlockN>
struct AttentionBackwardSm90 : AttentionSm90Tiles<T, kHeadDim, kConsumers, kBlockN> {
  using Tiles = AttentionSm90Tiles<T, kHeadDim, kConsumers, kBlockN>;
  using Tiles::kTileBytes, Tiles::kTileBytesQ, Tiles::kMaxSharedBytes;

  // Shared memory: kept tiles, a ring of streamed ones, lse and delta of the queries that are
  // streamed, barriers.
  static constexpr uint32_t kStageBytes = 2 * kTileBytes;
  static constexpr uint32_t kStatsBytes = 2 * sizeof(float) * kBlockN;
  static constexpr uint32_t kFit =
      (kMaxSharedBytes - 1024 - 2 * kTileBytesQ) / (kStageBytes + kStatsBytes);
  static constexpr int kNumStages = kFit < 4 ? static_cast<int>(kFit) : 4;
  static constexpr uint32_t kStages = 2 * kTileBytesQ;
  static constexpr uint32_t kStats = kStages + kNumStages * kStageBytes;
  static constexpr uint32_t kBarriers = kStats + kNumStages * kStatsBytes;
  static constexpr uint32_t kSharedBytes = kBarriers + (2 + 3 * kNumStages) * sizeof(uint64_t);
  static_assert(kNumStages >= 2, "a stage is refilled while another is read");
};

// NOTE: as many rows at a time as registers allow; with more the compiler would run products one
// after another. Four warpgroups have fewer registers each, and share what is brought.
template <class T, int kHeadDim>
using AttentionDkdvSm90 = AttentionBackwardSm90<T, kHeadDim, 2, (kHeadDim > 96 ? 32 : 64)>;
template <class T, int kHeadDim>
using AttentionDqSm90 =
    AttentionBackwardSm90<T, kHeadDim, kHeadDim <= 72 ? 4 : 2, kHeadDim <= 72 ? 32 : 64>;

template <class B>
struct AttentionBackwardShared {
  uint32_t base;

  KEYE_DEVICE uint32_t kept(uint32_t idx) const { return base + idx * B::kTileBytesQ; }
  KEYE_DEVICE uint32_t streamed(uint32_t stage, uint32_t idx) const {
    return base + B::kStages + stage * B::kStageBytes + idx * B::kTileBytes;
  }
  KEYE_DEVICE uint32_t stats(uint32_t stage) const {  // relative to shared memory
    return B::kStats + stage * B::kStatsBytes;
  }
  KEYE_DEVICE uint32_t barrier(uint32_t idx) const { return base + B::kBarriers + idx * 8; }
  KEYE_DEVICE uint32_t kept_full() const { return barrier(0); }
  KEYE_DEVICE uint32_t kept_empty() const { return barrier(1); }
  // Tiles have come by TMA; what a warp has to do with them is done; consumers have left them.
  KEYE_DEVICE uint32_t came(uint32_t stage) const { return barrier(2 + stage); }
  KEYE_DEVICE uint32_t full(uint32_t stage) const { return barrier(2 + B::kNumStages + stage); }
  KEYE_DEVICE uint32_t empty(uint32_t stage) const {
    return barrier(2 + 2 * B::kNumStages + stage);
  }
};

// A tile of kept rows, and the blocks of streamed rows of its segment that it goes through, for one
// head or for each of those that share a head of keys.
struct AttentionPass {
  AttentionTile tile;
  int head, num_rows;  // of what is kept
  int first_head;      // of what is streamed
  int first, num_blocks, num_steps;
};

struct AttentionStep {
  int head;      // of what is streamed
  int first;     // row of its segment
  int num_rows;  // of the segment from there on; may be more than a block has
};

template <class B>
KEYE_DEVICE AttentionStep attention_step(const AttentionPass& pass, int step) {
  AttentionStep found;
  found.head = pass.first_head + step / pass.num_blocks;
  found.first = pass.first + step % pass.num_blocks * B::BLOCK_N;
  found.num_rows = pass.tile.other_len - found.first;
  return found;
}

// Of a tile of queries: all keys that its last row sees.
template <class B>
KEYE_DEVICE AttentionPass attention_dq_pass(const VarlenAttentionParams& op, int64_t item) {
  AttentionPass pass;
  pass.tile = attention_part<B::BLOCK_M>(op.plan.q_tiles, item / op.num_heads);
  pass.head = static_cast<int>(item % op.num_heads);
  pass.first_head = pass.head / (op.num_heads / op.num_kv_heads);
  pass.num_rows = min(pass.tile.rows_left, B::BLOCK_M);
  pass.first = 0;
  const int seen = pass.num_rows <= 0
                       ? 0
                       : static_cast<int>(visible_keys_of(op.causal, pass.tile, pass.num_rows - 1));
  pass.num_steps = pass.num_blocks = (seen + B::BLOCK_N - 1) / B::BLOCK_N;
  return pass;
}

// Of a tile of keys: all queries that see one of them, of every head that shares the keys.
template <class B>
KEYE_DEVICE AttentionPass attention_dkdv_pass(const VarlenAttentionParams& op, int64_t item) {
  const int group = op.num_heads / op.num_kv_heads;
  AttentionPass pass;
  pass.tile = attention_part<B::BLOCK_M>(op.plan.k_tiles, item / op.num_kv_heads);
  pass.head = static_cast<int>(item % op.num_kv_heads);
  pass.first_head = pass.head * group;
  pass.num_rows = min(pass.tile.rows_left, B::BLOCK_M);
  const int num_queries = pass.num_rows <= 0 ? 0 : pass.tile.other_len;
  pass.first =
      min(static_cast<int>(first_row_seeing(op.causal, 0, num_queries, pass.tile.rows_left)),
          num_queries);
  pass.num_blocks = (num_queries - pass.first + B::BLOCK_N - 1) / B::BLOCK_N;
  pass.num_steps = pass.num_blocks * group;
  return pass;
}

// ---- the producer ----

// One thread brings tiles. pass_of(item) tells which.
template <class B, class F>
KEYE_DEVICE void attention_backward_produce(const AttentionBackwardSm90Params& params,
                                            const AttentionBackwardShared<B>& shared,
                                            int64_t num_items, const F& pass_of) {
  AttentionRing<B::kNumStages> ring;
  uint32_t kept_phase = 1;
  for (int64_t item = block_idx(); item < num_items; item += grid_size()) {
    const AttentionPass pass = pass_of(item);
    if (pass.num_steps == 0) continue;
    ptx::mbarrier_wait(shared.kept_empty(), kept_phase);
    kept_phase ^= 1;
    ptx::mbarrier_arrive_expect_tx(shared.kept_full(), 2 * B::kTileBytesQ);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      attention_sm90_load<B>(shared.kept(i), B::kUnitBytesQ, params.kept[i], pass.tile.row,
                             pass.head, shared.kept_full());
    }
    for (int step = 0; step < pass.num_steps; step++) {
      const AttentionStep now = attention_step<B>(pass, step);
      const uint32_t came = shared.came(ring.stage);
      ptx::mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
      ptx::mbarrier_arrive_expect_tx(came, 2 * B::kTileBytes);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        attention_sm90_load<B>(shared.streamed(ring.stage, i), B::kUnitBytes, params.streamed[i],
                               pass.tile.other_begin + now.first, now.head, came);
      }
      ring.advance();
    }
  }
}

// A warp of its own finishes stages: it clears rows behind the end of the segment, of the tiles
// that are summed over (kNumCleared of them), and brings lse and delta where queries are streamed.
template <class B, int kNumCleared, bool kWithStats, class F>
KEYE_DEVICE void attention_backward_finish(const AttentionBackwardSm90Params& params,
                                           const AttentionBackwardShared<B>& shared,
                                           int64_t num_items, const F& pass_of) {
  const VarlenAttentionParams& op = params.op;
  const int lane_idx = thread_idx() % kWarpSize;
  AttentionRing<B::kNumStages> ring;
  for (int64_t item = block_idx(); item < num_items; item += grid_size()) {
    const AttentionPass pass = pass_of(item);
    for (int step = 0; step < pass.num_steps; step++) {
      const AttentionStep now = attention_step<B>(pass, step);
      if constexpr (kWithStats) {
        ptx::mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
        const int64_t row = now.head * op.total_q + pass.tile.other_begin + now.first;
        for (int i = lane_idx; i < B::BLOCK_N; i += kWarpSize) {
          const int64_t at = row + min(i, now.num_rows - 1);
          unsigned char* const to = shared_memory() + shared.stats(ring.stage) + i * 8;
          const AttentionStats stats = attention_stats(op, at);
          store_bytes(to, stats);
        }
      }
      ptx::mbarrier_wait(shared.came(ring.stage), ring.phase);
      if (now.num_rows < B::BLOCK_N) {
#pragma unroll
        for (int i = 0; i < kNumCleared; i++) {
          attention_sm90_clear_rows<B>(shared.streamed(ring.stage, i), now.num_rows);
        }
        ptx::fence_proxy_async();
      }
      sync_warp();
      if (lane_idx == 0) ptx::mbarrier_arrive(shared.full(ring.stage));
      ring.advance();
    }
  }
}

// ---- the consumers ----

// Rows of sums, times a factor.
template <class B>
KEYE_DEVICE void attention_backward_store(const AttentionTensor& x, const AttentionPass& pass,
                                          int first_row, const float (&sums)[B::kHeadDim / 2],
                                          float factor) {
  using T = typename B::Type;
  const int lane_idx = thread_idx() % kWarpSize;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = first_row + lane_idx / 4 + r * 8;
    if (row >= pass.num_rows) continue;
    T* const to = static_cast<T*>(x.data) + (pass.tile.row + int64_t{row}) * x.stride_row +
                  pass.head * x.stride_head + lane_idx % 4 * 2;
#pragma unroll
    for (int i = 0; i < B::kHeadDim / 8; i++) {
      const int at = i * 4 + r * 2;
      store_bytes(to + i * 8, ptx::cvt_rn_x2<T>(sums[at] * factor, sums[at + 1] * factor));
    }
  }
}

// Where a warpgroup and its threads are in a tile.
struct AttentionConsumer {
  int idx;        // of the warpgroup
  int first_row;  // of the warp
};
KEYE_DEVICE AttentionConsumer attention_consumer() {
  const int idx = warp_in_block() / 4 - 1;
  return {idx, idx * 64 + thread_idx() % 128 / kWarpSize * 16};
}

template <class B, class F>
KEYE_DEVICE void attention_dq_consume(const AttentionBackwardSm90Params& params,
                                      const AttentionBackwardShared<B>& shared, int64_t num_items,
                                      const F& pass_of) {
  using T = typename B::Type;
  const VarlenAttentionParams& op = params.op;
  const float scale_log2 = static_cast<float>(op.softmax_scale * kAttentionLog2e);
  const int lane_idx = thread_idx() % kWarpSize;
  const AttentionConsumer consumer = attention_consumer();
  const uint32_t rows_offset = static_cast<uint32_t>(consumer.idx) * 64 * B::kSpan;
  AttentionRing<B::kNumStages> ring;
  uint32_t kept_phase = 0;
  for (int64_t item = block_idx(); item < num_items; item += grid_size()) {
    const AttentionPass pass = pass_of(item);
    const bool has_rows = consumer.idx * 64 < pass.num_rows;
    float dq[B::kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < B::kHeadDim / 2; i++) dq[i] = 0.0f;
    if (pass.num_steps > 0) {
      AttentionStats stats[2];
      int limits[2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int row = min(consumer.first_row + lane_idx / 4 + r * 8, pass.tile.rows_left - 1);
        stats[r] = attention_stats(op, pass.head * op.total_q + pass.tile.row + row);
        limits[r] = static_cast<int>(visible_keys_of(op.causal, pass.tile, row));
      }
      const int first_row = consumer.idx * 64;
      const int least = static_cast<int>(visible_keys_of(op.causal, pass.tile, first_row));
      ptx::mbarrier_wait(shared.kept_full(), kept_phase);
      uint32_t weights[B::kKeySteps][4];
      uint32_t stage_before = 0;
      for (int step = 0; step < pass.num_steps; step++) {
        ptx::mbarrier_wait(shared.full(ring.stage), ring.phase);
        if (!has_rows) {
          attention_leave(shared.empty(ring.stage));
          ring.advance();
          continue;
        }
        float s[B::BLOCK_N / 2], dp[B::BLOCK_N / 2];
        ptx::wgmma_fence();
        attention_sm90_scores<B>(s, shared.kept(0) + rows_offset, shared.streamed(ring.stage, 0));
        ptx::wgmma_commit_group();
        attention_sm90_scores<B>(dp, shared.kept(1) + rows_offset, shared.streamed(ring.stage, 1));
        ptx::wgmma_commit_group();
        // Scores are there, and what was added to dq in the step before.
        ptx::wgmma_wait_group<1>();
        ptx::wgmma_accumulators_ready(s);
        if (step > 0) attention_leave(shared.empty(stage_before));
        attention_weights(s, scale_log2, [&](int i) { return stats[i / 2 % 2].lse_log2; });
        ptx::wgmma_wait_group<0>();
        ptx::wgmma_accumulators_ready(dp);
        attention_score_gradients(dp, s, [&](int i) { return stats[i / 2 % 2].delta; });
        const int before = step * B::BLOCK_N;
        if (before + B::BLOCK_N > least) {
          const int first = before + lane_idx % 4 * 2;
          attention_hide(dp, [&](int i) { return first + i / 4 * 8 + i % 2 >= limits[i / 2 % 2]; });
        }
        attention_round<T>(weights, dp);
        ptx::wgmma_fence();
        attention_sm90_values<B>(dq, weights, shared.streamed(ring.stage, 0));
        ptx::wgmma_commit_group();
        stage_before = ring.stage;
        ring.advance();
      }
      if (has_rows) {
        ptx::wgmma_wait_group<0>();
        ptx::wgmma_accumulators_ready(dq);
        attention_leave(shared.empty(stage_before));
      }
      kept_phase ^= 1;
      attention_leave(shared.kept_empty());
    }
    attention_backward_store<B>(op.dq, pass, consumer.first_row, dq,
                                static_cast<float>(op.softmax_scale));
  }
}

template <class B, class F>
KEYE_DEVICE void attention_dkdv_consume(const AttentionBackwardSm90Params& params,
                                        const AttentionBackwardShared<B>& shared, int64_t num_items,
                                        const F& pass_of) {
  using T = typename B::Type;
  const VarlenAttentionParams& op = params.op;
  const float scale_log2 = static_cast<float>(op.softmax_scale * kAttentionLog2e);
  const int lane_idx = thread_idx() % kWarpSize;
  const AttentionConsumer consumer = attention_consumer();
  const uint32_t rows_offset = static_cast<uint32_t>(consumer.idx) * 64 * B::kSpan;
  AttentionRing<B::kNumStages> ring;
  uint32_t kept_phase = 0;
  for (int64_t item = block_idx(); item < num_items; item += grid_size()) {
    const AttentionPass pass = pass_of(item);
    const bool has_rows = consumer.idx * 64 < pass.num_rows;
    float dk[B::kHeadDim / 2], dv[B::kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < B::kHeadDim / 2; i++) dk[i] = dv[i] = 0.0f;
    if (pass.num_steps > 0) {
      ptx::mbarrier_wait(shared.kept_full(), kept_phase);
      uint32_t p[B::kKeySteps][4], ds[B::kKeySteps][4];
      uint32_t stage_before = 0;
      for (int step = 0; step < pass.num_steps; step++) {
        const AttentionStep now = attention_step<B>(pass, step);
        ptx::mbarrier_wait(shared.full(ring.stage), ring.phase);
        if (!has_rows) {
          attention_leave(shared.empty(ring.stage));
          ring.advance();
          continue;
        }
        const uint32_t q = shared.streamed(ring.stage, 0), dout = shared.streamed(ring.stage, 1);
        float s[B::BLOCK_N / 2], dp[B::BLOCK_N / 2];
        ptx::wgmma_fence();
        attention_sm90_scores<B>(s, shared.kept(0) + rows_offset, q);
        ptx::wgmma_commit_group();
        attention_sm90_scores<B>(dp, shared.kept(1) + rows_offset, dout);
        ptx::wgmma_commit_group();
        // Scores are there, and what was added to dk and dv in the step before.
        ptx::wgmma_wait_group<1>();
        ptx::wgmma_accumulators_ready(s);
        if (step > 0) attention_leave(shared.empty(stage_before));

        // A column is a query.
        const unsigned char* const stats =
            shared_memory() + shared.stats(ring.stage) + static_cast<uint32_t>(lane_idx % 4) * 16;
        const auto stats_of = [&](int i) {
          const auto at = static_cast<uint32_t>(i / 4 * 64 + i % 2 * 8);
          return load_bytes<AttentionStats>(stats + at);
        };
        attention_weights(s, scale_log2, [&](int i) { return stats_of(i).lse_log2; });
        // Key j of the tile is seen by queries from the one that has j keys of it before it.
        const int seen_by_first = op.causal
                                      ? now.first + 1 + pass.tile.rows_left - pass.tile.other_len
                                      : pass.tile.rows_left;
        if (now.num_rows < B::BLOCK_N || (op.causal && seen_by_first < consumer.idx * 64 + 64)) {
          attention_hide(s, [&](int i) {
            const int column = i / 4 * 8 + i % 2 + lane_idx % 4 * 2;
            const int row = consumer.first_row + lane_idx / 4 + i / 2 % 2 * 8;
            return column >= now.num_rows || (op.causal && row >= seen_by_first + column);
          });
        }
        attention_round<T>(p, s);
        ptx::wgmma_fence();
        attention_sm90_values<B>(dv, p, dout);
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<1>();
        ptx::wgmma_accumulators_ready(dp);
        attention_score_gradients(dp, s, [&](int i) { return stats_of(i).delta; });
        attention_hide(dp, [&](int i) { return s[i] == 0.0f; });
        attention_round<T>(ds, dp);
        ptx::wgmma_fence();
        attention_sm90_values<B>(dk, ds, q);
        ptx::wgmma_commit_group();
        stage_before = ring.stage;
        ring.advance();
      }
      if (has_rows) {
        ptx::wgmma_wait_group<0>();
        ptx::wgmma_accumulators_ready(dk);
        ptx::wgmma_accumulators_ready(dv);
        attention_leave(shared.empty(stage_before));
      }
      kept_phase ^= 1;
      attention_leave(shared.kept_empty());
    }
    attention_backward_store<B>(op.dk, pass, consumer.first_row, dk,
                                static_cast<float>(op.softmax_scale));
    attention_backward_store<B>(op.dv, pass, consumer.first_row, dv, 1.0f);
  }
}

// ---- the kernels ----

template <class B>
KEYE_DEVICE void attention_backward_init(const AttentionBackwardShared<B>& shared) {
  if (thread_idx() == 0) {
    constexpr uint32_t kConsumerWarps = B::kConsumerThreads / kWarpSize;
    ptx::mbarrier_init(shared.kept_full(), 1);
    ptx::mbarrier_init(shared.kept_empty(), kConsumerWarps);
    for (uint32_t stage = 0; stage < B::kNumStages; stage++) {
      ptx::mbarrier_init(shared.came(stage), 1);
      ptx::mbarrier_init(shared.full(stage), 1);
      ptx::mbarrier_init(shared.empty(stage), kConsumerWarps);
    }
    ptx::fence_mbarrier_init();
  }
  syncthreads();
}

// The warps of a block by their roles: those of the first warpgroup bring what the others use.
// kNumCleared of the streamed tensors are summed over; queries come with lse and delta.
template <class B, int kNumCleared, bool kWithStats, class PassOf, class Consume>
KEYE_DEVICE void attention_backward_run(const AttentionBackwardSm90Params& params, int num_tiles,
                                        int num_heads, const PassOf& pass_of,
                                        const Consume& consume) {
  const AttentionBackwardShared<B> shared{shared_address(shared_memory())};
  const int warp_idx = warp_in_block();
  attention_backward_init(shared);
  const int64_t num_items = int64_t{num_tiles} * (kAttentionTileRows / B::BLOCK_M) * num_heads;
  if (warp_idx < 4) {
    ptx::setmaxnreg_dec<B::kProducerRegisters>();
    if (warp_idx == 0) {
      if (ptx::elect_sync()) attention_backward_produce(params, shared, num_items, pass_of);
    } else if (warp_idx == 1) {
      attention_backward_finish<B, kNumCleared, kWithStats>(params, shared, num_items, pass_of);
    }
  } else {
    ptx::setmaxnreg_inc<B::kConsumerRegisters>();
    consume(shared, num_items);
  }
}

template <class T, int kHeadDim>
KEYE_KERNEL((AttentionDqSm90<T, kHeadDim>::kNumThreads), 1)
attention_dq_sm90_kernel(KEYE_PARAMS AttentionBackwardSm90Params params) {
  using B = AttentionDqSm90<T, kHeadDim>;
  const VarlenAttentionParams& op = params.op;
  const auto pass_of = [&](int64_t item) { return attention_dq_pass<B>(op, item); };
  // Keys are summed over; values are not.
  attention_backward_run<B, 1, false>(
      params, op.plan.num_tiles[0], op.num_heads, pass_of,
      [&](const AttentionBackwardShared<B>& shared, int64_t num_items) {
        attention_dq_consume(params, shared, num_items, pass_of);
      });
}

template <class T, int kHeadDim>
KEYE_KERNEL((AttentionDkdvSm90<T, kHeadDim>::kNumThreads), 1)
attention_dkdv_sm90_kernel(KEYE_PARAMS AttentionBackwardSm90Params params) {
  using B = AttentionDkdvSm90<T, kHeadDim>;
  const VarlenAttentionParams& op = params.op;
  const auto pass_of = [&](int64_t item) { return attention_dkdv_pass<B>(op, item); };
  attention_backward_run<B, 2, true>(
      params, op.plan.num_tiles[1], op.num_kv_heads, pass_of,
      [&](const AttentionBackwardShared<B>& shared, int64_t num_items) {
        attention_dkdv_consume(params, shared, num_items, pass_of);
      });
}

}  // namespace keye_ops
