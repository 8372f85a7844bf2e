// varlen_attention on CUDA: what its launchers have in common; for a GPU and for the host executor.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/launch.cuh"
#include "varlen_attention/varlen_attention.h"

namespace keye_ops {

// ---- what every kernel asks of its tensors ----

inline bool is_attention_head_dim(int head_dim) {
  return head_dim == 64 || head_dim == 72 || head_dim == 80 || head_dim == 96 || head_dim == 128;
}

// Calls f with a value of the C++ type of a dtype that attention takes.
template <class F>
void with_attention_type_of(Dtype dtype, const F& f) {
  KEYE_CHECK(dtype == Dtype::kHalf || dtype == Dtype::kBFloat16,
             "varlen_attention: dtype on CUDA must be fp16 or bf16, got ",
             dtype == Dtype::kFloat ? "torch.float32" : "torch.float64");
  if (dtype == Dtype::kHalf) return f(Half{});
  f(BFloat16{});
}

// Calls f with a head_dim that is known to the compiler.
template <int kValue>
struct AttentionHeadDim {
  static constexpr int value = kValue;
};
template <class F>
void with_attention_head_dim(int head_dim, const F& f) {
  switch (head_dim) {
    case 64:
      return f(AttentionHeadDim<64>{});
    case 72:
      return f(AttentionHeadDim<72>{});
    case 80:
      return f(AttentionHeadDim<80>{});
    case 96:
      return f(AttentionHeadDim<96>{});
    case 128:
      return f(AttentionHeadDim<128>{});
    default:
      KEYE_CHECK(false, "varlen_attention: head_dim on CUDA must be 64, 72, 80, 96 or 128, got ",
                 head_dim);
  }
}

// Calls f with both.
template <class F>
void with_attention_kernel(const VarlenAttentionParams& params, Dtype dtype, const F& f) {
  with_attention_type_of(dtype, [&](auto type) {
    with_attention_head_dim(params.head_dim, [&](auto head_dim) { f(type, head_dim); });
  });
}

inline void check_attention_rows(const char* name, const AttentionTensor& x) {
  constexpr int64_t kSize = 2;  // bytes of a value
  const int64_t bytes[] = {reinterpret_cast<int64_t>(x.data), x.stride_row * kSize,
                           x.stride_head * kSize};
  for (int64_t value : bytes) {
    KEYE_CHECK(value % 16 == 0, "varlen_attention: rows of ", name,
               " must start at multiples of 16 bytes on CUDA, got address and strides ", bytes[0],
               ", ", bytes[1], ", ", bytes[2]);
  }
}

inline void check_attention_values(const VarlenAttentionParams& params) {
  const AttentionTensor* tensors[] = {&params.q, &params.k, &params.v, &params.out};
  const char* names[] = {"q", "k", "v", "out"};
  for (int i = 0; i < 4; i++) check_attention_rows(names[i], *tensors[i]);
}
inline void check_attention_gradients(const VarlenAttentionParams& params) {
  check_attention_values(params);
  const AttentionTensor* tensors[] = {&params.dout, &params.dq, &params.dk, &params.dv};
  const char* names[] = {"dout", "dq", "dk", "dv"};
  for (int i = 0; i < 4; i++) check_attention_rows(names[i], *tensors[i]);
}

// The factor of scores in powers of two, and the sign that they are multiplied by before it, so
// that the highest score has the highest weight.
inline AttentionScale attention_scale(double softmax_scale) {
  if (softmax_scale == 0) return {1.0f, 0.0f};
  return {static_cast<float>(std::abs(softmax_scale) * kAttentionLog2e),
          softmax_scale < 0 ? -1.0f : 1.0f};
}

// Enough for the largest GPU many times over; blocks go on to further items.
constexpr int64_t kMaxAttentionBlocks = 132 * 16;

// A block for every part of a tile and head, as far as that is useful.
template <int kRows>
int64_t attention_blocks(int64_t max_tiles, int num_heads) {
  return std::min(max_tiles * (kAttentionTileRows / kRows) * num_heads, kMaxAttentionBlocks);
}

}  // namespace keye_ops
