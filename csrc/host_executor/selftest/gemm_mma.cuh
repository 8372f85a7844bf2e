// c = a b^T by mma.sync: tiles come through a ring of cp.async stages and a swizzle without bank
// conflicts.
#pragma once

#include "common/dtype.h"
#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "common/swizzle.h"
#include "common/thread.cuh"

namespace keye_ops::selftest {

struct GemmMmaParams {
  const BFloat16* a;  // [M, K]
  const BFloat16* b;  // [N, K]
  float* c;           // [M, N]
  int m, n, k;        // k is a multiple of 8
};

// A block computes a tile of [BLOCK_M, BLOCK_N]; the grid is [ceil(M / BLOCK_M), ceil(N /
// BLOCK_N)].
struct GemmMma {
  static constexpr int BLOCK_M = 64, BLOCK_N = 64, BLOCK_K = 32;
  static constexpr int kNumThreads = 128;
  static constexpr int kNumStages = 3;
  static constexpr int WARP_M = 32, WARP_N = 32;

  static constexpr uint32_t kRowBytes = BLOCK_K * sizeof(BFloat16);
  static constexpr uint32_t kTileBytesA = BLOCK_M * kRowBytes;
  static constexpr uint32_t kTileBytesB = BLOCK_N * kRowBytes;
  static constexpr uint32_t kStageBytes = kTileBytesA + kTileBytesB;
  static constexpr uint32_t kSharedBytes = kNumStages * kStageBytes;
  static constexpr Swizzle kSwizzle = Swizzle::k64;

  static_assert(kRowBytes == swizzle_span(kSwizzle), "a row is a span of the swizzle");
  static_assert((BLOCK_M / WARP_M) * (BLOCK_N / WARP_N) * kWarpSize == kNumThreads,
                "the warps cover the tile");
};

// Where 16 bytes of a row lie in a tile.
KEYE_DEVICE uint32_t gemm_mma_offset(int row, int chunk) {
  return swizzled(GemmMma::kSwizzle, static_cast<uint32_t>(row) * GemmMma::kRowBytes +
                                         static_cast<uint32_t>(chunk) * 16);
}

// Starts the copy of kRows rows of BLOCK_K values; zeros outside the matrix.
template <int kRows>
KEYE_DEVICE void gemm_mma_load_tile(uint32_t tile, const BFloat16* x, int first_row, int num_rows,
                                    int first_k, int k) {
  constexpr int kChunkSize = 8, kChunksPerRow = GemmMma::BLOCK_K / kChunkSize;
  static_assert(kRows * kChunksPerRow % GemmMma::kNumThreads == 0, "threads share a tile evenly");
#pragma unroll
  for (int i = 0; i < kRows * kChunksPerRow / GemmMma::kNumThreads; i++) {
    const int idx = i * GemmMma::kNumThreads + thread_idx();
    const int row = idx / kChunksPerRow, chunk = idx % kChunksPerRow;
    const int x_row = first_row + row, x_k = first_k + chunk * kChunkSize;
    const bool inside = x_row < num_rows && x_k < k;
    // NOTE: nothing is read where the source has no bytes, but its address must be a good one.
    const BFloat16* source = inside ? x + int64_t{x_row} * k + x_k : x;
    ptx::cp_async_cg(tile + gemm_mma_offset(row, chunk), source, inside ? 16 : 0);
  }
}

KEYE_KERNEL(GemmMma::kNumThreads, 1) gemm_mma_kernel(KEYE_PARAMS GemmMmaParams params) {
  using G = GemmMma;
  constexpr int kTilesM = G::WARP_M / 16, kTilesN = G::WARP_N / 8;
  const uint32_t stages = shared_address(shared_memory());
  const int lane_idx = thread_idx() % kWarpSize, warp_idx = warp_in_block();
  const int first_m = static_cast<int>(block_idx()) * G::BLOCK_M;
  const int first_n = block_idx_y() * G::BLOCK_N;
  const int warp_m = warp_idx % (G::BLOCK_M / G::WARP_M) * G::WARP_M;
  const int warp_n = warp_idx / (G::BLOCK_M / G::WARP_M) * G::WARP_N;
  const int num_k_blocks = (params.k + G::BLOCK_K - 1) / G::BLOCK_K;

  // A group is committed for every k block, and empty ones past the last: waits count groups.
  const auto load_stage = [&](int k_block) {
    if (k_block < num_k_blocks) {
      const uint32_t stage =
          stages + static_cast<uint32_t>(k_block % G::kNumStages) * G::kStageBytes;
      const int first_k = k_block * G::BLOCK_K;
      gemm_mma_load_tile<G::BLOCK_M>(stage, params.a, first_m, params.m, first_k, params.k);
      gemm_mma_load_tile<G::BLOCK_N>(stage + G::kTileBytesA, params.b, first_n, params.n, first_k,
                                     params.k);
    }
    ptx::cp_async_commit_group();
  };
  for (int k_block = 0; k_block < G::kNumStages - 1; k_block++) load_stage(k_block);

  float acc[kTilesM][kTilesN][4] = {};
  for (int k_block = 0; k_block < num_k_blocks; k_block++) {
    // The stage has arrived for every thread, and all have left the one before it, which is
    // refilled.
    ptx::cp_async_wait_group<G::kNumStages - 2>();
    syncthreads();
    load_stage(k_block + G::kNumStages - 1);

    const uint32_t tile_a =
        stages + static_cast<uint32_t>(k_block % G::kNumStages) * G::kStageBytes;
    const uint32_t tile_b = tile_a + G::kTileBytesA;
#pragma unroll
    for (int k_step = 0; k_step < G::BLOCK_K / 16; k_step++) {
      // Four 8 x 8 matrices at a time: of a rows first, then k; of b k first, then rows.
      uint32_t a[kTilesM][4], b[kTilesN / 2][4];
#pragma unroll
      for (int i = 0; i < kTilesM; i++) {
        const int row = warp_m + i * 16 + lane_idx % 16;
        ptx::ldmatrix(a[i], tile_a + gemm_mma_offset(row, k_step * 2 + lane_idx / 16));
      }
#pragma unroll
      for (int j = 0; j < kTilesN / 2; j++) {
        const int row = warp_n + j * 16 + lane_idx / 16 * 8 + lane_idx % 8;
        ptx::ldmatrix(b[j], tile_b + gemm_mma_offset(row, k_step * 2 + lane_idx / 8 % 2));
      }
#pragma unroll
      for (int i = 0; i < kTilesM; i++) {
#pragma unroll
        for (int j = 0; j < kTilesN; j++) {
          const int first = j % 2 * 2;
          ptx::mma_m16n8k16<BFloat16>(acc[i][j], a[i], b[j / 2][first], b[j / 2][first + 1]);
        }
      }
    }
  }

  // Store the accumulators where they are.
#pragma unroll
  for (int i = 0; i < kTilesM; i++) {
#pragma unroll
    for (int j = 0; j < kTilesN; j++) {
#pragma unroll
      for (int v = 0; v < 4; v++) {
        const int row = first_m + warp_m + i * 16 + v / 2 * 8 + lane_idx / 4;
        const int column = first_n + warp_n + j * 8 + lane_idx % 4 * 2 + v % 2;
        if (row < params.m && column < params.n) {
          params.c[int64_t{row} * params.n + column] = acc[i][j][v];
        }
      }
    }
  }
}

}  // namespace keye_ops::selftest
