// rope on CUDA: one launch for q and k. A lane owns 16 bytes of a row (token, head); the partners
// of its values come from other lanes by shuffles. Its cosines and sines stay in registers while
// the warp goes through the heads of a token.
#pragma once

#include "common/error_word.cuh"
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

// What a lane owns, the same in every row. Of its kVec angles it computes half, those of its lower
// or its upper values; the others are those of the partners of the upper half.
template <int kVec>
struct RopeLane {
  int group, num_groups;        // which of the rows that a warp holds; lanes past them idle
  int chunk, num_chunks;        // which 16 bytes of the row
  int low_source, high_source;  // lanes with the partners of the lower and the upper half
  bool crossed;                 // those partners are the other half of their lane's values
  bool computes_upper;          // which half of the angles is computed here
  float inv_freq[kVec / 2];     // radians a position, negated for the first of a pair
  int axis[kVec / 2];           // which position
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
  lane.crossed = lane.num_chunks % 2 != 0;
  const int first = lane.group * lane.num_chunks;
  const int low = lane.chunk + lane.num_chunks / 2, high = low + (lane.crossed ? 1 : 0);
  lane.low_source = first + (low < lane.num_chunks ? low : low - lane.num_chunks);
  lane.high_source = first + (high < lane.num_chunks ? high : high - lane.num_chunks);
  lane.computes_upper = !lane.crossed && lane.chunk >= lane.num_chunks / 2;

#pragma unroll
  for (int i = 0; i < kVec / 2; i++) {
    // Interleaved pairs lie within the lane: the angle of one is that of both.
    const int d = lane.chunk * kVec + (lane.computes_upper ? kVec / 2 : 0) + i;
    const int pair = params.interleaved ? lane.chunk * kVec / 2 + i : d < pairs ? d : d - pairs;
    const bool is_first = params.interleaved || d < pairs;
    // NOTE: the table is the caller's; a bad row must not become a bad address, nor a bad frequency
    // an angle that sincos does not take.
    const float wanted_freq = params.inv_freq[pair];
    const float inv_freq = fminf(fmaxf(wanted_freq, 0.0f), 1.0f);
    if (inv_freq != wanted_freq) {
      report_error(params.error_word, DeviceError::kRopeInvFreq, wanted_freq);
    }
    lane.inv_freq[i] = is_first != params.inverse ? -inv_freq : inv_freq;
    const int wanted_axis = params.axis[pair];
    lane.axis[i] = min(max(wanted_axis, 0), params.num_axes - 1);
    if (lane.axis[i] != wanted_axis) {
      report_error(params.error_word, DeviceError::kRopeAxis, wanted_axis);
    }
  }
  return lane;
}

// Cosines and signed sines of a token.
template <int kVec>
KEYE_DEVICE void token_angles(const RopeParams& params, const RopeLane<kVec>& lane, int64_t token,
                              float (&cos)[kVec], float (&sin)[kVec]) {
  constexpr int kHalf = kVec / 2;
  // Every lane loads one axis; a shuffle picks the one that a pair needs.
  const int my_axis = min(thread_idx() % kWarpSize, params.num_axes - 1);
  const int64_t value = rope_position(params, my_axis, token);
  const int64_t safe = min(max(value, int64_t{0}), kRopeMaxPosition - 1);
  if (safe != value) {
    report_error(params.error_word, DeviceError::kRopePositions, static_cast<double>(value));
  }
  const auto position = static_cast<float>(safe);
  float my_cos[kHalf], my_sin[kHalf];
#pragma unroll
  for (int i = 0; i < kHalf; i++) {
    sincos(shuffle(position, lane.axis[i]) * lane.inv_freq[i], my_sin[i], my_cos[i]);
  }
  if (params.interleaved) {
#pragma unroll
    for (int i = 0; i < kVec; i++) {
      cos[i] = my_cos[i / 2];
      sin[i] = i % 2 == 0 ? my_sin[i / 2] : -my_sin[i / 2];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kHalf; i++) {
    const float other_cos = shuffle(my_cos[i], lane.high_source);
    const float other_sin = -shuffle(my_sin[i], lane.high_source);
    cos[i] = lane.computes_upper ? other_cos : my_cos[i];
    sin[i] = lane.computes_upper ? other_sin : my_sin[i];
    cos[i + kHalf] = lane.computes_upper ? my_cos[i] : other_cos;
    sin[i + kHalf] = lane.computes_upper ? my_sin[i] : other_sin;
  }
}

// Values of the other halves of the pairs, of kLength = kVec floats or of the chunks in memory.
template <int kVec, class V, int kLength>
KEYE_DEVICE void partners(const RopeLane<kVec>& lane, const V (&x)[kLength],
                          V (&partner)[kLength]) {
  constexpr int kHalf = kLength / 2;
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
  if (interleaved) {
#pragma unroll
    for (int i = 0; i < kVec; i++) partner[i] = x[i ^ 1];
  } else {
    partners(lane, x, partner);
  }
#pragma unroll
  for (int i = 0; i < kVec; i++) x[i] = rotated(x[i], partner[i], cos[i], sin[i]);
}

// Rotates a row as it lies in memory: half as many shuffles in 16 bits.
template <class T, int kVec>
KEYE_DEVICE void rotate_chunk(const RopeLane<kVec>& lane, bool interleaved,
                              const float (&cos)[kVec], const float (&sin)[kVec],
                              const Chunk& chunk, float (&x)[kVec]) {
  Chunk other;
  if (interleaved) {
    other = swap_adjacent<T>(chunk);
  } else {
    partners(lane, chunk.values, other.values);
  }
  float partner[kVec];
  unpack<T>(chunk, x);
  unpack<T>(other, partner);
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

// Rows [first, last) of one token of q or k.
template <class T, RopeMode kMode, int kVec>
KEYE_DEVICE void token_rows(const RopeParams& params, const RopeTensor& tensor,
                            const RopeLane<kVec>& lane, int64_t token, int first, int last,
                            const float (&cos)[kVec], const float (&sin)[kVec],
                            float (&dweight)[kVec]) {
  constexpr bool kBackward = kMode == RopeMode::kNormBackward;
  constexpr bool kNorm = kMode != RopeMode::kRotate;
  // NOTE: all loads of a step come before its stores, so that several rows are on their way from
  // memory at once; the compiler may not move a load over a store by itself.
  constexpr int kRows = kBackward ? 1 : 4;
  const int d = lane.chunk * kVec;
  int head = lane.group < lane.num_groups ? first + lane.group : last;  // idle lanes past the end
  const T* x_row = static_cast<const T*>(tensor.x) + token * tensor.x_stride_token +
                   head * tensor.x_stride_head + d;
  T* out_row = static_cast<T*>(tensor.out) + token * tensor.out_stride_token +
               head * tensor.out_stride_head + d;
  const int64_t x_step = lane.num_groups * tensor.x_stride_head;
  const int64_t out_step = lane.num_groups * tensor.out_stride_head;

  for (int base = first; base < last; base += kRows * lane.num_groups) {
    Chunk chunks[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (head + r * lane.num_groups < last) chunks[r] = load_bytes<Chunk>(x_row);
      x_row += x_step;
    }
    // NOTE: the weight stays in L1; registers are better spent on rows.
    float weight[kVec];
    if constexpr (kNorm) load_vector(static_cast<const T*>(tensor.norm_weight) + d, weight);

#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (base + r * lane.num_groups >= last) break;
      const bool active = head < last;

      float x[kVec];
      if constexpr (kMode == RopeMode::kRotate) {
        rotate_chunk<T>(lane, params.interleaved, cos, sin, chunks[r], x);
      } else {
        unpack<T>(chunks[r], x);
      }
      if constexpr (kMode == RopeMode::kNormRotate) {
        const float rstd = row_rstd(params, lane, x);
#pragma unroll
        for (int i = 0; i < kVec; i++) x[i] = x[i] * rstd * weight[i];
        rotate(lane, params.interleaved, cos, sin, x);
      }
      if constexpr (kBackward) {
        // Rotate the incoming gradient back, then go through the norm.
        Chunk dout = {};
        if (active) {
          dout = load_bytes<Chunk>(static_cast<const T*>(tensor.dout) +
                                   token * tensor.dout_stride_token +
                                   head * tensor.dout_stride_head + d);
        }
        float dy[kVec];
        rotate_chunk<T>(lane, params.interleaved, cos, sin, dout, dy);
        const float rstd = row_rstd(params, lane, x);
        float products = 0.0f;
#pragma unroll
        for (int i = 0; i < kVec; i++) {
          x[i] *= rstd;
          dweight[i] += active ? dy[i] * x[i] : 0.0f;
          dy[i] *= weight[i];
          products += dy[i] * x[i];
        }
        const float correlation = row_sum(lane, products) / static_cast<float>(params.head_dim);
#pragma unroll
        for (int i = 0; i < kVec; i++) x[i] = rms_norm_dx(dy[i], x[i], rstd, correlation);
      }
      if (active) store_vector(out_row, x);
      head += lane.num_groups;
      out_row += out_step;
    }
  }
}

template <class T, RopeMode kMode>
KEYE_KERNEL(kRopeThreads, 2)
rope_kernel(KEYE_PARAMS RopeKernelParams kernel_params) {
  constexpr int kVec = kVectorSize<T>;
  constexpr bool kBackward = kMode == RopeMode::kNormBackward;
  const RopeParams& params = kernel_params.rope;
  const int warps_per_block = block_size() / kWarpSize;
  const int64_t warp_idx = block_idx() * warps_per_block + warp_in_block();
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

    const int num_heads = params.q.num_heads;
    token_rows<T, kMode>(params, params.q, lane, token, min(first, num_heads), min(last, num_heads),
                         cos, sin, q_dweight);
    token_rows<T, kMode>(params, params.k, lane, token, max(first - num_heads, 0),
                         max(last - num_heads, 0), cos, sin, k_dweight);
  }

  if constexpr (kBackward) {
    store_dweight(params.q, lane, params.head_dim, warp_idx, q_dweight);
    store_dweight(params.k, lane, params.head_dim, warp_idx, k_dweight);
  }
}

}  // namespace keye_ops
