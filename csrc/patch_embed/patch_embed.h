// patch_embed: what a kernel is told, and which rows of the table a patch takes its position from.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace keye_ops {

// Pixels to rows in the weight's dtype. A byte x becomes (x / 255 - mean) / std.
struct PixelRowsParams {
  const void* pixels;    // [total, inner], row stride pixel_stride
  void* rows;            // [total, inner]
  const float* mean;     // [channels], bytes only
  const float* std;      // [channels], bytes only
  int64_t pixel_stride;  // in elements
  int64_t total, inner, channels;
};

struct PatchEmbedParams {
  void* out;                     // [total, hidden]: tokens that get their positions, forward only
  const void* bias;              // [hidden] or null, forward only
  const void* table;             // [side**2, hidden], forward only
  const void* dout;              // [total, hidden], backward only
  void* dtable;                  // [side**2, hidden], backward only
  void* dbias;                   // [hidden] or null, backward only
  const int32_t* grid;           // [num_images, 3]: frames, patch rows, columns
  const int32_t* image_offsets;  // [num_images + 1]
  const void* position_ids;      // [total, 2]: row, column
  int64_t position_stride, axis_stride;
  int64_t total, hidden, num_images, side;
  bool wide_ids;  // position_ids are int64, else int32
  bool align_corners;
};

KEYE_HOST_DEVICE int64_t position_of(const PatchEmbedParams& params, int64_t patch, int axis) {
  const int64_t i = patch * params.position_stride + axis * params.axis_stride;
  return params.wide_ids ? static_cast<const int64_t*>(params.position_ids)[i]
                         : static_cast<const int32_t*>(params.position_ids)[i];
}

// The image of a patch: the last that starts at the patch or before; none is empty.
KEYE_HOST_DEVICE int64_t image_of(const PatchEmbedParams& params, int64_t patch) {
  int64_t image = 0, behind = params.num_images;
  while (behind - image > 1) {
    const int64_t middle = image + (behind - image) / 2;
    (params.image_offsets[middle] <= patch ? image : behind) = middle;
  }
  return image;
}

// Two neighbours along an axis and the share of the second.
template <class C>
struct AxisTaps {
  int64_t low, high;
  C fraction;
};

// Coordinates are fractions of integers: fp32 ones would cost most of the result's accuracy.
template <class C>
KEYE_HOST_DEVICE AxisTaps<C> axis_taps(int64_t index, int64_t size, int64_t side,
                                       bool align_corners) {
  int64_t numerator, denominator;
  if (align_corners) {
    numerator = index * (side - 1);
    denominator = size > 1 ? size - 1 : 1;
  } else {
    numerator = (2 * index + 1) * side - size;
    denominator = 2 * size;
  }
  numerator = numerator > 0 ? numerator : 0;
  const int64_t quotient = numerator / denominator;
  const int64_t low = quotient < side - 1 ? quotient : side - 1;
  const int64_t rest = numerator - quotient * denominator;
  return {low, low + 1 < side ? low + 1 : side - 1,
          static_cast<C>(rest) / static_cast<C>(denominator)};
}

// The rows of the table that a patch mixes, and their shares.
template <class C>
struct PatchTaps {
  int64_t rows[4];
  C shares[4];
};

template <class C>
KEYE_HOST_DEVICE PatchTaps<C> patch_taps(const PatchEmbedParams& params, int64_t image,
                                         int64_t patch) {
  const int64_t side = params.side;
  const auto r = axis_taps<C>(position_of(params, patch, 0), params.grid[3 * image + 1], side,
                              params.align_corners);
  const auto c = axis_taps<C>(position_of(params, patch, 1), params.grid[3 * image + 2], side,
                              params.align_corners);
  const C r_low = 1 - r.fraction, c_low = 1 - c.fraction;
  return {
      {r.low * side + c.low, r.low * side + c.high, r.high * side + c.low, r.high * side + c.high},
      {r_low * c_low, r_low * c.fraction, r.fraction * c_low, r.fraction * c.fraction}};
}

}  // namespace keye_ops
