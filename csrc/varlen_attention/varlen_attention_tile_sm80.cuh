// Tiles of rows in shared memory as ldmatrix reads them, brought by cp.async.
#pragma once

#include "common/dtype.h"
#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "common/thread.cuh"

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

}  // namespace keye_ops
