// varlen_attention on CUDA: the order of work, from offsets that only the device knows. One block
// reads them twice, so the cost is linear in the number of segments and tiles.
#pragma once

#include "common/error_word.cuh"
#include "common/memory.cuh"
#include "common/thread.cuh"
#include "varlen_attention/varlen_attention.h"

namespace keye_ops {

constexpr int kPlanThreads = 1024;
constexpr int kPlanClasses = 512;  // of costs: 16 for every power of two

struct AttentionPlanSide {
  const int32_t* cu_seqlens;  // [num_segments + 1]
  int64_t total;
  AttentionTile* tiles;
  int64_t max_tiles;
};

struct AttentionPlanParams {
  AttentionPlanSide q, k;
  int32_t* num_tiles;  // [2]
  ErrorWord* error_word;
  int64_t num_segments;
  bool causal;
  bool with_k_tiles;
};

struct PlanShared {
  uint32_t count[kPlanClasses];  // of tiles, then where the next tile of the class goes
  uint32_t bad;
};

// Rows begin to end of one side, and of the other.
struct PlanSegment {
  int64_t begin, len, other_begin, other_len;
};

// Segment i; those past the last are one of the rows that belong to none. If the offsets lie, that
// one has all rows.
KEYE_DEVICE PlanSegment plan_segment(const AttentionPlanParams& params,
                                     const AttentionPlanSide& side, const AttentionPlanSide& other,
                                     int64_t i, bool bad) {
  if (i > params.num_segments || (bad && i != params.num_segments)) return {0, 0, 0, 0};
  if (i == params.num_segments) {
    const int64_t end = bad ? 0 : side.cu_seqlens[i];
    return {end, side.total - end, 0, 0};
  }
  const int64_t begin = side.cu_seqlens[i], other_begin = other.cu_seqlens[i];
  return {begin, side.cu_seqlens[i + 1] - begin, other_begin,
          other.cu_seqlens[i + 1] - other_begin};
}

// The class of the most expensive tiles is 0.
KEYE_DEVICE int plan_class(const AttentionPlanParams& params, bool of_queries,
                           const AttentionTile& tile) {
  int64_t others = tile.other_len;
  if (params.causal && of_queries) {
    others = visible_keys_of(true, tile, min(tile.rows_left, kAttentionTileRows) - 1);
  } else if (params.causal) {
    // Keys that are `rows_left` from the end are seen by as many of the last queries.
    others = min(others, int64_t{tile.rows_left});
  }
  // Costs below 32 are classes of their own; from there on 16 for every power of two.
  constexpr int kCostKeys = 64;
  int cost = static_cast<int>((others + kCostKeys - 1) / kCostKeys), rank = 0;
  for (; cost >= 32; cost /= 2) rank += 16;
  return kPlanClasses - 1 - min(rank + cost, kPlanClasses - 1);
}

// The tiles of 32 segments, spread over the lanes of a warp: f(segment, tile in it, of a warp of
// which only some lanes have one).
template <class F>
KEYE_DEVICE void for_each_tile(const AttentionPlanParams& params, bool of_queries, bool bad,
                               const F& f) {
  const AttentionPlanSide& side = of_queries ? params.q : params.k;
  const AttentionPlanSide& other = of_queries ? params.k : params.q;
  const int lane_idx = thread_idx() % kWarpSize, num_warps = block_size() / kWarpSize;
  for (int64_t first = int64_t{warp_in_block()} * kWarpSize; first <= params.num_segments;
       first += int64_t{num_warps} * kWarpSize) {
    const PlanSegment mine = plan_segment(params, side, other, first + lane_idx, bad);
    const int count = static_cast<int>((mine.len + kAttentionTileRows - 1) / kAttentionTileRows);
    int end = count;  // tiles of the segments up to this lane's
#pragma unroll
    for (int delta = 1; delta < kWarpSize; delta *= 2) {
      const int below = shuffle_up(end, delta);
      if (lane_idx >= delta) end += below;
    }
    const int total = shuffle(end, kWarpSize - 1);
    for (int i = 0; i < total; i += kWarpSize) {
      // The owner of tile i + lane_idx is the first lane whose tiles end behind it.
      const int wanted = i + lane_idx;
      int owner = 0;
#pragma unroll
      for (int step = kWarpSize / 2; step > 0; step /= 2) {
        const int their_end = shuffle(end, owner + step - 1);
        if (their_end <= wanted) owner += step;
      }
      const int before = shuffle(end - count, owner);
      const int begin = shuffle(static_cast<int>(mine.begin), owner);
      const int len = shuffle(static_cast<int>(mine.len), owner);
      const int other_begin = shuffle(static_cast<int>(mine.other_begin), owner);
      const int other_len = shuffle(static_cast<int>(mine.other_len), owner);
      const int row = (wanted - before) * kAttentionTileRows;
      f(AttentionTile{begin + row, len - row, other_begin, other_len}, wanted < total);
    }
  }
}

// Adds the lanes of each class to its counter; the old value for each lane.
KEYE_DEVICE uint32_t add_to_class(uint32_t* count, int cost_class, bool active) {
  const int lane_idx = thread_idx() % kWarpSize;
  const uint32_t lanes = warp_ballot(active);
  if (lanes == 0) return 0;
  // Most often all lanes are of one class.
  const int lowest = reduce_min(active ? cost_class : kPlanClasses);
  const int highest = reduce_max(active ? cost_class : -1);
  if (lowest == highest) {
    uint32_t first = 0;
    const uint32_t before = lanes & ((1u << lane_idx) - 1u);
    if (lane_idx == 0) first = atomic_add(&count[lowest], static_cast<uint32_t>(popcount(lanes)));
    return shuffle(first, 0) + static_cast<uint32_t>(popcount(before));
  }
  return active ? atomic_add(&count[cost_class], uint32_t{1}) : 0;
}

// One side's tiles, counted by class and then put in the order of the classes.
KEYE_DEVICE void plan_side(const AttentionPlanParams& params, PlanShared& shared, bool of_queries,
                           bool bad) {
  const AttentionPlanSide& side = of_queries ? params.q : params.k;
  for (int i = thread_idx(); i < kPlanClasses; i += block_size()) shared.count[i] = 0;
  syncthreads();
  for_each_tile(params, of_queries, bad, [&](const AttentionTile& tile, bool active) {
    add_to_class(shared.count, plan_class(params, of_queries, tile), active);
  });
  syncthreads();
  if (warp_in_block() == 0) {
    // Where each class begins; a lane has some of them, one after another.
    constexpr int kOfLane = kPlanClasses / kWarpSize;
    const int first = thread_idx() * kOfLane;
    uint32_t* const mine = shared.count + first;
    uint32_t own = 0;
    for (int i = 0; i < kOfLane; i++) own += mine[i];
    uint32_t end = own;
#pragma unroll
    for (int delta = 1; delta < kWarpSize; delta *= 2) {
      const uint32_t below = shuffle_up(end, delta);
      if (thread_idx() >= delta) end += below;
    }
    uint32_t begin = end - own;
    for (int i = 0; i < kOfLane; i++) {
      const uint32_t count = mine[i];
      mine[i] = begin;
      begin += count;
    }
    if (thread_idx() == kWarpSize - 1) {
      params.num_tiles[of_queries ? 0 : 1] = static_cast<int32_t>(end);
    }
  }
  syncthreads();
  for_each_tile(params, of_queries, bad, [&](const AttentionTile& tile, bool active) {
    const uint32_t place = add_to_class(shared.count, plan_class(params, of_queries, tile), active);
    if (active && place < side.max_tiles) store_bytes(&side.tiles[place], tile);
  });
  syncthreads();
}

// Whether the offsets of a side are a lie, of those that this thread looks at.
KEYE_DEVICE bool plan_is_bad(const AttentionPlanParams& params, const AttentionPlanSide& side,
                             DeviceError error) {
  bool bad = false;
  for (int64_t i = thread_idx(); i <= params.num_segments; i += block_size()) {
    const int64_t value = side.cu_seqlens[i];
    const int64_t before = i == 0 ? 0 : side.cu_seqlens[i - 1];
    if ((i == 0 && value != 0) || value < before || value > side.total) {
      report_error(params.error_word, error, static_cast<double>(value));
      bad = true;
    }
  }
  return bad;
}

KEYE_KERNEL(kPlanThreads, 1) attention_plan_kernel(KEYE_PARAMS AttentionPlanParams params) {
  PlanShared& shared = *reinterpret_cast<PlanShared*>(shared_memory());
  if (thread_idx() == 0) shared.bad = 0;
  syncthreads();
  const bool bad_q = plan_is_bad(params, params.q, DeviceError::kAttentionOffsetsQ);
  const bool bad_k = plan_is_bad(params, params.k, DeviceError::kAttentionOffsetsK);
  if (bad_q || bad_k) atomic_or(&shared.bad, uint32_t{1});
  syncthreads();
  const bool bad = shared.bad != 0;
  plan_side(params, shared, true, bad);
  if (params.with_k_tiles) plan_side(params, shared, false, bad);
}

}  // namespace keye_ops
