// merge_norm: what a kernel is told, and where a merged token's patches are.
#pragma once

#include <cstdint>

#include "common/error_word.h"
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
  ErrorWord* error_word;         // of the device, for grids that lie; unused on the host
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

// The square of the token that begins `local` patches after the start of its image, whose frames
// have h by w patches, both multiples of side.
KEYE_HOST_DEVICE MergedSquare square_in_image(uint32_t side, uint32_t h, uint32_t w, int64_t start,
                                              uint32_t local) {
  const uint32_t columns = w / side, token = local / (side * side);
  const uint64_t tokens = uint64_t{h / side} * columns;  // of a frame
  const bool first = tokens > token;
  const uint32_t frame = first ? 0 : token / static_cast<uint32_t>(tokens);
  const uint32_t inside = first ? token : token % static_cast<uint32_t>(tokens);
  const int64_t row = int64_t{frame} * h + int64_t{inside / columns} * side;
  return {start + row * w + int64_t{inside % columns} * side, w};
}

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
  const int64_t start = params.image_offsets[image];
  return square_in_image(static_cast<uint32_t>(side),
                         static_cast<uint32_t>(params.grid[3 * image + 1]),
                         static_cast<uint32_t>(params.grid[3 * image + 2]), start,
                         static_cast<uint32_t>(patch - start));
}

}  // namespace keye_ops
