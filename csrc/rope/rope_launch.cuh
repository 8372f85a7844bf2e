// rope on CUDA: which kernel, on how many blocks; for a GPU and for the host executor.
#pragma once

#include <algorithm>

#include "common/launch.cuh"
#include "rope/rope.cuh"

namespace keye_ops {

constexpr int kRopeWarpsPerBlock = kRopeThreads / kWarpSize;
constexpr int64_t kRopeWantedWarps = 8192;  // enough to fill the largest GPU several times over
constexpr int kRopeMaxPartials = 2048;

// One row for every warp of whole blocks, whatever the GPU: the order of the sums is part of the
// result.
inline int rope_num_partials(int64_t total) {
  const int64_t warps = std::clamp<int64_t>(total, 1, kRopeMaxPartials);
  return static_cast<int>(ceil_div(warps, kRopeWarpsPerBlock) * kRopeWarpsPerBlock);
}

inline void check_rope_vectors(const char* name, const void* pointer, int64_t stride_token,
                               int64_t stride_head, int element_size) {
  const int64_t bytes[] = {reinterpret_cast<int64_t>(pointer), stride_token * element_size,
                           stride_head * element_size};
  for (int64_t value : bytes) {
    KEYE_CHECK(value % kVectorBytes == 0, "rope: rows of ", name,
               " must start at multiples of 16 bytes on CUDA, got address and strides ", bytes[0],
               ", ", bytes[1], ", ", bytes[2]);
  }
}

template <class T>
void check_rope_layout(const RopeParams& params) {
  const int vector = kVectorSize<T>;
  KEYE_CHECK(params.head_dim % vector == 0 && params.head_dim / vector <= kWarpSize,
             "rope: head_dim on CUDA must be a multiple of ", vector, " up to ", vector * kWarpSize,
             " in this dtype, got ", params.head_dim);
  const RopeTensor* tensors[] = {&params.q, &params.k};
  const char* names[] = {"q", "k"};
  for (int i = 0; i < 2; i++) {
    const RopeTensor& t = *tensors[i];
    const int size = sizeof(T);
    check_rope_vectors(names[i], t.x, t.x_stride_token, t.x_stride_head, size);
    check_rope_vectors(names[i], t.out, t.out_stride_token, t.out_stride_head, size);
    check_rope_vectors(names[i], t.dout, t.dout_stride_token, t.dout_stride_head, size);
    check_rope_vectors("the norm weight", t.norm_weight, 0, 0, size);
  }
}

template <class T, RopeMode kMode>
void launch_rope(const RopeParams& params, int device_index) {
  const int rows = params.q.num_heads + params.k.num_heads;
  constexpr bool kBackward = kMode == RopeMode::kNormBackward;
  if (!kBackward && (params.total == 0 || rows == 0)) return;
  check_rope_layout<T>(params);

  // A warp goes through all heads of a token, or through some where tokens are few. The backward
  // gives every warp whole tokens and a row of partial sums of its own.
  RopeKernelParams kernel_params{params, rows, 1};
  kernel_params.rope.error_word = error_word(device_index);
  int64_t num_warps = params.num_partials;
  if (!kBackward) {
    const int rows_at_once = 4 * (kWarpSize / (params.head_dim / kVectorSize<T>));
    const int64_t wanted = std::clamp<int64_t>(ceil_div(kRopeWantedWarps, params.total), 1,
                                               ceil_div(rows, rows_at_once));
    kernel_params.rows_per_item = static_cast<int>(ceil_div(rows, wanted));
    kernel_params.items_per_token = static_cast<int>(ceil_div(rows, kernel_params.rows_per_item));
    num_warps = params.total * kernel_params.items_per_token;
  }
  const int64_t num_blocks = std::min(ceil_div(num_warps, kRopeWarpsPerBlock), kMaxGrid);
  launch("rope", &rope_kernel<T, kMode>, {num_blocks, kRopeThreads}, device_index, kernel_params);
}

template <RopeMode kMode>
void launch_rope_of_dtype(const RopeParams& params, Dtype dtype, int device_index) {
  with_cuda_type_of("rope", dtype,
                    [&](auto type) { launch_rope<decltype(type), kMode>(params, device_index); });
}

inline void launch_rope_forward(const RopeParams& params, Dtype dtype, int device_index) {
  if (params.q.norm_weight != nullptr) {
    launch_rope_of_dtype<RopeMode::kNormRotate>(params, dtype, device_index);
  } else {
    launch_rope_of_dtype<RopeMode::kRotate>(params, dtype, device_index);
  }
}

inline void launch_rope_backward(const RopeParams& params, Dtype dtype, int device_index) {
  launch_rope_of_dtype<RopeMode::kNormBackward>(params, dtype, device_index);
}

}  // namespace keye_ops
