// rope on the CPU: rows of head_dim values, in registers as wide as the instruction set has.
#include <cmath>
#include <type_traits>

#include "common/simd.h"
#include "common/sincos.h"
#include "rope/rope_cpu.h"

namespace keye_ops::KEYE_ISA {
namespace {

constexpr int kMaxPairs = kRopeMaxHeadDim / 2;

// cos and sin of the pairs of one token.
template <class C>
struct Angles {
  alignas(64) C cos[kMaxPairs];
  alignas(64) C sin[kMaxPairs];
};

KEYE_HOST_DEVICE void sincos_array(Angles<double>& angles, int pairs) {
  for (int j = 0; j < pairs; j++) sincos(angles.cos[j], angles.sin[j], angles.cos[j]);
}

// The arrays are padded to whole vectors.
KEYE_HOST_DEVICE void sincos_array(Angles<float>& angles, int pairs) {
  for (int j = 0; j < pairs; j += kSimdWidth) {
    Floats sin, cos;
    sincos(load_vector(angles.cos + j), sin, cos);
    store_vector(angles.sin + j, sin);
    store_vector(angles.cos + j, cos);
  }
}

template <class C>
KEYE_HOST_DEVICE void compute_angles(const RopeParams& params, int64_t token, Angles<C>& angles) {
  const int pairs = params.head_dim / 2;
  C position[kRopeMaxAxes];
  for (int axis = 0; axis < params.num_axes; axis++) {
    position[axis] = static_cast<C>(rope_position(params, axis, token));
  }
  for (int j = 0; j < pairs; j++) {
    angles.cos[j] = position[params.axis[j]] * static_cast<C>(params.inv_freq[j]);
  }
  sincos_array(angles, pairs);
  if (params.inverse) {
    for (int j = 0; j < pairs; j++) angles.sin[j] = -angles.sin[j];
  }
}

template <class T, class C>
KEYE_HOST_DEVICE void load_row(const T* x, C* row, int head_dim) {
  int d = 0;
  if constexpr (std::is_same_v<C, float>) {
    for (; d + kSimdWidth <= head_dim; d += kSimdWidth) store_vector(row + d, load_vector(x + d));
  }
  for (; d < head_dim; d++) row[d] = load(x + d);
}

template <class T, class C>
KEYE_HOST_DEVICE void store_row(T* out, const C* row, int head_dim) {
  int d = 0;
  if constexpr (std::is_same_v<C, float>) {
    for (; d + kSimdWidth <= head_dim; d += kSimdWidth) store_vector(out + d, load_vector(row + d));
  }
  for (; d < head_dim; d++) store(out + d, row[d]);
}

template <class T>
KEYE_HOST_DEVICE Compute<T> sum_of_squares(const T* x, int head_dim) {
  Compute<T> sum = 0;
  int d = 0;
  if constexpr (!std::is_same_v<T, double>) {
    Floats sums = {};
    for (; d + kSimdWidth <= head_dim; d += kSimdWidth) {
      const Floats values = load_vector(x + d);
      sums += values * values;
    }
    sum = sum_of(sums);
  }
  for (; d < head_dim; d++) sum += load(x + d) * load(x + d);
  return sum;
}

template <class C>
KEYE_HOST_DEVICE void rotate_row(C* row, const Angles<C>& angles, int pairs, bool interleaved) {
  const int step = interleaved ? 2 : 1, partner = interleaved ? 1 : pairs;
  int j = 0;
  if constexpr (std::is_same_v<C, float>) {
    for (; !interleaved && j + kSimdWidth <= pairs; j += kSimdWidth) {
      Floats a = load_vector(row + j), b = load_vector(row + j + pairs);
      rotate_pair(a, b, load_vector(angles.cos + j), load_vector(angles.sin + j));
      store_vector(row + j, a);
      store_vector(row + j + pairs, b);
    }
  }
  for (; j < pairs; j++) {
    rotate_pair(row[j * step], row[j * step + partner], angles.cos[j], angles.sin[j]);
  }
}

template <class T>
KEYE_HOST_DEVICE void store_rotated(T* out, Floats x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    store_vector_from_16_bits(out, x);
  } else {
    store_vector(out, x);
  }
}

// A vector of a row, times rstd and weight where there is a norm.
template <bool kNorm, class T>
KEYE_HOST_DEVICE Floats load_normed(const T* x, int d, const float* weight, float rstd) {
  if constexpr (!kNorm) return load_vector(x + d);
  return load_vector(x + d) * rstd * load_vector(weight + d);
}

// The Keye path: pairs (j, j + pairs), at least one vector of them. The last vector may overlap the
// one before, so it is loaded before anything is stored: out may be x.
template <bool kNorm, class T>
KEYE_HOST_DEVICE void rotate_half_row(const T* x, T* out, const Angles<float>& angles, int pairs,
                                      const float* weight, float rstd) {
  const int last = pairs - kSimdWidth;
  Floats last_a = load_normed<kNorm>(x, last, weight, rstd);
  Floats last_b = load_normed<kNorm>(x, last + pairs, weight, rstd);
  for (int j = 0; j < last; j += kSimdWidth) {
    Floats a = load_normed<kNorm>(x, j, weight, rstd);
    Floats b = load_normed<kNorm>(x, j + pairs, weight, rstd);
    rotate_pair(a, b, load_vector(angles.cos + j), load_vector(angles.sin + j));
    store_rotated(out + j, a);
    store_rotated(out + j + pairs, b);
  }
  rotate_pair(last_a, last_b, load_vector(angles.cos + last), load_vector(angles.sin + last));
  store_rotated(out + last, last_a);
  store_rotated(out + last + pairs, last_b);
}

template <bool kNorm, class T, class C>
KEYE_HOST_DEVICE void forward_row(const RopeParams& params, const T* x, T* out, const C* weight,
                                  C rstd, const Angles<C>& angles) {
  const int head_dim = params.head_dim, pairs = head_dim / 2;
  if constexpr (std::is_same_v<C, float>) {
    if (!params.interleaved && pairs >= kSimdWidth) {
      rotate_half_row<kNorm>(x, out, angles, pairs, weight, rstd);
      return;
    }
  }
  alignas(64) C row[kRopeMaxHeadDim];
  load_row(x, row, head_dim);
  if constexpr (kNorm) {
    for (int d = 0; d < head_dim; d++) row[d] = row[d] * rstd * weight[d];
  }
  rotate_row(row, angles, pairs, params.interleaved);
  store_row(out, row, head_dim);
}

constexpr int kHeadsAtOnce = 16;

// All heads of one token of q or of k. Their roots and divisions are taken together: alone, each
// would wait for the one before.
template <bool kNorm, class T, class C>
KEYE_HOST_DEVICE void forward_heads(const RopeParams& params, const RopeTensor& tensor,
                                    int64_t token, const C* weight, const Angles<C>& angles) {
  const T* x = static_cast<const T*>(tensor.x) + token * tensor.x_stride_token;
  T* out = static_cast<T*>(tensor.out) + token * tensor.out_stride_token;
  const C eps = static_cast<C>(params.norm_eps), size = static_cast<C>(params.head_dim);
  C rstd[kHeadsAtOnce] = {};
  for (int first = 0; first < tensor.num_heads; first += kHeadsAtOnce) {
    const int rest = tensor.num_heads - first;
    const int count = rest < kHeadsAtOnce ? rest : kHeadsAtOnce;
    if constexpr (kNorm) {
      for (int i = 0; i < count; i++) {
        rstd[i] = sum_of_squares(x + (first + i) * tensor.x_stride_head, params.head_dim);
      }
      for (int i = 0; i < kHeadsAtOnce; i++) rstd[i] = 1 / std::sqrt(rstd[i] / size + eps);
    }
    for (int i = 0; i < count; i++) {
      // The hardware loses its stream at the gaps of a packed qkv.
      const T* next = x + tensor.x_stride_token + (first + i) * tensor.x_stride_head;
      for (int d = 0; d < params.head_dim; d += 64 / static_cast<int>(sizeof(T))) {
        __builtin_prefetch(next + d, 1);
      }
      forward_row<kNorm>(params, x + (first + i) * tensor.x_stride_head,
                         out + (first + i) * tensor.out_stride_head, weight, rstd[i], angles);
    }
  }
}

// The norm's weight in the compute type, or null.
template <class T, class C>
KEYE_HOST_DEVICE const C* load_weight(const RopeTensor& tensor, C* buffer, int head_dim) {
  if (tensor.norm_weight == nullptr) return nullptr;
  load_row(static_cast<const T*>(tensor.norm_weight), buffer, head_dim);
  return buffer;
}

template <class T>
void forward_tokens(const RopeParams& params, int64_t begin, int64_t end) {
  using C = Compute<T>;
  Angles<C> angles;
  C buffers[2][kRopeMaxHeadDim];
  const RopeTensor* tensors[] = {&params.q, &params.k};
  const C* weights[] = {load_weight<T>(params.q, buffers[0], params.head_dim),
                        load_weight<T>(params.k, buffers[1], params.head_dim)};
  for (int64_t token = begin; token < end; token++) {
    compute_angles(params, token, angles);
    for (int i = 0; i < 2; i++) {
      if (weights[i] == nullptr) {
        forward_heads<false, T>(params, *tensors[i], token, weights[i], angles);
      } else {
        forward_heads<true, T>(params, *tensors[i], token, weights[i], angles);
      }
    }
  }
}

// dx of one row, and the row's share of the weight's gradient added to dweight. The norm's part is
// in double: dx is a difference of nearly equal numbers where a row points along its gradient.
template <class T, class C>
KEYE_HOST_DEVICE void backward_row(const RopeParams& params, const T* x, const T* dout, T* dx,
                                   const C* weight, const Angles<C>& angles, double* dweight) {
  const int head_dim = params.head_dim;
  alignas(64) C row[kRopeMaxHeadDim];
  alignas(64) C dy[kRopeMaxHeadDim];
  load_row(x, row, head_dim);
  load_row(dout, dy, head_dim);
  rotate_row(dy, angles, head_dim / 2, params.interleaved);

  double squares = 0;
  for (int d = 0; d < head_dim; d++) squares += static_cast<double>(row[d]) * row[d];
  const double rstd = 1 / std::sqrt(squares / head_dim + params.norm_eps);
  double correlation = 0;
  for (int d = 0; d < head_dim; d++) {
    const double normed = row[d] * rstd;
    dweight[d] += dy[d] * normed;
    correlation += static_cast<double>(dy[d]) * weight[d] * normed;
  }
  correlation /= head_dim;
  for (int d = 0; d < head_dim; d++) {
    const double weighted = static_cast<double>(dy[d]) * weight[d];
    dy[d] = static_cast<C>(rms_norm_dx(weighted, row[d] * rstd, rstd, correlation));
  }
  store_row(dx, dy, head_dim);
}

template <class T>
void backward_partials(const RopeParams& params, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int head_dim = params.head_dim;
  Angles<C> angles;
  C buffers[2][kRopeMaxHeadDim];
  const RopeTensor* tensors[] = {&params.q, &params.k};
  const C* weights[] = {load_weight<T>(params.q, buffers[0], head_dim),
                        load_weight<T>(params.k, buffers[1], head_dim)};
  for (int64_t partial = begin; partial < end; partial++) {
    double sums[2][kRopeMaxHeadDim] = {};
    const int64_t first = partial * kRopeTokensPerPartial;
    const int64_t last =
        first + kRopeTokensPerPartial < params.total ? first + kRopeTokensPerPartial : params.total;
    for (int64_t token = first; token < last; token++) {
      compute_angles(params, token, angles);
      for (int i = 0; i < 2; i++) {
        const RopeTensor& tensor = *tensors[i];
        const T* x = static_cast<const T*>(tensor.x) + token * tensor.x_stride_token;
        const T* dout = static_cast<const T*>(tensor.dout) + token * tensor.dout_stride_token;
        T* dx = static_cast<T*>(tensor.out) + token * tensor.out_stride_token;
        for (int head = 0; head < tensor.num_heads; head++) {
          backward_row(params, x + head * tensor.x_stride_head,
                       dout + head * tensor.dout_stride_head, dx + head * tensor.out_stride_head,
                       weights[i], angles, sums[i]);
        }
      }
    }
    for (int i = 0; i < 2; i++) {
      double* row = static_cast<double*>(tensors[i]->dweight_partial) + partial * head_dim;
      for (int d = 0; d < head_dim; d++) row[d] = sums[i][d];
    }
  }
}

}  // namespace

void rope_forward_tokens(const RopeParams& params, Dtype dtype, int64_t begin, int64_t end) {
  with_type_of(dtype, [&](auto type) { forward_tokens<decltype(type)>(params, begin, end); });
}

void rope_backward_partials(const RopeParams& params, Dtype dtype, int64_t begin, int64_t end) {
  with_type_of(dtype, [&](auto type) { backward_partials<decltype(type)>(params, begin, end); });
}

}  // namespace keye_ops::KEYE_ISA
