// patchify: schema, argument checks, output allocation, and the precision of integer weights.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/allocate.h"
#include "common/check.h"
#include "patchify/patchify_op.h"

namespace keye_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "patchify";

// The largest weight of an axis.
double largest_weight(const PatchifyAxis& axis) {
  double largest = 0.0;
  for (int i = 0; i < axis.size; i++) {
    const PatchifyWindow window = patchify_window(axis, i);
    double sum = 0.0, top = 0.0;
    for (int tap = 0; tap < window.count; tap++) {
      const double value = patchify_value(axis, window, tap);
      sum += value;
      top = std::max(top, value);
    }
    largest = std::max(largest, top / sum);
  }
  return largest;
}

// The most bits behind the point with which the largest weight is an int16.
int precision_of_16_bits(const PatchifyAxis& axis) {
  const double largest = largest_weight(axis);
  int precision = 0;
  while (precision < 22 && 0.5 + largest * (1 << (precision + 1)) < (1 << 15)) precision++;
  return precision;
}

PatchifyAxis axis_of(int64_t source, int64_t size, bool bicubic, PatchifyArithmetic arithmetic) {
  PatchifyAxis axis{static_cast<int>(source), static_cast<int>(size), kPillowPrecision, bicubic};
  if (arithmetic == PatchifyArithmetic::kUint8) {
    // NOTE: frames of a clip, and clips of a batch, ask for the same axes again and again.
    thread_local struct {
      PatchifyAxis axis;
      int precision;
    } known[4] = {};
    thread_local unsigned next = 0;
    for (const auto& one : known) {
      const bool same = one.axis.source == axis.source && one.axis.size == axis.size;
      if (same && one.axis.bicubic == bicubic) {
        axis.precision = one.precision;
        return axis;
      }
    }
    axis.precision = precision_of_16_bits(axis);
    known[next++ % 4] = {axis, axis.precision};
  }
  return axis;
}

void check_frames(const Tensor& frames) {
  KEYE_CHECK(frames.scalar_type() == ScalarType::Byte, kOp, ": frames must be uint8, got ",
             dtype_name(frames.scalar_type()));
  KEYE_CHECK(frames.dim() == 4 && frames.size(3) == 3, kOp, ": frames must be [T, H, W, 3], got ",
             shape_of(frames));
  const int64_t height = frames.size(1), width = frames.size(2);
  const bool good = std::min(height, width) >= 1 && std::max(height, width) <= kPatchifyMaxSide;
  KEYE_CHECK(good, kOp, ": frames must have sides from 1 to ", kPatchifyMaxSide, ", got [", height,
             ", ", width, "]");
  KEYE_CHECK(frames.stride(3) == 1 && (width == 1 || frames.stride(2) == 3), kOp,
             ": frames must have packed pixels (strides 3 and 1), got strides ", frames.stride(2),
             " and ", frames.stride(3));
}

void check_side(const char* name, int64_t side, int64_t patch_size) {
  const bool good = side >= 1 && side <= kPatchifyMaxSide && side % patch_size == 0;
  KEYE_CHECK(good, kOp, ": ", name, " must be a multiple of ", patch_size, " up to ",
             kPatchifyMaxSide, ", got ", side);
}

}  // namespace

PatchifyBackend& patchify_backend(PatchifyDevice device) {
  static PatchifyBackend backends[2] = {};
  return backends[static_cast<int>(device)];
}

Tensor patchify(const Tensor& frames, int64_t height, int64_t width, int64_t patch_size,
                bool bicubic, int64_t arithmetic, bool vertical_first) {
  check_frames(frames);
  KEYE_CHECK(patch_size >= 1 && patch_size <= kPatchifyMaxPatch, kOp,
             ": patch_size must be from 1 to ", kPatchifyMaxPatch, ", got ", patch_size);
  check_side("height", height, patch_size);
  check_side("width", width, patch_size);
  KEYE_CHECK(arithmetic >= 0 && arithmetic <= 2, kOp,
             ": arithmetic must be 0 (pillow), 1 (uint8) or 2 (float32), got ", arithmetic);
  KEYE_CHECK(arithmetic == 0 || !vertical_first, kOp,
             ": vertical_first must be False but for pillow, got True");

  const auto kind = static_cast<PatchifyArithmetic>(arithmetic);
  const int64_t num_frames = frames.size(0);
  const int64_t rows = num_frames * (height / patch_size) * (width / patch_size);
  Tensor out = new_empty_like(frames, {rows, 3, patch_size, patch_size});
  if (rows == 0) return out;
  PatchifyParams params{};
  params.frames = frames.const_data_ptr<uint8_t>();
  params.out = out.mutable_data_ptr<uint8_t>();
  params.stride_frame = stride_of(frames, 0);
  params.stride_row = stride_of(frames, 1);
  params.num_frames = num_frames;
  params.across = axis_of(frames.size(2), width, bicubic, kind);
  params.down = axis_of(frames.size(1), height, bicubic, kind);
  params.patch_size = static_cast<int>(patch_size);
  params.is_float = kind == PatchifyArithmetic::kFloat32;
  params.vertical_first = vertical_first;
  const PatchifyDevice device = frames.is_cpu() ? PatchifyDevice::kCpu : PatchifyDevice::kCuda;
  patchify_backend(device).forward(params, frames.get_device_index());
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(keye_ops, m) {
  m.def(
      "patchify(Tensor frames, SymInt height, SymInt width, int patch_size=14, "
      "bool bicubic=True, int arithmetic=0, bool vertical_first=False) -> Tensor");
}

}  // namespace keye_ops
