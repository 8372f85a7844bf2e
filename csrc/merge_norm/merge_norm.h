// merge_norm: what a kernel is told, and where a merged token's patches are.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace keye_ops {

constexpr int64_t kMergeNormMaxSide = 32768;  // its square times a width fits 64 bits

// Strides are in elements; the last dimension of every tensor has stride 1.
struct MergeNormParams {
  const void* x;                 // [total, hidden]
  const void* weight;            // [normed]
  const void* bias;              // [normed], forward only
  void* out;                     // [total / side**2, side**2 * hidden], forward only
  const void* dout;              // like out, backward only
  void* dx;                      // [total, hidden], backward only
  void* dweight_partial;         // [num_partials, normed], backward only
  void* dbias_partial;           // [num_partials, normed], backward only
  const int32_t* grid;           // [num_images, 3]: frames, patch rows, columns
  const int32_t* image_offsets;  // [num_images + 1]
  int64_t x_stride, dout_stride;
  int64_t total, hidden, num_images;
  int64_t side;  // of the merged square
  int num_partials;
  double eps;
  bool block_order;  // the patches of a merged token follow each other
  bool norm_first;   // normed is hidden: every patch alone; else side**2 * hidden
};

// Patches (i, j) of a merged token are at corner + i * row_step + j.
struct MergedSquare {
  int64_t corner, row_step;
};

// Offsets and sizes must be those of a checked grid.
KEYE_HOST_DEVICE MergedSquare merged_square(const MergeNormParams& params, int64_t token) {
  const int64_t side = params.side, patch = token * side * side;
  if (params.block_order) return {patch, side};
  // The last image that starts at the token's first patch or before: none is empty.
  int64_t image = 0, behind = params.num_images;
  while (behind - image > 1) {
    const int64_t middle = image + (behind - image) / 2;
    (params.image_offsets[middle] <= patch ? image : behind) = middle;
  }
  const int64_t h = params.grid[3 * image + 1], w = params.grid[3 * image + 2];
  const int64_t start = params.image_offsets[image], columns = w / side;
  const int64_t local = (patch - start) / (side * side), tokens = h / side * columns;
  const int64_t frame = local / tokens, inside = local % tokens;
  return {start + frame * h * w + inside / columns * side * w + inside % columns * side, w};
}

}  // namespace keye_ops
