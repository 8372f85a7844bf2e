// patch_embed: what a kernel is told, and which rows of the table a patch takes its position from.
#pragma once

#include <cstdint>

#include "common/error_word.h"
#include "common/fused_multiply_add.h"
#include "common/host_device.h"

namespace keye_ops {

// (x / 255 - mean) / std of a channel's bytes as x * scale + shift, each factor a sum of two
// floats: one alone would cost most of the accuracy.
struct ByteScale {
  float scale, shift, scale_rest, shift_rest;
};

inline ByteScale byte_scale(double mean, double std) {
  const double scale = 1 / (255 * std), shift = -mean / std;
  const auto high_scale = static_cast<float>(scale), high_shift = static_cast<float>(shift);
  return {high_scale, high_shift, static_cast<float>(scale - high_scale),
          static_cast<float>(shift - high_shift)};
}

// V is a vector or one value.
template <class V>
KEYE_HOST_DEVICE V normalised_byte(V x, const ByteScale& by) {
  const V value = fused_multiply_add(x, V{} + by.scale, V{} + by.shift);
  return value + fused_multiply_add(x, V{} + by.scale_rest, V{} + by.shift_rest);
}

// Pixels to rows in the weight's dtype.
struct PixelRowsParams {
  const void* pixels;    // [total, inner], row stride pixel_stride
  void* rows;            // [total, padded], zeros from inner on
  const void* weight;    // [hidden, inner] or null: to be padded, too
  void* weight_rows;     // [hidden, padded]
  const ByteScale* by;   // [channels] in the host's memory, bytes only
  int64_t pixel_stride;  // in elements
  int64_t total, inner, padded, hidden, channels;
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
  ErrorWord* error_word;         // of the device, for values that do not fit; unused on the host
  int64_t position_stride, axis_stride;
  int64_t total, hidden, num_images, side;
  bool wide_ids;  // position_ids are int64, else int32
  bool align_corners;

  // The backward of a device that sorts patches by the cell of the table in which they lie.
  int32_t* cells;               // [total]: the first of a patch's rows of the table, or side**2
  float* fractions;             // [total, 2]: shares of its second row and column
  const int32_t* sorted_cells;  // [total]
  const int64_t* order;         // [total]: the patches of sorted_cells
  float* partials;              // [num_parts, side**2, hidden] instead of dtable, or null
  int64_t num_parts;
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

// Where a patch lies in its image; nowhere if the values in memory are wrong: on a device nobody
// has looked at them before.
struct PatchPlace {
  int64_t row, column, num_rows, num_columns;
  DeviceError error;  // what is wrong, kNone if nothing
  int64_t received;   // in its place
};

KEYE_HOST_DEVICE PatchPlace patch_place(const PatchEmbedParams& params, int64_t image,
                                        int64_t patch) {
  PatchPlace place{};
  place.error = DeviceError::kPatchEmbedOffsets;
  if (image >= params.num_images) return place;
  const int64_t begin = params.image_offsets[image], end = params.image_offsets[image + 1];
  const int64_t frames = params.grid[3 * image], num_rows = params.grid[3 * image + 1],
                num_columns = params.grid[3 * image + 2];
  const int64_t row = position_of(params, patch, 0), column = position_of(params, patch, 1);
  const auto size = static_cast<uint64_t>(num_rows * num_columns) * static_cast<uint64_t>(frames);
  if (patch < begin) {
    place.received = begin;
  } else if (patch >= end) {
    place.received = end;
  } else if (frames < 1 || num_rows < 1 || num_columns < 1) {
    place.error = DeviceError::kPatchEmbedGrid;
    place.received = frames < 1 ? frames : num_rows < 1 ? num_rows : num_columns;
  } else if (size != static_cast<uint64_t>(end - begin)) {
    place.received = end;
  } else if (row < 0 || row >= num_rows || column < 0 || column >= num_columns) {
    place.error = DeviceError::kPatchEmbedPositions;
    place.received = row < 0 || row >= num_rows ? row : column;
  } else {
    place = {row, column, num_rows, num_columns, DeviceError::kNone, 0};
  }
  return place;
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
  const int64_t low = numerator / denominator;  // less than side, for index is less than size
  const int64_t rest = numerator - low * denominator;
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

// Shares of (low, low), (low, high), (high, low), (high, high) of rows and columns.
template <class C>
KEYE_HOST_DEVICE void bilinear_shares(C r, C c, C (&shares)[4]) {
  const C r_low = 1 - r, c_low = 1 - c;
  shares[0] = r_low * c_low;
  shares[1] = r_low * c;
  shares[2] = r * c_low;
  shares[3] = r * c;
}

template <class C>
KEYE_HOST_DEVICE PatchTaps<C> taps_at(const PatchEmbedParams& params, const PatchPlace& place) {
  PatchTaps<C> taps{};
  if (place.error != DeviceError::kNone) return taps;
  const int64_t side = params.side;
  const auto r = axis_taps<C>(place.row, place.num_rows, side, params.align_corners);
  const auto c = axis_taps<C>(place.column, place.num_columns, side, params.align_corners);
  taps.rows[0] = r.low * side + c.low;
  taps.rows[1] = r.low * side + c.high;
  taps.rows[2] = r.high * side + c.low;
  taps.rows[3] = r.high * side + c.high;
  bilinear_shares(r.fraction, c.fraction, taps.shares);
  taps.good = true;
  return taps;
}

template <class C>
KEYE_HOST_DEVICE PatchTaps<C> patch_taps(const PatchEmbedParams& params, int64_t image,
                                         int64_t patch) {
  return taps_at<C>(params, patch_place(params, image, patch));
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
