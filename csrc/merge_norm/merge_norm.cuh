// merge_norm on CUDA: a team of lanes holds a row, which is a patch (norm, then merge) or all
// patches of a merged token; see common/norm_row.cuh. Patches are gathered as they are loaded.
#pragma once

#include "common/error_word.cuh"
#include "common/norm_row.cuh"
#include "merge_norm/merge_norm.h"

namespace keye_ops {

struct MergeNormKernelParams {
  MergeNormParams op;
  NormPlan plan;
  int patch_chunks;                  // of a patch
  float per_patch_chunks, per_side;  // reciprocals
};

// Of integers below 2**20, without a division.
KEYE_DEVICE int quotient(int dividend, float per_divisor) {
  return static_cast<int>((static_cast<float>(dividend) + 0.5f) * per_divisor);
}

// The last image that starts at a patch or before. Of offsets that are no sums nothing is promised,
// but that it is an image. The lanes of a warp search together, 32 images a step.
KEYE_DEVICE int64_t image_of(const MergeNormParams& params, int64_t patch) {
  const int lane_idx = thread_idx() % kWarpSize;
  int64_t first = 0, count = params.num_images;
  while (count > 1) {
    const int64_t step = (count + kWarpSize - 1) / kWarpSize, mine = lane_idx * step;
    const bool starts = mine < count && params.image_offsets[first + mine] <= patch;
    const int64_t passed = max(reduce_add(starts ? 1 : 0), 1) - 1;
    first += passed * step;
    count = min(step, count - passed * step);
  }
  return first;
}

// Finds the square of the token that begins at a patch in raster order, or reports why there is
// none inside of x. No two tokens have the same patches, as long as offsets do not decrease.
KEYE_DEVICE bool find_square(const MergeNormParams& params, int64_t patch, MergedSquare& square) {
  const auto side = static_cast<uint32_t>(params.side);
  if (params.num_images == 0) {
    report_error(params.error_word, DeviceError::kMergeNormOffsets, 0.0);
    return false;
  }
  const int64_t image = image_of(params, patch);
  const int32_t t = params.grid[3 * image];
  const int32_t h = params.grid[3 * image + 1], w = params.grid[3 * image + 2];
  const auto rows = static_cast<uint32_t>(h), columns = static_cast<uint32_t>(w);
  const bool good_h = h >= 1 && rows % side == 0, good_w = w >= 1 && columns % side == 0;
  if (t < 1 || !good_h || !good_w) {
    report_error(params.error_word, DeviceError::kMergeNormGrid, t < 1 ? t : good_h ? w : h);
    return false;
  }

  const int64_t start = params.image_offsets[image], end = params.image_offsets[image + 1];
  const int64_t frame = int64_t{h} * w;  // below 2**31, or times t it would be too much
  bool good = 0 <= start && start <= patch && patch < end && end <= params.total;
  good = good && frame <= end && t * frame == end - start;
  const auto local = static_cast<uint32_t>(patch - start);
  if (!good || local % (side * side) != 0) {
    report_error(params.error_word, DeviceError::kMergeNormOffsets, static_cast<double>(end));
    return false;
  }
  square = square_in_image(side, rows, columns, start, local);
  return true;
}

template <class T>
struct MergedRow : NormRow<T> {
  int64_t patch;  // the first
  int row_step;   // patches between the rows of the square
};

template <class T>
struct MergedRows {
  const MergeNormKernelParams& kernel_params;
  const MergeNormParams& params;

  KEYE_DEVICE explicit MergedRows(const MergeNormKernelParams& kernel_params)
      : kernel_params(kernel_params), params(kernel_params.op) {}

  KEYE_DEVICE MergedRow<T> at(int64_t index) const {
    // A row is a token, or one of its patches.
    const int64_t side = params.side, square_size = side * side;
    int64_t token = index, k = 0;
    if (params.norm_first) {
      const bool small = index <= 0xffffffff;  // divisions of 64 bits take long
      token = small ? static_cast<uint32_t>(index) / static_cast<uint32_t>(square_size)
                    : index / square_size;
      k = index - token * square_size;
    }
    // NOTE: tokens without a square take the patches that they have in block order, so that the
    // backward leaves none without a value.
    MergedSquare square{token * square_size, side};
    const bool inside = params.block_order || find_square(params, token * square_size, square);
    const int k_row = static_cast<int>(k) / static_cast<int>(side);
    const int64_t k_column = k - k_row * side;
    const int64_t patch = square.corner + k_row * square.row_step + k_column;

    MergedRow<T> row{};
    row.inside = inside;
    row.row_step = static_cast<int>(square.row_step);
    row.patch = patch;
    const int64_t width = params.norm_first ? params.hidden : square_size * params.hidden;
    row.out = static_cast<T*>(params.out) + index * width;
    row.dout = static_cast<const T*>(params.dout) + token * params.dout_stride + k * params.hidden;
    return row;
  }

  // Of a chunk, in a tensor of patches.
  KEYE_DEVICE int64_t offset_of(const MergedRow<T>& row, int chunk, int64_t stride) const {
    int64_t patch = row.patch;
    if (!params.norm_first) {
      const int k = quotient(chunk, kernel_params.per_patch_chunks);
      const int k_row = quotient(k, kernel_params.per_side);
      patch += int64_t{k_row} * row.row_step + (k - k_row * static_cast<int>(params.side));
      chunk -= k * kernel_params.patch_chunks;
    }
    return patch * stride + int64_t{chunk} * kVectorSize<T>;
  }
  KEYE_DEVICE const T* x_of(const MergedRow<T>& row, int chunk) const {
    return static_cast<const T*>(params.x) + offset_of(row, chunk, params.x_stride);
  }
  KEYE_DEVICE T* dx_of(const MergedRow<T>& row, int chunk) const {
    return static_cast<T*>(params.dx) + offset_of(row, chunk, params.hidden);
  }
};

template <class T, int kChunks>
KEYE_KERNEL(kNormMaxThreads, 2)
merge_norm_forward_kernel(KEYE_PARAMS MergeNormKernelParams params) {
  const MergedRows<T> rows(params);
  norm_forward<T, NormKind::kLayer, kChunks>(params.plan, rows);
}

template <class T, int kChunks>
KEYE_KERNEL(kNormMaxThreads, 1)
merge_norm_backward_kernel(KEYE_PARAMS MergeNormKernelParams params) {
  const MergedRows<T> rows(params);
  norm_backward<T, NormKind::kLayer, kChunks>(params.plan, rows);
}

}  // namespace keye_ops
