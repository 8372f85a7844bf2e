// rope: what a kernel is told, and the formulas, once for host and device.
#pragma once

#include <cstdint>

#include "common/error_word.h"
#include "common/host_device.h"
#include "common/rms_norm.h"

namespace keye_ops {

constexpr int kRopeMaxHeadDim = 256;
constexpr int kRopeMaxAxes = 4;
constexpr int64_t kRopeMaxPosition = int64_t{1} << 24;  // positions below it are exact in fp32

// One of q and k. Strides are in elements; head_dim has stride 1.
struct RopeTensor {
  const void* x;            // [total, num_heads, head_dim], input
  void* out;                // [total, num_heads, head_dim], output; dx in the backward; may be x
  const void* dout;         // [total, num_heads, head_dim], backward only
  const void* norm_weight;  // [head_dim], or null for no norm
  void* dweight_partial;    // [num_partials, head_dim], backward only
  int64_t x_stride_token, x_stride_head;
  int64_t out_stride_token, out_stride_head;
  int64_t dout_stride_token, dout_stride_head;
  int num_heads;
};

struct RopeParams {
  RopeTensor q, k;
  const void* position_ids;  // [num_axes, total], int32 or int64
  const float* inv_freq;     // [head_dim / 2], radians a position
  const int32_t* axis;       // [head_dim / 2], row of position_ids that turns the pair
  ErrorWord* error_word;     // of the device, for values out of range; unused on the host
  int64_t position_stride_axis, position_stride_token;
  int64_t total;
  int num_axes;
  int head_dim;
  int num_partials;  // rows of dweight_partial
  double norm_eps;
  bool position_is_int64;
  bool interleaved;  // pairs (2j, 2j + 1) instead of (j, j + head_dim / 2)
  bool inverse;      // rotate by the negated angle
};

// One value of a rotated pair: the sine is negated for the first of the two.
template <class V>
KEYE_HOST_DEVICE V rotated(V x, V partner, V cos, V signed_sin) {
  return x * cos + partner * signed_sin;
}

// Rotate the pair (a, b) by the angle whose cosine and sine are given.
template <class V>
KEYE_HOST_DEVICE void rotate_pair(V& a, V& b, V cos, V sin) {
  const V first = rotated(a, b, cos, -sin);
  b = rotated(b, a, cos, sin);
  a = first;
}

// The position of a token on one axis.
KEYE_HOST_DEVICE int64_t rope_position(const RopeParams& params, int axis, int64_t token) {
  const int64_t offset = axis * params.position_stride_axis + token * params.position_stride_token;
  return params.position_is_int64 ? static_cast<const int64_t*>(params.position_ids)[offset]
                                  : static_cast<const int32_t*>(params.position_ids)[offset];
}

}  // namespace keye_ops
