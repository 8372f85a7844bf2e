// Sums of rows, a cluster of blocks for each: every block sums a slice, and sends its sum to the
// first block through distributed shared memory. The order of the sums depends on the shapes alone.
#pragma once

#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "common/thread.cuh"

namespace keye_ops::selftest {

struct ClusterSumParams {
  const float* x;  // [rows, cluster size, slice]
  float* out;      // [rows]
  int slice;       // a multiple of 4, from 4 to kMaxSlice
};

// The grid is [rows * cluster size].
struct ClusterSum {
  static constexpr int kNumThreads = 128;
  static constexpr int kNumWarps = kNumThreads / kWarpSize;
  static constexpr int kMaxClusterSize = 8;
  static constexpr int kMaxSlice = 4096;
};

struct ClusterSumShared {
  float slice[ClusterSum::kMaxSlice];
  float warp_sums[ClusterSum::kNumWarps];
  float block_sums[ClusterSum::kMaxClusterSize];  // in the first block
  alignas(8) uint64_t loaded;                     // barrier of the slice
  alignas(8) uint64_t gathered;                   // barrier of block_sums
};

// The same bits in every thread of the first warp.
KEYE_DEVICE float cluster_sum_of_slice(ClusterSumShared& shared, int slice) {
  using S = ClusterSum;
  const int warp_idx = warp_in_block();
  float sum = 0.0f;
  for (int i = thread_idx(); i < slice; i += S::kNumThreads) sum += shared.slice[i];
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (thread_idx() % kWarpSize == 0) shared.warp_sums[warp_idx] = sum;
  syncthreads();
  sum = 0.0f;
#pragma unroll
  for (int i = 0; i < S::kNumWarps; i++) sum += shared.warp_sums[i];
  return sum;
}

KEYE_KERNEL(ClusterSum::kNumThreads, 1) cluster_sum_kernel(KEYE_PARAMS ClusterSumParams params) {
  auto& shared = *reinterpret_cast<ClusterSumShared*>(shared_memory());
  const uint32_t loaded = shared_address(&shared.loaded);
  const uint32_t gathered = shared_address(&shared.gathered);
  const uint32_t rank = ptx::cluster_ctarank(), cluster_size = ptx::cluster_nctarank();

  // Make the barriers, and show them to the cluster: no block may write to one that has not begun.
  if (thread_idx() == 0) {
    ptx::mbarrier_init(loaded, 1);
    ptx::mbarrier_init(gathered, cluster_size);
    ptx::fence_mbarrier_init();
  }
  ptx::barrier_cluster_arrive_release();
  ptx::barrier_cluster_wait_acquire();

  if (thread_idx() == 0) {
    const uint32_t bytes = static_cast<uint32_t>(params.slice) * sizeof(float);
    ptx::mbarrier_arrive_expect_tx(loaded, bytes);
    ptx::cp_async_bulk_load(shared_address(shared.slice), params.x + block_idx() * params.slice,
                            bytes, loaded);
  }
  ptx::mbarrier_wait(loaded, 0);
  const float sum = cluster_sum_of_slice(shared, params.slice);
  if (thread_idx() != 0) return;

  // The arrival releases the store to whoever waits.
  const uint32_t my_sum = shared_address(&shared.block_sums[rank]);
  ptx::st_shared_cluster(ptx::mapa(my_sum, 0), sum);
  ptx::mbarrier_arrive_cluster(ptx::mapa(gathered, 0));
  if (rank != 0) return;

  // NOTE: the first block stays until all have written to it; nobody writes to the others.
  ptx::mbarrier_wait<ptx::Scope::kCluster>(gathered, 0);
  float total = 0.0f;
  for (uint32_t i = 0; i < cluster_size; i++) total += shared.block_sums[i];
  params.out[block_idx() / cluster_size] = total;
}

}  // namespace keye_ops::selftest
