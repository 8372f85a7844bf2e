// c = a b^T by wgmma: a producer warp keeps a ring of TMA stages full, a warpgroup empties it and
// stores its tile by TMA.
#pragma once

#include "common/dtype.h"
#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "common/swizzle.h"
#include "common/thread.cuh"

namespace keye_ops::selftest {

// Boxes are [BLOCK_M, BLOCK_K], [BLOCK_N, BLOCK_K] and [BLOCK_M, BLOCK_N], swizzled by 128 bytes.
struct GemmWgmmaParams {
  TensorMap a;  // bf16 [M, K]
  TensorMap b;  // bf16 [N, K]
  TensorMap c;  // bf16 [M, N]
  int k;        // at least 1
};

// A block computes a tile of [BLOCK_M, BLOCK_N]; the grid is [ceil(M / BLOCK_M), ceil(N /
// BLOCK_N)].
struct GemmWgmma {
  static constexpr int BLOCK_M = 64, BLOCK_N = 64, BLOCK_K = 64;
  static constexpr int kNumConsumers = 128;
  static constexpr int kNumThreads = kNumConsumers + kWarpSize;
  static constexpr int kNumStages = 4;
  static constexpr Swizzle kSwizzle = Swizzle::k128;

  static constexpr uint32_t kRowBytes = 128;
  static constexpr uint32_t kTileBytesA = BLOCK_M * kRowBytes;
  static constexpr uint32_t kTileBytesB = BLOCK_N * kRowBytes;
  static constexpr uint32_t kTileBytesC = BLOCK_M * kRowBytes;
  static constexpr uint32_t kStageBytes = kTileBytesA + kTileBytesB;
  static constexpr uint32_t kBarriers = kNumStages * kStageBytes + kTileBytesC;
  static constexpr uint32_t kSharedBytes = kBarriers + 2 * kNumStages * sizeof(uint64_t);

  static_assert(BLOCK_K * sizeof(BFloat16) == kRowBytes && BLOCK_N * sizeof(BFloat16) == kRowBytes,
                "a row is a span of the swizzle");
  static_assert(kTileBytesA % 1024 == 0 && kTileBytesB % 1024 == 0,
                "tiles are aligned to the swizzle's pattern");
};

// Where a stage lies, and its barriers: full when its bytes have come, empty when all consumers
// have left it. The phase tells one pass over the ring from the next.
struct GemmWgmmaStage {
  uint32_t tile_a, tile_b, full, empty, phase;
};
KEYE_DEVICE GemmWgmmaStage gemm_wgmma_stage(uint32_t shared, int k_block) {
  using G = GemmWgmma;
  const auto pass = static_cast<uint32_t>(k_block / G::kNumStages);
  const auto idx = static_cast<uint32_t>(k_block % G::kNumStages);
  const uint32_t tile_a = shared + idx * G::kStageBytes;
  const uint32_t full = shared + G::kBarriers + idx * 16;
  return {tile_a, tile_a + G::kTileBytesA, full, full + 8, pass % 2};
}

// One thread: waits for stages to become empty, and refills them.
KEYE_DEVICE void gemm_wgmma_produce(const GemmWgmmaParams& params, uint32_t shared, int first_m,
                                    int first_n, int num_k_blocks) {
  using G = GemmWgmma;
  for (int k_block = 0; k_block < num_k_blocks; k_block++) {
    const GemmWgmmaStage stage = gemm_wgmma_stage(shared, k_block);
    ptx::mbarrier_wait(stage.empty, stage.phase ^ 1);
    ptx::mbarrier_arrive_expect_tx(stage.full, G::kStageBytes);
    const int first_k = k_block * G::BLOCK_K;
    ptx::cp_async_bulk_tensor_load(stage.tile_a, params.a, {first_k, first_m}, stage.full);
    ptx::cp_async_bulk_tensor_load(stage.tile_b, params.b, {first_k, first_n}, stage.full);
  }
}

KEYE_DEVICE uint64_t gemm_wgmma_operand(uint32_t address) {
  return ptx::wgmma_descriptor({address, 0, 8 * GemmWgmma::kRowBytes, 0, GemmWgmma::kSwizzle});
}

KEYE_DEVICE void gemm_wgmma_consume(uint32_t shared, int num_k_blocks,
                                    float (&acc)[GemmWgmma::BLOCK_N / 2]) {
  using G = GemmWgmma;
  for (int k_block = 0; k_block < num_k_blocks; k_block++) {
    const GemmWgmmaStage stage = gemm_wgmma_stage(shared, k_block);
    ptx::mbarrier_wait(stage.full, stage.phase);
    ptx::wgmma_fence();
#pragma unroll
    for (int k_step = 0; k_step < G::BLOCK_K / 16; k_step++) {
      // The hardware swizzles addresses, so that 16 values further is 32 bytes further.
      ptx::wgmma_ss<BFloat16, G::BLOCK_N>(acc, gemm_wgmma_operand(stage.tile_a + k_step * 32),
                                          gemm_wgmma_operand(stage.tile_b + k_step * 32),
                                          k_block + k_step > 0);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::mbarrier_arrive(stage.empty);
  }
  ptx::wgmma_accumulators_ready(acc);
}

// Rounds the tile into shared memory, as TMA expects it; one thread sends it off.
KEYE_DEVICE void gemm_wgmma_store(const GemmWgmmaParams& params, uint32_t tile_c, int first_m,
                                  int first_n, const float (&acc)[GemmWgmma::BLOCK_N / 2]) {
  using G = GemmWgmma;
  const int lane_idx = thread_idx() % kWarpSize, warp_idx = warp_in_block();
#pragma unroll
  for (int i = 0; i < G::BLOCK_N / 16; i++) {
    uint32_t packed[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      packed[j] = ptx::cvt_rn_x2<BFloat16>(acc[i * 8 + j * 2], acc[i * 8 + j * 2 + 1]);
    }
    const auto row = static_cast<uint32_t>(warp_idx * 16 + lane_idx % 16);
    const auto chunk = static_cast<uint32_t>(i * 2 + lane_idx / 16);
    ptx::stmatrix(tile_c + swizzled(G::kSwizzle, row * G::kRowBytes + chunk * 16), packed);
  }
  ptx::fence_proxy_async();
  ptx::bar_sync(1, G::kNumConsumers);
  if (thread_idx() == 0) {
    ptx::cp_async_bulk_tensor_store(params.c, {first_n, first_m}, tile_c);
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group_read<0>();
  }
}

KEYE_KERNEL(GemmWgmma::kNumThreads, 1) gemm_wgmma_kernel(KEYE_PARAMS GemmWgmmaParams params) {
  using G = GemmWgmma;
  const uint32_t shared = shared_address(shared_memory());
  const int first_m = static_cast<int>(block_idx()) * G::BLOCK_M;
  const int first_n = block_idx_y() * G::BLOCK_N;
  const int num_k_blocks = (params.k + G::BLOCK_K - 1) / G::BLOCK_K;

  // Make the barriers, and show them to all threads and to TMA.
  if (thread_idx() == 0) {
    for (int i = 0; i < G::kNumStages; i++) {
      const GemmWgmmaStage stage = gemm_wgmma_stage(shared, i);
      ptx::mbarrier_init(stage.full, 1);
      ptx::mbarrier_init(stage.empty, G::kNumConsumers);
    }
    ptx::fence_mbarrier_init();
  }
  syncthreads();

  if (warp_in_block() == G::kNumConsumers / kWarpSize) {
    if (ptx::elect_sync()) gemm_wgmma_produce(params, shared, first_m, first_n, num_k_blocks);
  } else {
    float acc[G::BLOCK_N / 2];
    gemm_wgmma_consume(shared, num_k_blocks, acc);
    gemm_wgmma_store(params, shared + G::kNumStages * G::kStageBytes, first_m, first_n, acc);
  }
}

}  // namespace keye_ops::selftest
