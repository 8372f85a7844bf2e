// patch_embed: what a kernel is told, and which rows of the table a patch takes its position from.
#pragma once

#include <cstdint>

#include "common/fused_multiply_add.h"
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

// The image of a patch: the last that starts at the patch or before; none is empty. Of offsets that
// are not sums of sizes it is any image, or 0 where there is none.
KEYE_HOST_DEVICE int64_t image_of(const PatchEmbedParams& params, int64_t patch) {
  int64_t image = 0, behind = params.num_images;
  while (behind - image > 1) {
    const int64_t middle = image + (behind - image) / 2;
    (params.image_offsets[middle] <= patch ? image : behind) = middle;
  }
  return image;
}

// Where a patch lies in its image. Not good, and then at 0 of 1, where no image has the patch or
// the position is outside the image's grid: on a device nobody has looked at the values before.
struct PatchPlace {
  int64_t row, column, num_rows, num_columns;
  bool good;
};

KEYE_HOST_DEVICE PatchPlace patch_place(const PatchEmbedParams& params, int64_t image,
                                        int64_t patch) {
  if (image < params.num_images && params.image_offsets[image] <= patch &&
      patch < params.image_offsets[image + 1]) {
    const int64_t num_rows = params.grid[3 * image + 1], num_columns = params.grid[3 * image + 2];
    const int64_t row = position_of(params, patch, 0), column = position_of(params, patch, 1);
    if (row >= 0 && row < num_rows && column >= 0 && column < num_columns) {
      return {row, column, num_rows, num_columns, true};
    }
  }
  return {0, 0, 1, 1, false};
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

// The rows of the table that a patch mixes, and their shares; a row may come twice. A patch in no
// good place takes nothing from the table, and its token is zeros.
template <class C>
struct PatchTaps {
  int64_t rows[4];  // of the table, whatever the values in memory
  C shares[4];
  bool good;
};

template <class C>
KEYE_HOST_DEVICE PatchTaps<C> patch_taps(const PatchEmbedParams& params, int64_t image,
                                         int64_t patch) {
  const int64_t side = params.side;
  const PatchPlace place = patch_place(params, image, patch);
  if (!place.good) return {};
  const auto r = axis_taps<C>(place.row, place.num_rows, side, params.align_corners);
  const auto c = axis_taps<C>(place.column, place.num_columns, side, params.align_corners);
  const C r_low = 1 - r.fraction, c_low = 1 - c.fraction;
  return {
      {r.low * side + c.low, r.low * side + c.high, r.high * side + c.low, r.high * side + c.high},
      {r_low * c_low, r_low * c.fraction, r.fraction * c_low, r.fraction * c.fraction},
      true};
}

// A token of a good patch, to be rounded once: the product of pixels and weight, the bias (0
// without one) and the values of the patch's rows of the table. V is a vector or one value.
template <class V, class C>
KEYE_HOST_DEVICE V add_position(V product, V bias, const V (&corners)[4], const C (&shares)[4]) {
  const V first = corners[0] * shares[0], second = corners[2] * shares[2];
  const V top = fused_multiply_add(corners[1], V{} + shares[1], first);
  const V bottom = fused_multiply_add(corners[3], V{} + shares[3], second);
  return (product + bias) + (top + bottom);
}

}  // namespace keye_ops
