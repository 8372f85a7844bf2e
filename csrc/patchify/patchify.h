// patchify: what a kernel is told, and the weights of the filters, once for host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace keye_ops {

constexpr int kPatchifyMaxSide = 32768;
constexpr int kPatchifyMaxPatch = 64;
constexpr int kPillowPrecision = 22;  // bits behind the point of Pillow's weights

enum class PatchifyArithmetic { kPillow = 0, kUint8 = 1, kFloat32 = 2 };

// How one axis is resampled.
struct PatchifyAxis {
  int source, size;  // pixels before and after
  int precision;     // bits behind the point of integer weights
  bool bicubic;      // else bilinear
};

struct PatchifyParams {
  const uint8_t* frames;  // [num_frames, down.source, across.source, 3], pixels packed
  uint8_t* out;           // [num_frames * grid_h * grid_w, 3, patch_size, patch_size]
  int64_t stride_frame, stride_row;
  int64_t num_frames;
  PatchifyAxis across, down;
  int patch_size;
  bool is_float;        // fp32 sums and one rounding, else integers and one each pass
  bool vertical_first;  // columns, then rows
};

// The source pixels [first, first + count) that an output pixel sees, and where it lies.
struct PatchifyWindow {
  int first, count;
  double center;
};

// a * b that no compiler joins with an addition: the weights have the same bits everywhere.
KEYE_HOST_DEVICE double lone_product(double a, double b) { return fma(a, b, 0.0); }

// Source pixels for one of the output; below 1 the axis grows.
KEYE_HOST_DEVICE double patchify_scale(const PatchifyAxis& axis) {
  return static_cast<double>(axis.source) / axis.size;
}

// Half of what the filter sees: it stretches where the axis shrinks.
KEYE_HOST_DEVICE double patchify_support(const PatchifyAxis& axis) {
  const double scale = patchify_scale(axis);
  return (axis.bicubic ? 2.0 : 1.0) * (scale > 1.0 ? scale : 1.0);
}

// The most pixels in a window.
KEYE_HOST_DEVICE int patchify_taps(const PatchifyAxis& axis) {
  return 2 * static_cast<int>(ceil(patchify_support(axis))) + 1;
}

KEYE_HOST_DEVICE PatchifyWindow patchify_window(const PatchifyAxis& axis, int i) {
  const double center = lone_product(i + 0.5, patchify_scale(axis));
  const double support = patchify_support(axis);
  const int begin = static_cast<int>(center - support + 0.5);
  const int end = static_cast<int>(center + support + 0.5);
  const int first = begin < 0 ? 0 : begin;
  return {first, (end > axis.source ? axis.source : end) - first, center};
}

// Triangle, or Keys' cubic with a = -0.5.
KEYE_HOST_DEVICE double patchify_filter(bool bicubic, double x) {
  x = x < 0.0 ? -x : x;
  if (!bicubic) return x < 1.0 ? 1.0 - x : 0.0;
  if (x < 1.0) return lone_product(lone_product(lone_product(1.5, x) - 2.5, x), x) + 1.0;
  if (x >= 2.0) return 0.0;
  return lone_product(lone_product(lone_product(x - 5.0, x) + 8.0, x) - 4.0, -0.5);
}

// The filter at a window's pixel; the weights are these over their sum.
KEYE_HOST_DEVICE double patchify_value(const PatchifyAxis& axis, const PatchifyWindow& window,
                                       int tap) {
  const double scale = patchify_scale(axis);
  const double step = 1.0 / (scale > 1.0 ? scale : 1.0);
  const double distance = window.first + tap - window.center + 0.5;
  return patchify_filter(axis.bicubic, lone_product(distance, step));
}

KEYE_HOST_DEVICE double patchify_sum(const PatchifyAxis& axis, const PatchifyWindow& window) {
  double sum = 0.0;
  for (int tap = 0; tap < window.count; tap++) sum += patchify_value(axis, window, tap);
  return sum;
}

// A weight as the kernels multiply by it: rounded to nearest, halves away from zero.
KEYE_HOST_DEVICE int32_t patchify_weight(double weight, int precision, int32_t /*type*/) {
  const double scaled = lone_product(weight, static_cast<double>(1 << precision));
  return static_cast<int32_t>(scaled + (scaled < 0.0 ? -0.5 : 0.5));
}
KEYE_HOST_DEVICE float patchify_weight(double weight, int /*precision*/, float /*type*/) {
  return static_cast<float>(weight);
}

// The 8-bit value of a sum of integers, to which half a unit was added.
KEYE_HOST_DEVICE int patchify_level(int32_t sum, int precision) {
  const int level = sum >> precision;
  return level < 0 ? 0 : level > 255 ? 255 : level;
}

// The same of a sum of floats: to nearest, ties to even.
KEYE_HOST_DEVICE int patchify_level(float sum) {
  return static_cast<int>(rintf(sum < 0.0f ? 0.0f : sum > 255.0f ? 255.0f : sum));
}

}  // namespace keye_ops
