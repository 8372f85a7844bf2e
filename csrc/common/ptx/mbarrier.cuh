// Barriers in shared memory, 8 bytes each, that count threads and bytes; and the fences of the
// asynchronous proxy.
#pragma once

#include <cstdint>

#include "common/thread.cuh"

namespace keye_ops::ptx {

// A phase takes count arrivals, and the bytes that were announced.
// #parallel-synchronization-and-communication-instructions-mbarrier-init
KEYE_DEVICE void mbarrier_init(uint32_t mbarrier, uint32_t count) {
  KEYE_CUDA_OR_HOST(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbarrier),
                                 "r"(count) : "memory"),
                    host_executor::mbarrier_init(mbarrier, count));
}

// #parallel-synchronization-and-communication-instructions-mbarrier-inval
KEYE_DEVICE void mbarrier_inval(uint32_t mbarrier) {
  KEYE_CUDA_OR_HOST(asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(mbarrier) : "memory"),
                    host_executor::mbarrier_invalidate(mbarrier));
}

// #parallel-synchronization-and-communication-instructions-mbarrier-expect-tx
KEYE_DEVICE void mbarrier_expect_tx(uint32_t mbarrier, uint32_t bytes) {
  KEYE_CUDA_OR_HOST(
      asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(mbarrier),
                   "r"(bytes) : "memory"),
      host_executor::mbarrier_expect_tx(mbarrier, bytes));
}

// #parallel-synchronization-and-communication-instructions-mbarrier-arrive
KEYE_DEVICE void mbarrier_arrive(uint32_t mbarrier) {
  KEYE_CUDA_OR_HOST(
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(mbarrier) : "memory"),
      host_executor::mbarrier_arrive(mbarrier, 1));
}
KEYE_DEVICE void mbarrier_arrive_expect_tx(uint32_t mbarrier, uint32_t bytes) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier), "r"(bytes)
               : "memory");
#else
  host_executor::mbarrier_expect_tx(mbarrier, bytes);
  host_executor::mbarrier_arrive(mbarrier, 1);
#endif
}
// On the barrier of any block of the cluster, by an address from mapa.
KEYE_DEVICE void mbarrier_arrive_cluster(uint32_t mbarrier) {
  KEYE_CUDA_OR_HOST(
      asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
          mbarrier) : "memory"),
      host_executor::mbarrier_arrive(mbarrier, 1));
}

// Whose writes a wait makes visible: only those of this block (and of TMA), or of the cluster.
enum class Scope { kBlock, kCluster };

#if defined(__CUDACC__)
#define KEYE_MBARRIER_WAIT(instruction)                                  \
  asm volatile("{\n.reg .pred p;\nmbarrier." instruction                 \
               ".shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}" \
               : "=r"(complete)                                          \
               : "r"(mbarrier), "r"(parity)                              \
               : "memory")
#endif

// Whether the phase of this parity has completed; may wait for a while.
// #parallel-synchronization-and-communication-instructions-mbarrier-test-wait-try-wait
template <Scope kScope = Scope::kBlock>
KEYE_DEVICE bool mbarrier_try_wait_parity(uint32_t mbarrier, uint32_t parity) {
#if defined(__CUDACC__)
  uint32_t complete;
  if constexpr (kScope == Scope::kBlock) {
    KEYE_MBARRIER_WAIT("try_wait.parity");
  } else {
    KEYE_MBARRIER_WAIT("try_wait.parity.acquire.cluster");
  }
  return complete != 0;
#else
  return host_executor::mbarrier_try_wait(mbarrier, parity);
#endif
}
template <Scope kScope = Scope::kBlock>
KEYE_DEVICE bool mbarrier_test_wait_parity(uint32_t mbarrier, uint32_t parity) {
#if defined(__CUDACC__)
  uint32_t complete;
  if constexpr (kScope == Scope::kBlock) {
    KEYE_MBARRIER_WAIT("test_wait.parity");
  } else {
    KEYE_MBARRIER_WAIT("test_wait.parity.acquire.cluster");
  }
  return complete != 0;
#else
  return host_executor::mbarrier_test_wait(mbarrier, parity);
#endif
}

// Waits until the phase of this parity has completed. The phase before the first counts as one of
// parity 1 that has.
template <Scope kScope = Scope::kBlock>
KEYE_DEVICE void mbarrier_wait(uint32_t mbarrier, uint32_t parity) {
  while (!mbarrier_try_wait_parity<kScope>(mbarrier, parity)) {
  }
}

// Makes barriers visible to the cluster and to TMA; a barrier of the block or the cluster follows.
// #parallel-synchronization-and-communication-instructions-membar
KEYE_DEVICE void fence_mbarrier_init() {
  KEYE_CUDA_OR_HOST(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"),
                    host_executor::fence_mbarrier_init());
}

// Between this thread's plain accesses of shared memory and those of TMA and wgmma.
// #parallel-synchronization-and-communication-instructions-membar
KEYE_DEVICE void fence_proxy_async() {
  KEYE_CUDA_OR_HOST(asm volatile("fence.proxy.async.shared::cta;" :: : "memory"),
                    host_executor::fence_proxy_async());
}

}  // namespace keye_ops::ptx
