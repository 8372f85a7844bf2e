// Tiles of rows in shared memory as TMA brings them and wgmma reads them, and the products of a
// warpgroup that kernels for sm_90a are made of.
#pragma once

#include "common/dtype.h"
#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "common/swizzle.h"
#include "common/thread.cuh"
#include "varlen_attention/varlen_attention.h"

namespace keye_ops {

// A block keeps BLOCK_M rows, of which each of kConsumers warpgroups has 64, and goes through
// blocks of kBlockN other rows, which a producer's warps bring.
template <class T, int kHeadDim_, int kConsumers_, int kBlockN>
struct AttentionSm90Tiles {
  using Type = T;
  static constexpr int kHeadDim = kHeadDim_, kConsumers = kConsumers_;
  static constexpr int BLOCK_M = 64 * kConsumers, BLOCK_N = kBlockN;
  static constexpr int kConsumerThreads = kConsumers * 128, kNumThreads = 128 + kConsumerThreads;

  // A block starts with all registers of the multiprocessor in equal parts, in units of 8.
  static constexpr int kStartRegisters = 65536 / kNumThreads / 8 * 8;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 112;
  static_assert(kConsumers == 2 || kConsumers == 4, "registers are chosen for these");
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                    (kConsumers + 1) * kStartRegisters,
                "who asks for more registers than there are waits for ever");

  // A tile is units of as many columns as the swizzle spans, one behind another; TMA fills columns
  // that rows do not have with zeros. NOTE: what it takes is a request for every line of 128 bytes
  // that a unit's row touches, about 2 ns each, which bounds short of tensor cores. Narrower units
  // have more of them; copies by threads were slower still (cp.async, 16 bytes each).
  static constexpr Swizzle kSwizzle = Swizzle::k128;
  static constexpr uint32_t kSpan = swizzle_span(kSwizzle);
  static constexpr int kUnitColumns = kSpan / 2;
  static constexpr int kUnits = (kHeadDim + kUnitColumns - 1) / kUnitColumns;
  static constexpr int kHeadSteps = (kHeadDim + 15) / 16;  // of 16 columns
  static constexpr int kKeySteps = BLOCK_N / 16;
  static constexpr uint32_t kUnitBytesQ = BLOCK_M * kSpan, kUnitBytes = BLOCK_N * kSpan;
  static constexpr uint32_t kTileBytesQ = kUnits * kUnitBytesQ, kTileBytes = kUnits * kUnitBytes;
  static constexpr uint32_t kMaxSharedBytes = 227 * 1024;

  static_assert(kAttentionTileRows % BLOCK_M == 0, "a tile of the plan is one or more of these");
  static_assert(kTileBytesQ % 1024 == 0 && kTileBytes % 1024 == 0,
                "tiles are aligned to the swizzle's pattern");
};

// A place in a ring of stages.
template <int kNumStages>
struct AttentionRing {
  uint32_t stage = 0, phase = 0;
  KEYE_DEVICE void advance() {
    stage++;
    if (stage == kNumStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Tells a barrier that this warp has left what it guards.
KEYE_DEVICE void attention_leave(uint32_t barrier) {
  sync_warp();
  if (thread_idx() % kWarpSize == 0) ptx::mbarrier_arrive(barrier);
}

// Starts the copy of a tile.
template <class A>
KEYE_DEVICE void attention_sm90_load(uint32_t tile, uint32_t unit_bytes, const TensorMap& map,
                                     int row, int head, uint32_t full) {
#pragma unroll
  for (int i = 0; i < A::kUnits; i++) {
    ptx::cp_async_bulk_tensor_load(tile + i * unit_bytes, map, {i * A::kUnitColumns, row, head},
                                   full);
  }
}

// By a warp: zeros in the rows of a tile from `first` on, which are those of another segment: zero
// times their infinities would not be zero.
template <class A>
KEYE_DEVICE void attention_sm90_clear_rows(uint32_t tile, int first) {
  struct alignas(16) Chunk {
    uint32_t words[4];
  };
  constexpr int kRowChunks = A::kSpan / sizeof(Chunk);  // of a unit
  const int chunks = (A::BLOCK_N - first) * kRowChunks;
  unsigned char* const memory = shared_memory() + (tile - shared_address(shared_memory()));
  for (int i = thread_idx() % kWarpSize; i < chunks * A::kUnits; i += kWarpSize) {
    const auto unit = static_cast<uint32_t>(i / chunks);
    const auto chunk = static_cast<uint32_t>(first * kRowChunks + i % chunks);
    store_bytes(memory + unit * A::kUnitBytes + chunk * sizeof(Chunk), Chunk{});
  }
}

// ---- products of a warpgroup ----

KEYE_DEVICE uint64_t advanced(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// scores [64, BLOCK_N] = q k^T, of 64 kept rows q and a tile k
template <class A>
KEYE_DEVICE void attention_sm90_scores(float (&scores)[A::BLOCK_N / 2], uint32_t q, uint32_t k) {
  const uint64_t q_matrix = ptx::wgmma_descriptor({q, 0, 8 * A::kSpan, 0, A::kSwizzle});
  const uint64_t k_matrix = ptx::wgmma_descriptor({k, 0, 8 * A::kSpan, 0, A::kSwizzle});
  constexpr int kStepsOfUnit = A::kUnitColumns / 16;
#pragma unroll
  for (int step = 0; step < A::kHeadSteps; step++) {
    // The hardware swizzles addresses, so that 16 values further is 32 bytes further.
    const uint32_t inside = step % kStepsOfUnit * 32;
    const uint32_t unit = step / kStepsOfUnit;
    ptx::wgmma_ss<typename A::Type, A::BLOCK_N>(
        scores, advanced(q_matrix, unit * A::kUnitBytesQ + inside),
        advanced(k_matrix, unit * A::kUnitBytes + inside), step > 0);
  }
}

// out [64, kHeadDim] += weights v, of a tile v
template <class A>
KEYE_DEVICE void attention_sm90_values(float (&out)[A::kHeadDim / 2],
                                       const uint32_t (&weights)[A::kKeySteps][4], uint32_t v) {
  const uint64_t v_matrix = ptx::wgmma_descriptor({v, A::kUnitBytes, 8 * A::kSpan, 0, A::kSwizzle});
#pragma unroll
  for (int step = 0; step < A::kKeySteps; step++) {
    ptx::wgmma_rs<typename A::Type, A::kHeadDim, ptx::Major::kMN>(
        out, weights[step], advanced(v_matrix, step * 16 * A::kSpan), true);
  }
}

// Weights as the left operand of a product: a step is 16 keys.
template <class T, int kCount>
KEYE_DEVICE void attention_round(uint32_t (&weights)[kCount / 8][4],
                                 const float (&scores)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 8; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      weights[i][j] = ptx::cvt_rn_x2<T>(scores[i * 8 + j * 2], scores[i * 8 + j * 2 + 1]);
    }
  }
}

}  // namespace keye_ops
