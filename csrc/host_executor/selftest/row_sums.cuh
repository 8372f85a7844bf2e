// Sums of rows that may lie more than 2**31 elements apart, one block for each, and their total,
// added by the block that comes last, in the order of the rows.
#pragma once

#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "common/thread.cuh"

namespace keye_ops::selftest {

struct RowSumsParams {
  const float* x;     // [rows, columns]
  float* sums;        // [rows]
  float* total;       // [1]
  uint32_t* arrived;  // [1], 0 before the launch and after it
  int64_t x_stride;   // elements; a multiple of 4
  int columns;        // a multiple of 4
};

// The grid is [rows].
struct RowSums {
  static constexpr int kNumThreads = 64;
  static constexpr int kNumWarps = kNumThreads / kWarpSize;
};

struct RowSumsShared {
  float warp_sums[RowSums::kNumWarps];
  uint32_t is_last;
};

struct alignas(16) RowSumsChunk {
  float values[4];
};

KEYE_KERNEL(RowSums::kNumThreads, 1) row_sums_kernel(KEYE_PARAMS RowSumsParams params) {
  using S = RowSums;
  auto& shared = *reinterpret_cast<RowSumsShared*>(shared_memory());
  const int warp_idx = warp_in_block(), lane_idx = thread_idx() % kWarpSize;
  const float* row = params.x + block_idx() * params.x_stride;

  float sum = 0.0f;
  for (int i = thread_idx() * 4; i < params.columns; i += S::kNumThreads * 4) {
    const auto chunk = load_bytes<RowSumsChunk>(row + i);
    for (const float value : chunk.values) sum += value;
  }
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (lane_idx == 0) shared.warp_sums[warp_idx] = sum;
  syncthreads();

  // Publish the row's sum, then count the block in.
  if (thread_idx() == 0) {
    sum = 0.0f;
    for (const float warp_sum : shared.warp_sums) sum += warp_sum;
    params.sums[block_idx()] = sum;
    thread_fence();
    const auto num_blocks = static_cast<uint32_t>(grid_size());
    shared.is_last = atomic_add(params.arrived, 1u) == num_blocks - 1;
    thread_fence();
  }
  syncthreads();
  if (shared.is_last == 0) return;

  // The last block sees all sums.
  if (thread_idx() == 0) {
    float total = 0.0f;
    for (int64_t i = 0; i < grid_size(); i++) total += params.sums[i];
    *params.total = total;
    atomic_exchange(params.arrived, 0u);
  }
}

}  // namespace keye_ops::selftest
