// Clusters of blocks.
#pragma once

#include <cstdint>

#include "common/thread.cuh"

namespace keye_ops::ptx {

// The block's index in its cluster.
// #special-registers-cluster-ctarank
KEYE_DEVICE uint32_t cluster_ctarank() {
#if defined(__CUDACC__)
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return host_executor::this_thread().cluster_rank;
#endif
}

// The number of blocks in the cluster.
// #special-registers-cluster-nctarank
KEYE_DEVICE uint32_t cluster_nctarank() {
#if defined(__CUDACC__)
  uint32_t count;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
  return count;
#else
  const host_executor::Dim3& dim = host_executor::this_thread().cluster_dim;
  return dim.x * dim.y * dim.z;
#endif
}

// Every thread of the cluster arrives, and waits.
// #parallel-synchronization-and-communication-instructions-barrier-cluster
KEYE_DEVICE void barrier_cluster_arrive_release() {
  KEYE_CUDA_OR_HOST(asm volatile("barrier.cluster.arrive.release.aligned;" :: : "memory"),
                    host_executor::cluster_arrive());
}
KEYE_DEVICE void barrier_cluster_wait_acquire() {
  KEYE_CUDA_OR_HOST(asm volatile("barrier.cluster.wait.acquire.aligned;" :: : "memory"),
                    host_executor::cluster_wait());
}

}  // namespace keye_ops::ptx
