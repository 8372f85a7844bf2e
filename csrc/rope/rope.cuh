// rope on CUDA: one launch for q and k. A lane owns 16 bytes of a row (token, head); the partners
// of its values come from other lanes by shuffles. Its cosines and sines stay in registers while
// the warp goes through the heads of a token.
#pragma once

#include "common/sincos.h"
#include "common/vec.cuh"
#include "rope/rope.h"

namespace keye_ops {

enum class RopeMode { kRotate, kNormRotate, kNormBackward };

struct RopeKernelParams {
  RopeParams rope;
  int rows_per_item;    // rows of a token that a warp takes at a time
  int items_per_token;  // ceil(rows / rows_per_item)
};

constexpr int kRopeThreads = 128;

// What a lane owns, the same in every row.
template <int kVec>
struct RopeLane {
  int group, num_groups;        // which of the rows that a warp holds; lanes past them idle
  int chunk, num_chunks;        // which 16 bytes of the row
  int low_source, high_source;  // lanes with the partners of the lower and the upper half
  bool crossed;                 // those partners are the other half of their lane's values
  float inv_freq[kVec];         // radians a position
  int axis[kVec];               // which position
  float sign[kVec];             // of the sine: -1 for the first of a pair
};

template <int kVec>
KEYE_DEVICE RopeLane<kVec> make_lane(const RopeParams& params, int lane_idx) {
  const int pairs = params.head_dim / 2;
  RopeLane<kVec> lane;
  lane.num_chunks = params.head_dim / kVec;
  lane.num_groups = kWarpSize / lane.num_chunks;
  lane.group = lane_idx / lane.num_chunks;
  lane.chunk = lane_idx % lane.num_chunks;

  // Half a head is a whole number of chunks, or (head_dim 72 in 16 bits) half a chunk more.
  const int shift = pairs / kVec;
  lane.crossed = pairs % kVec != 0;
  const int first = lane.group * lane.num_chunks;
  lane.low_source = first + (lane.chunk + shift) % lane.num_chunks;
  lane.high_source = first + (lane.chunk + shift + (lane.crossed ? 1 : 0)) % lane.num_chunks;

#pragma unroll
  for (int i = 0; i < kVec; i++) {
    const int d = lane.chunk * kVec + i;
    const int pair = params.interleaved ? d / 2 : d % pairs;
    const bool is_first = params.interleaved ? d % 2 == 0 : d < pairs;
    lane.inv_freq[i] = params.inv_freq[pair];
    // NOTE: the table is the caller's; a bad row must not become a bad address.
    lane.axis[i] = min(max(params.axis[pair], 0), params.num_axes - 1);
    lane.sign[i] = is_first != params.inverse ? -1.0f : 1.0f;
  }
  return lane;
}

// Cosines and signed sines of a token.
template <int kVec>
KEYE_DEVICE void token_angles(const RopeParams& params, const RopeLane<kVec>& lane, int64_t token,
                              float (&cos)[kVec], float (&sin)[kVec]) {
  // Every lane loads one axis; a shuffle picks the one that a pair needs.
  const int my_axis = min(thread_idx() % kWarpSize, params.num_axes - 1);
  const int64_t value = rope_position(params, my_axis, token);
  const auto position = static_cast<float>(min(max(value, int64_t{0}), kRopeMaxPosition - 1));
#pragma unroll
  for (int i = 0; i < kVec; i++) {
    const float mine = shuffle(position, lane.axis[i]);
    float sine;
    sincos(mine * lane.inv_freq[i], sine, cos[i]);
    sin[i] = lane.sign[i] * sine;
  }
}

// Values of the other halves of the pairs.
template <int kVec>
KEYE_DEVICE void partners(const RopeLane<kVec>& lane, bool interleaved, const float (&x)[kVec],
                          float (&partner)[kVec]) {
  constexpr int kHalf = kVec / 2;
  if (interleaved) {
#pragma unroll
    for (int i = 0; i < kVec; i++) partner[i] = x[i ^ 1];
    return;
  }
#pragma unroll
  for (int i = 0; i < kHalf; i++) {
    partner[i] = shuffle(lane.crossed ? x[i + kHalf] : x[i], lane.low_source);
    partner[i + kHalf] = shuffle(lane.crossed ? x[i] : x[i + kHalf], lane.high_source);
  }
}

template <int kVec>
KEYE_DEVICE void rotate(const RopeLane<kVec>& lane, bool interleaved, const float (&cos)[kVec],
                        const float (&sin)[kVec], float (&x)[kVec]) {
  float partner[kVec];
  partners(lane, interleaved, x, partner);
#pragma unroll
  for (int i = 0; i < kVec; i++) x[i] = rotated(x[i], partner[i], cos[i], sin[i]);
}

// Sum over the lanes of a row; the same bits in all of them.
template <int kVec>
KEYE_DEVICE float row_sum(const RopeLane<kVec>& lane, float value) {
  if ((lane.num_chunks & (lane.num_chunks - 1)) == 0) {
    for (int mask = lane.num_chunks / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
  }
  float sum = 0.0f;
  for (int chunk = 0; chunk < lane.num_chunks; chunk++) {
    sum += shuffle(value, lane.group * lane.num_chunks + chunk);
  }
  return sum;
}

template <int kVec>
KEYE_DEVICE float row_rstd(const RopeParams& params, const RopeLane<kVec>& lane,
                           const float (&x)[kVec]) {
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kVec; i++) squares += x[i] * x[i];
  return rsqrt_of(row_sum(lane, squares) / static_cast<float>(params.head_dim) +
                  static_cast<float>(params.norm_eps));
}

// One lane's part of the norm weight's gradient: rows of the warp are added in order of their
// group.
template <int kVec>
KEYE_DEVICE void store_dweight(const RopeTensor& tensor, const RopeLane<kVec>& lane, int head_dim,
                               int64_t partial, const float (&dweight)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; i++) {
    float sum = 0.0f;
    for (int group = 0; group < lane.num_groups; group++) {
      sum += shuffle(dweight[i], group * lane.num_chunks + lane.chunk);
    }
    if (lane.group == 0) {
      static_cast<float*>(tensor.dweight_partial)[partial * head_dim + lane.chunk * kVec + i] = sum;
    }
  }
}

template <class T, RopeMode kMode>
KEYE_KERNEL __launch_bounds__(kRopeThreads, 2)
    rope_kernel(KEYE_PARAMS RopeKernelParams kernel_params) {
  constexpr int kVec = kVectorSize<T>;
  constexpr bool kBackward = kMode == RopeMode::kNormBackward;
  constexpr bool kNorm = kMode != RopeMode::kRotate;
  const RopeParams& params = kernel_params.rope;
  const int warps_per_block = block_size() / kWarpSize;
  const int64_t warp_idx = block_idx() * warps_per_block + thread_idx() / kWarpSize;
  const int64_t num_warps = grid_size() * warps_per_block;
  const RopeLane<kVec> lane = make_lane<kVec>(params, thread_idx() % kWarpSize);
  const int rows_per_token = params.q.num_heads + params.k.num_heads;

  float q_dweight[kVec] = {}, k_dweight[kVec] = {};

  const int64_t num_items = params.total * kernel_params.items_per_token;
  for (int64_t item = warp_idx; item < num_items; item += num_warps) {
    const int64_t token = item / kernel_params.items_per_token;
    const int first =
        static_cast<int>(item % kernel_params.items_per_token) * kernel_params.rows_per_item;
    const int last = min(first + kernel_params.rows_per_item, rows_per_token);

    float cos[kVec], sin[kVec];
    token_angles(params, lane, token, cos, sin);

    // NOTE: unrolled so that several rows are on their way from memory at once.
#pragma unroll(kBackward ? 1 : 4)
    for (int base = first; base < last; base += lane.num_groups) {
      const int row = base + lane.group;
      const bool active = lane.group < lane.num_groups && row < last;
      const bool is_q = row < params.q.num_heads;
      const RopeTensor& tensor = is_q ? params.q : params.k;
      const int head = is_q ? row : row - params.q.num_heads;
      const int64_t x_offset = token * tensor.x_stride_token + head * tensor.x_stride_head;

      float x[kVec] = {};
      if (active) {
        load_vector(static_cast<const T*>(tensor.x) + x_offset + lane.chunk * kVec, x);
      }

      // NOTE: the weight stays in L1; registers are better spent on rows.
      float weight[kVec];
      if constexpr (kNorm) {
        load_vector(static_cast<const T*>(tensor.norm_weight) + lane.chunk * kVec, weight);
      }
      if constexpr (kMode == RopeMode::kNormRotate) {
        const float rstd = row_rstd(params, lane, x);
#pragma unroll
        for (int i = 0; i < kVec; i++) x[i] = x[i] * rstd * weight[i];
      }
      if constexpr (!kBackward) rotate(lane, params.interleaved, cos, sin, x);

      if constexpr (kBackward) {
        // Rotate the incoming gradient back, then go through the norm.
        float dy[kVec] = {};
        if (active) {
          const int64_t offset = token * tensor.dout_stride_token + head * tensor.dout_stride_head;
          load_vector(static_cast<const T*>(tensor.dout) + offset + lane.chunk * kVec, dy);
        }
        rotate(lane, params.interleaved, cos, sin, dy);
        const float rstd = row_rstd(params, lane, x);
        float products = 0.0f;
#pragma unroll
        for (int i = 0; i < kVec; i++) {
          x[i] *= rstd;
          q_dweight[i] += is_q && active ? dy[i] * x[i] : 0.0f;
          k_dweight[i] += !is_q && active ? dy[i] * x[i] : 0.0f;
          dy[i] *= weight[i];
          products += dy[i] * x[i];
        }
        const float correlation = row_sum(lane, products) / static_cast<float>(params.head_dim);
#pragma unroll
        for (int i = 0; i < kVec; i++) x[i] = rms_norm_dx(dy[i], x[i], rstd, correlation);
      }

      if (active) {
        const int64_t offset = token * tensor.out_stride_token + head * tensor.out_stride_head;
        store_vector(static_cast<T*>(tensor.out) + offset + lane.chunk * kVec, x);
      }
    }
  }

  if constexpr (kBackward) {
    store_dweight(params.q, lane, params.head_dim, warp_idx, q_dweight);
    store_dweight(params.k, lane, params.head_dim, warp_idx, k_dweight);
  }
}

}  // namespace keye_ops
