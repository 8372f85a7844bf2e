// varlen_attention on sm_90a, forward. A persistent block walks over tiles of queries: one warp
// keeps rings of K and V tiles full by TMA, two warpgroups of 64 rows each take turns at the tensor
// cores. While the product of one block of keys with V runs, and that of the next with Q, the
// scores between them go through the softmax in registers.
//
// head_dim 72 is a contraction of 80 (TMA fills the spare columns with zeros) and an output of 72.
#pragma once

#include "varlen_attention/varlen_attention_part.cuh"
#include "varlen_attention/varlen_attention_softmax.cuh"
#include "varlen_attention/varlen_attention_tile_sm90.cuh"

namespace keye_ops {

struct AttentionSm90Params {
  TensorMap q, k, v;  // [heads, rows, head_dim]; boxes are a unit of a tile
  VarlenAttentionParams op;
  AttentionScale scale;
};

template <class T, int kHeadDim, int kConsumers>
struct AttentionSm90 : AttentionSm90Tiles<T, kHeadDim, kConsumers, (kHeadDim > 72 ? 128 : 64)> {
  using Tiles = AttentionSm90Tiles<T, kHeadDim, kConsumers, (kHeadDim > 72 ? 128 : 64)>;
  using Tiles::kTileBytes, Tiles::kTileBytesQ, Tiles::kMaxSharedBytes;

  // Shared memory: rings of Q, K and V, barriers.
  static constexpr int kNumStagesQ = kHeadDim > 72 ? 1 : 2;
  static constexpr uint32_t kFit =
      (kMaxSharedBytes - 1024 - kNumStagesQ * kTileBytesQ) / (2 * kTileBytes);
  static constexpr int kNumStages = kFit < 4 ? static_cast<int>(kFit) : 4;
  static constexpr uint32_t kKeys = kNumStagesQ * kTileBytesQ;
  static constexpr uint32_t kValues = kKeys + kNumStages * kTileBytes;
  static constexpr uint32_t kBarriers = kValues + kNumStages * kTileBytes;
  static constexpr uint32_t kQFull = 0, kQEmpty = kNumStagesQ, kKFull = 2 * kNumStagesQ;
  static constexpr uint32_t kKEmpty = kKFull + kNumStages, kVFull = kKEmpty + kNumStages;
  static constexpr uint32_t kVEmpty = kVFull + kNumStages, kVCame = kVEmpty + kNumStages;
  static constexpr uint32_t kNumBarriers = kVCame + kNumStages;
  static constexpr uint32_t kSharedBytes = kBarriers + kNumBarriers * sizeof(uint64_t);

  static_assert(kNumStages >= 2, "a stage is refilled while another is read");
};

// ---- where things are ----

template <class A>
struct AttentionSm90Shared {
  uint32_t base;

  KEYE_DEVICE uint32_t q(uint32_t stage) const { return base + stage * A::kTileBytesQ; }
  KEYE_DEVICE uint32_t k(uint32_t stage) const { return base + A::kKeys + stage * A::kTileBytes; }
  KEYE_DEVICE uint32_t v(uint32_t stage) const { return base + A::kValues + stage * A::kTileBytes; }
  KEYE_DEVICE uint32_t barrier(uint32_t idx) const { return base + A::kBarriers + idx * 8; }
  KEYE_DEVICE uint32_t q_full(uint32_t stage) const { return barrier(A::kQFull + stage); }
  KEYE_DEVICE uint32_t q_empty(uint32_t stage) const { return barrier(A::kQEmpty + stage); }
  KEYE_DEVICE uint32_t k_full(uint32_t stage) const { return barrier(A::kKFull + stage); }
  KEYE_DEVICE uint32_t k_empty(uint32_t stage) const { return barrier(A::kKEmpty + stage); }
  KEYE_DEVICE uint32_t v_full(uint32_t stage) const { return barrier(A::kVFull + stage); }
  KEYE_DEVICE uint32_t v_empty(uint32_t stage) const { return barrier(A::kVEmpty + stage); }
  // A last tile has come, whose rows behind the segment's end are still those of another.
  KEYE_DEVICE uint32_t v_came(uint32_t stage) const { return barrier(A::kVCame + stage); }
};

// A tile of queries of one head, and how many blocks of keys its last row sees.
struct AttentionWork {
  AttentionTile tile;
  int head, num_rows, num_blocks;
  int last_keys;  // of the segment that are left for the last of the blocks; may be more than that
};

template <class A>
KEYE_DEVICE AttentionWork attention_work(const VarlenAttentionParams& op, int64_t item) {
  AttentionWork work;
  work.tile = attention_part<A::BLOCK_M>(op.plan.q_tiles, item / op.num_heads);
  work.head = static_cast<int>(item % op.num_heads);
  work.num_rows = min(work.tile.rows_left, A::BLOCK_M);
  const int seen = work.num_rows <= 0
                       ? 0
                       : static_cast<int>(visible_keys_of(op.causal, work.tile, work.num_rows - 1));
  work.num_blocks = (seen + A::BLOCK_N - 1) / A::BLOCK_N;
  work.last_keys = work.tile.other_len - (work.num_blocks - 1) * A::BLOCK_N;
  return work;
}

// ---- the producer: one thread waits for stages to become empty, and refills them ----

template <class A>
KEYE_DEVICE void attention_sm90_produce(const AttentionSm90Params& params,
                                        const AttentionSm90Shared<A>& shared, int64_t num_items) {
  const VarlenAttentionParams& op = params.op;
  const int group = op.num_heads / op.num_kv_heads;
  AttentionRing<A::kNumStages> ring;
  AttentionRing<A::kNumStagesQ> ring_q;
  for (int64_t item = block_idx(); item < num_items; item += grid_size()) {
    const AttentionWork work = attention_work<A>(op, item);
    if (work.num_blocks == 0) continue;
    const uint32_t q_full = shared.q_full(ring_q.stage);
    ptx::mbarrier_wait(shared.q_empty(ring_q.stage), ring_q.phase ^ 1);
    ptx::mbarrier_arrive_expect_tx(q_full, A::kTileBytesQ);
    attention_sm90_load<A>(shared.q(ring_q.stage), A::kUnitBytesQ, params.q, work.tile.row,
                           work.head, q_full);
    ring_q.advance();
    const int kv_head = work.head / group;
    for (int block = work.num_blocks - 1; block >= 0; block--) {
      const int row = work.tile.other_begin + block * A::BLOCK_N;
      const uint32_t k_full = shared.k_full(ring.stage);
      ptx::mbarrier_wait(shared.k_empty(ring.stage), ring.phase ^ 1);
      ptx::mbarrier_arrive_expect_tx(k_full, A::kTileBytes);
      attention_sm90_load<A>(shared.k(ring.stage), A::kUnitBytes, params.k, row, kv_head, k_full);
      const bool has_end = block == work.num_blocks - 1 && work.last_keys < A::BLOCK_N;
      const uint32_t v_full = has_end ? shared.v_came(ring.stage) : shared.v_full(ring.stage);
      ptx::mbarrier_wait(shared.v_empty(ring.stage), ring.phase ^ 1);
      ptx::mbarrier_arrive_expect_tx(v_full, A::kTileBytes);
      attention_sm90_load<A>(shared.v(ring.stage), A::kUnitBytes, params.v, row, kv_head, v_full);
      ring.advance();
    }
  }
}

// A warp of its own clears the rows of V behind the end of the segment: they are another's, and
// zero times its infinities would not be zero.
template <class A>
KEYE_DEVICE void attention_sm90_clear_ends(const AttentionSm90Params& params,
                                           const AttentionSm90Shared<A>& shared,
                                           int64_t num_items) {
  const int lane_idx = thread_idx() % kWarpSize;
  uint32_t stage = 0, phases = 0;  // a bit for each stage
  for (int64_t item = block_idx(); item < num_items; item += grid_size()) {
    const AttentionWork work = attention_work<A>(params.op, item);
    if (work.num_blocks == 0) continue;
    if (work.last_keys < A::BLOCK_N) {
      ptx::mbarrier_wait(shared.v_came(stage), phases >> stage & 1);
      phases ^= 1u << stage;
      attention_sm90_clear_rows<A>(shared.v(stage), work.last_keys);
      ptx::fence_proxy_async();
      sync_warp();
      if (lane_idx == 0) ptx::mbarrier_arrive(shared.v_full(stage));
    }
    stage = (stage + static_cast<uint32_t>(work.num_blocks)) % A::kNumStages;
  }
}

// ---- the consumers ----

// Rows of out, divided by their sums, and of lse.
template <class T, int kHeadDim>
KEYE_DEVICE void attention_sm90_store(const VarlenAttentionParams& op, const AttentionWork& work,
                                      int first_row, AttentionRowState& rows,
                                      const float (&out)[kHeadDim / 2]) {
  const int lane_idx = thread_idx() % kWarpSize;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const AttentionRowEnd end = attention_row_end(rows, r);
    const int row = first_row + lane_idx / 4 + r * 8;
    if (row >= work.num_rows) continue;
    T* const to = static_cast<T*>(op.out.data) +
                  (work.tile.row + int64_t{row}) * op.out.stride_row +
                  work.head * op.out.stride_head + lane_idx % 4 * 2;
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; i++) {
      const int at = i * 4 + r * 2;
      store_bytes(to + i * 8, ptx::cvt_rn_x2<T>(out[at] * end.inverse, out[at + 1] * end.inverse));
    }
    if (op.softmax_lse != nullptr && lane_idx % 4 == 0) {
      static_cast<float*>(op.softmax_lse)[work.head * op.total_q + work.tile.row + row] = end.lse;
    }
  }
}

// Warpgroups take turns at the tensor cores: each gives the turn to the next one.
template <class A>
KEYE_DEVICE void attention_take_turn(int consumer_idx) {
  ptx::bar_sync(1 + consumer_idx, 2 * 128);
}
template <class A>
KEYE_DEVICE void attention_give_turn(int consumer_idx) {
  ptx::bar_arrive(1 + (consumer_idx + 1) % A::kConsumers, 2 * 128);
}

template <class A>
KEYE_DEVICE void attention_sm90_consume(const AttentionSm90Params& params,
                                        const AttentionSm90Shared<A>& shared, int consumer_idx,
                                        int64_t num_items) {
  constexpr int kHeadDim = A::kHeadDim;
  using T = typename A::Type;
  const VarlenAttentionParams& op = params.op;
  const int lane_idx = thread_idx() % kWarpSize;
  const int first_row = consumer_idx * 64 + thread_idx() % 128 / kWarpSize * 16;
  AttentionRing<A::kNumStagesQ> ring_q;
  AttentionRing<A::kNumStages> ring, ring_v;

  if (consumer_idx == A::kConsumers - 1) attention_give_turn<A>(consumer_idx);
  for (int64_t item = block_idx(); item < num_items; item += grid_size()) {
    const AttentionWork work = attention_work<A>(op, item);
    AttentionRowState rows{{-INFINITY, -INFINITY}, {0.0f, 0.0f}, {0.0f, 0.0f}};
    float out[kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; i++) out[i] = 0.0f;

    if (work.num_blocks > 0 && consumer_idx * 64 >= work.num_rows) {
      // A tile without rows for this warpgroup: it only lets the others go on.
      ptx::mbarrier_wait(shared.q_full(ring_q.stage), ring_q.phase);
      for (int block = 0; block < work.num_blocks; block++) {
        ptx::mbarrier_wait(shared.k_full(ring.stage), ring.phase);
        attention_leave(shared.k_empty(ring.stage));
        ring.advance();
        if (block > 0) {
          attention_take_turn<A>(consumer_idx);
          attention_give_turn<A>(consumer_idx);
        }
        ptx::mbarrier_wait(shared.v_full(ring_v.stage), ring_v.phase);
        attention_leave(shared.v_empty(ring_v.stage));
        ring_v.advance();
      }
      attention_leave(shared.q_empty(ring_q.stage));
      ring_q.advance();
      continue;
    }
    if (work.num_blocks > 0) {
      float scores[A::BLOCK_N / 2], factors[2];
      uint32_t weights[A::kKeySteps][4];
      // Keys that each row sees; the first row of the warpgroup sees the fewest.
      int limits[2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        limits[r] = static_cast<int>(
            visible_keys_of(op.causal, work.tile, first_row + lane_idx / 4 + r * 8));
      }
      const int first_seen = consumer_idx * 64;
      const int least = static_cast<int>(visible_keys_of(op.causal, work.tile, first_seen));
      const auto finish_scores = [&](int block) {
        attention_sign(scores, params.scale.sign);
        const int before = block * A::BLOCK_N;
        if (before + A::BLOCK_N > least) {
          attention_mask(scores, {limits[0] - before, limits[1] - before});
        }
        attention_softmax(scores, rows, params.scale.scale_log2, factors);
      };

      // The last block of keys comes first: it is the one that has hidden keys.
      int block = work.num_blocks - 1;
      const uint32_t q =
          shared.q(ring_q.stage) + static_cast<uint32_t>(consumer_idx) * 64 * A::kSpan;
      ptx::mbarrier_wait(shared.q_full(ring_q.stage), ring_q.phase);
      ptx::mbarrier_wait(shared.k_full(ring.stage), ring.phase);
      ptx::wgmma_fence();
      attention_sm90_scores<A>(scores, q, shared.k(ring.stage));
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_accumulators_ready(scores);
      attention_leave(shared.k_empty(ring.stage));
      ring.advance();
      finish_scores(block);
      attention_round<T>(weights, scores);

      // The scores of a block and the values of the one before it are computed together.
      for (block--; block >= 0; block--) {
        ptx::mbarrier_wait(shared.k_full(ring.stage), ring.phase);
        attention_take_turn<A>(consumer_idx);
        ptx::wgmma_fence();
        attention_sm90_scores<A>(scores, q, shared.k(ring.stage));
        ptx::wgmma_commit_group();
        ptx::mbarrier_wait(shared.v_full(ring_v.stage), ring_v.phase);
        attention_sm90_values<A>(out, weights, shared.v(ring_v.stage));
        ptx::wgmma_commit_group();
        attention_give_turn<A>(consumer_idx);
        ptx::wgmma_wait_group<1>();
        ptx::wgmma_accumulators_ready(scores);
        attention_leave(shared.k_empty(ring.stage));
        ring.advance();
        finish_scores(block);
        ptx::wgmma_wait_group<0>();
        ptx::wgmma_accumulators_ready(out);
        attention_leave(shared.v_empty(ring_v.stage));
        ring_v.advance();
        attention_rescale(out, factors);
        attention_round<T>(weights, scores);
      }
      attention_leave(shared.q_empty(ring_q.stage));
      ring_q.advance();

      ptx::mbarrier_wait(shared.v_full(ring_v.stage), ring_v.phase);
      ptx::wgmma_fence();
      attention_sm90_values<A>(out, weights, shared.v(ring_v.stage));
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_accumulators_ready(out);
      attention_leave(shared.v_empty(ring_v.stage));
      ring_v.advance();
    }
    attention_sm90_store<T, kHeadDim>(op, work, first_row, rows, out);
  }
  if (consumer_idx == 0) attention_take_turn<A>(consumer_idx);
}

template <class T, int kHeadDim, int kConsumers>
KEYE_KERNEL((AttentionSm90<T, kHeadDim, kConsumers>::kNumThreads), 1)
attention_sm90_kernel(KEYE_PARAMS AttentionSm90Params params) {
  using A = AttentionSm90<T, kHeadDim, kConsumers>;
  const AttentionSm90Shared<A> shared{shared_address(shared_memory())};
  const int warp_idx = warp_in_block();

  // Make the barriers, and show them to all threads and to TMA.
  if (thread_idx() == 0) {
    constexpr uint32_t kConsumerWarps = A::kConsumerThreads / kWarpSize;
    for (uint32_t stage = 0; stage < A::kNumStagesQ; stage++) {
      ptx::mbarrier_init(shared.q_full(stage), 1);
      ptx::mbarrier_init(shared.q_empty(stage), kConsumerWarps);
    }
    for (uint32_t stage = 0; stage < A::kNumStages; stage++) {
      ptx::mbarrier_init(shared.k_full(stage), 1);
      ptx::mbarrier_init(shared.k_empty(stage), kConsumerWarps);
      ptx::mbarrier_init(shared.v_full(stage), 1);
      ptx::mbarrier_init(shared.v_empty(stage), kConsumerWarps);
      ptx::mbarrier_init(shared.v_came(stage), 1);
    }
    ptx::fence_mbarrier_init();
  }
  syncthreads();

  const int64_t num_items = int64_t{params.op.plan.num_tiles[0]} *
                            (kAttentionTileRows / A::BLOCK_M) * params.op.num_heads;
  if (warp_idx < 4) {
    ptx::setmaxnreg_dec<A::kProducerRegisters>();
    if (warp_idx == 0) {
      if (ptx::elect_sync()) attention_sm90_produce(params, shared, num_items);
    } else if (warp_idx == 1) {
      attention_sm90_clear_ends(params, shared, num_items);
    }
  } else {
    ptx::setmaxnreg_inc<A::kConsumerRegisters>();
    attention_sm90_consume(params, shared, warp_idx / 4 - 1, num_items);
  }
}

}  // namespace keye_ops
