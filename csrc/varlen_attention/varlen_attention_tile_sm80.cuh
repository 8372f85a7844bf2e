// Tiles of rows in shared memory as ldmatrix reads them, brought by cp.async, and the products of a
// warp that kernels for sm_80 are made of.
#pragma once

#include "common/dtype.h"
#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "common/thread.cuh"
#include "common/vec.cuh"
#include "varlen_attention/varlen_attention.h"

namespace keye_ops {

// Rows of kHeadDim values of 16 bits. The distance of two rows is an odd number of 16-byte chunks,
// so that 8 chunks below one another lie in different banks without a swizzle: a row of 72 values
// has 9 chunks and needs no padding.
template <int kHeadDim>
struct AttentionTileLayout {
  static_assert(kHeadDim % 8 == 0, "a row is whole chunks of 8 values");
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr uint32_t kPitch = (kChunks | 1) * 16;  // bytes

  KEYE_DEVICE static uint32_t offset(int row, int chunk) {
    return static_cast<uint32_t>(row) * kPitch + static_cast<uint32_t>(chunk) * 16;
  }
};

// Starts the copy of kRows rows from `source` on; zeros in place of those from num_rows on.
template <int kHeadDim, int kRows, int kThreads, class T>
KEYE_DEVICE void load_attention_tile(uint32_t tile, const T* source, int64_t stride_row,
                                     int num_rows) {
  using Layout = AttentionTileLayout<kHeadDim>;
  constexpr int kCopies = kRows * Layout::kChunks;
#pragma unroll
  for (int i = 0; i < (kCopies + kThreads - 1) / kThreads; i++) {
    const int idx = i * kThreads + thread_idx();
    if (kCopies % kThreads != 0 && idx >= kCopies) break;
    const int row = idx / Layout::kChunks, chunk = idx % Layout::kChunks;
    const bool inside = row < num_rows;
    // NOTE: nothing is read where the source has no bytes, but its address must be a good one.
    const T* from = inside ? source + row * stride_row + chunk * 8 : source;
    ptx::cp_async_cg(tile + Layout::offset(row, chunk), from, inside ? 16 : 0);
  }
}

// ---- products of a warp ----

// A block keeps BLOCK_M rows of which every warp has kTilesM times 16, and goes through blocks of
// other rows, in steps of kStep. B describes it: kHeadDim, Layout, kTilesM, kWarpRows, kStep.

// The rows of a warp as the first operand of products over head_dim.
template <class B, bool kInRegisters>
struct AttentionRows {
  static constexpr int kSteps = B::kHeadDim / 16;
  static constexpr bool kHasTail = B::kHeadDim % 16 != 0;  // 8 more
  uint32_t tile;                                           // from the warp's first row on
  uint32_t kept[B::kTilesM][kSteps][4], kept_tail[B::kTilesM][2];

  KEYE_DEVICE explicit AttentionRows(uint32_t kept_tile)
      : tile(kept_tile + B::Layout::offset(warp_in_block() * B::kWarpRows, 0)) {}

  KEYE_DEVICE void keep() {
#pragma unroll
    for (int m = 0; m < B::kTilesM; m++) {
#pragma unroll
      for (int k = 0; k < kSteps; k++) load(kept[m][k], m, k);
      if constexpr (kHasTail) load_tail(kept_tail[m], m);
    }
  }
  KEYE_DEVICE void get(uint32_t (&a)[4], int m, int k) const {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] = kept[m][k][i];
    } else {
      load(a, m, k);
    }
  }
  KEYE_DEVICE void get_tail(uint32_t (&a)[2], int m) const {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < 2; i++) a[i] = kept_tail[m][i];
    } else {
      load_tail(a, m);
    }
  }

 private:
  KEYE_DEVICE void load(uint32_t (&a)[4], int m, int k) const {
    const int lane_idx = thread_idx() % kWarpSize;
    ptx::ldmatrix(a, tile + B::Layout::offset(m * 16 + lane_idx % 16, k * 2 + lane_idx / 16));
  }
  KEYE_DEVICE void load_tail(uint32_t (&a)[2], int m) const {
    const int lane_idx = thread_idx() % kWarpSize;
    ptx::ldmatrix(a, tile + B::Layout::offset(m * 16 + lane_idx % 16, kSteps * 2));
  }
};

// A step's products of a warp, where mma.sync leaves them: value v of tile (m, n) is of row
// 16 m + 8 (v / 2) + lane / 4 and column 8 n + 2 (lane % 4) + v % 2.
template <class B, int kColumns = B::kStep / 8>
using AttentionScores = float[B::kTilesM][kColumns][4];
// The same as 16-bit operands.
template <class B, int kSteps = B::kStep / 16>
using AttentionWeights = uint32_t[B::kTilesM][kSteps][4];
// Sums for a warp's rows: [rows, head_dim].
template <class B>
using AttentionSums = float[B::kTilesM][B::kHeadDim / 8][4];

// scores = rows x^T, of 8 kColumns rows x of a tile from first_row on.
template <class T, class B, class Rows, int kColumns>
KEYE_DEVICE void multiply_rows(float (&scores)[B::kTilesM][kColumns][4], const Rows& rows,
                               uint32_t tile, int first_row) {
  const int lane_idx = thread_idx() % kWarpSize;
#pragma unroll
  for (int m = 0; m < B::kTilesM; m++) {
#pragma unroll
    for (int n = 0; n < kColumns; n++) {
#pragma unroll
      for (int v = 0; v < 4; v++) scores[m][n][v] = 0.0f;
    }
  }
#pragma unroll
  for (int k = 0; k < B::kHeadDim / 16; k++) {
    uint32_t a[B::kTilesM][4];
#pragma unroll
    for (int m = 0; m < B::kTilesM; m++) rows.get(a[m], m, k);
#pragma unroll
    for (int j = 0; j < kColumns / 2; j++) {
      // Four 8 x 8 matrices: head_dim first, then rows.
      const int row = first_row + j * 16 + lane_idx / 16 * 8 + lane_idx % 8;
      uint32_t b[4];
      ptx::ldmatrix(b, tile + B::Layout::offset(row, k * 2 + lane_idx / 8 % 2));
#pragma unroll
      for (int m = 0; m < B::kTilesM; m++) {
        ptx::mma_m16n8k16<T>(scores[m][2 * j], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<T>(scores[m][2 * j + 1], a[m], b[2], b[3]);
      }
    }
  }
  if constexpr (B::kHeadDim % 16 != 0) {
    uint32_t a[B::kTilesM][2];
#pragma unroll
    for (int m = 0; m < B::kTilesM; m++) rows.get_tail(a[m], m);
#pragma unroll
    for (int j = 0; j < kColumns / 2; j++) {
      uint32_t b[2];
      ptx::ldmatrix(
          b, tile + B::Layout::offset(first_row + j * 16 + lane_idx % 16, B::kHeadDim / 16 * 2));
#pragma unroll
      for (int m = 0; m < B::kTilesM; m++) {
        ptx::mma_m16n8k8<T>(scores[m][2 * j], a[m][0], a[m][1], b[0]);
        ptx::mma_m16n8k8<T>(scores[m][2 * j + 1], a[m][0], a[m][1], b[1]);
      }
    }
  }
}

// sums += weights x, of 16 kSteps rows x of a tile from first_row on.
template <class T, class B, int kSteps>
KEYE_DEVICE void add_weighted_rows(AttentionSums<B>& sums,
                                   const uint32_t (&weights)[B::kTilesM][kSteps][4], uint32_t tile,
                                   int first_row) {
  const int lane_idx = thread_idx() % kWarpSize;
#pragma unroll
  for (int k = 0; k < kSteps; k++) {
    // Four 8 x 8 matrices, turned around: rows first, then head_dim.
    const int row = first_row + k * 16 + lane_idx % 16;
#pragma unroll
    for (int j = 0; j < B::kHeadDim / 16; j++) {
      uint32_t b[4];
      ptx::ldmatrix_trans(b, tile + B::Layout::offset(row, j * 2 + lane_idx / 16));
#pragma unroll
      for (int m = 0; m < B::kTilesM; m++) {
        ptx::mma_m16n8k16<T>(sums[m][2 * j], weights[m][k], b[0], b[1]);
        ptx::mma_m16n8k16<T>(sums[m][2 * j + 1], weights[m][k], b[2], b[3]);
      }
    }
    if constexpr (B::kHeadDim % 16 != 0) {
      uint32_t b[2];
      ptx::ldmatrix_trans(b, tile + B::Layout::offset(row, B::kHeadDim / 16 * 2));
#pragma unroll
      for (int m = 0; m < B::kTilesM; m++) {
        ptx::mma_m16n8k16<T>(sums[m][B::kHeadDim / 8 - 1], weights[m][k], b[0], b[1]);
      }
    }
  }
}

// Rounded to operands.
template <class T, class B, int kSteps>
KEYE_DEVICE void round_scores(uint32_t (&weights)[B::kTilesM][kSteps][4],
                              const float (&scores)[B::kTilesM][2 * kSteps][4]) {
#pragma unroll
  for (int m = 0; m < B::kTilesM; m++) {
#pragma unroll
    for (int k = 0; k < kSteps; k++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float (&pair)[4] = scores[m][2 * k + i / 2];
        const int at = i % 2 * 2;
        weights[m][k][i] = ptx::cvt_rn_x2<T>(pair[at], pair[at + 1]);
      }
    }
  }
}

// Stores a warp's sums, times a factor for each row of a thread, in rows of `out`, through its rows
// at `offset` of shared memory.
template <class T, class B>
KEYE_DEVICE void store_sums(T* out, int64_t stride_row, int num_rows, const AttentionSums<B>& sums,
                            const float (&factors)[B::kTilesM][2], uint32_t offset) {
  unsigned char* shared = shared_memory() + offset;
  const int lane_idx = thread_idx() % kWarpSize;
#pragma unroll
  for (int m = 0; m < B::kTilesM; m++) {
#pragma unroll
    for (int j = 0; j < B::kHeadDim / 8; j++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float* pair = &sums[m][j][half * 2];
        const uint32_t at = B::Layout::offset(m * 16 + half * 8 + lane_idx / 4, j) +
                            static_cast<uint32_t>(lane_idx % 4) * 4;
        store_bytes(shared + at,
                    ptx::cvt_rn_x2<T>(pair[0] * factors[m][half], pair[1] * factors[m][half]));
      }
    }
  }
  sync_warp();
  constexpr int kChunks = B::Layout::kChunks;
  // NOTE: unrolled, its offsets would take registers from the products of the next item.
#pragma unroll 1
  for (int i = 0; i < (B::kWarpRows * kChunks + kWarpSize - 1) / kWarpSize; i++) {
    const int idx = i * kWarpSize + lane_idx;
    const int row = idx / kChunks, chunk = idx % kChunks;
    if (row < B::kWarpRows && row < num_rows) {
      store_bytes(out + row * stride_row + chunk * 8,
                  load_bytes<Chunk>(shared + B::Layout::offset(row, chunk)));
    }
  }
}

// The rows of a head from `row` on.
template <class T>
KEYE_DEVICE T* rows_of(const AttentionTensor& x, int64_t row, int head) {
  return static_cast<T*>(x.data) + row * x.stride_row + head * x.stride_head;
}

}  // namespace keye_ops
