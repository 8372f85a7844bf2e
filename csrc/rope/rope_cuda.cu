// rope on CUDA: launchers, and registration.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/launch.cuh"
#include "rope/rope.cuh"
#include "rope/rope_op.h"

namespace keye_ops {
namespace {

using torch::headeronly::ScalarType;

constexpr int kWarpsPerBlock = kRopeThreads / kWarpSize;
constexpr int64_t kWantedWarps = 8192;  // enough to fill the largest GPU several times over
constexpr int kMaxPartials = 2048;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One row for every warp of whole blocks, whatever the GPU: the order of the sums is part of the
// result.
int num_partials(int64_t total) {
  const int64_t warps = std::clamp<int64_t>(total, 1, kMaxPartials);
  return static_cast<int>(ceil_div(warps, kWarpsPerBlock) * kWarpsPerBlock);
}

void check_vectors(const char* name, const void* pointer, int64_t stride_token, int64_t stride_head,
                   int element_size) {
  const int64_t bytes[] = {reinterpret_cast<int64_t>(pointer), stride_token * element_size,
                           stride_head * element_size};
  for (int64_t value : bytes) {
    KEYE_CHECK(value % kVectorBytes == 0, "rope: rows of ", name,
               " must start at multiples of 16 bytes on CUDA, got address and strides ", bytes[0],
               ", ", bytes[1], ", ", bytes[2]);
  }
}

template <class T>
void check_layout(const RopeParams& params) {
  const int vector = kVectorSize<T>;
  KEYE_CHECK(params.head_dim % vector == 0 && params.head_dim / vector <= kWarpSize,
             "rope: head_dim on CUDA must be a multiple of ", vector, " up to ", vector * kWarpSize,
             " in this dtype, got ", params.head_dim);
  const RopeTensor* tensors[] = {&params.q, &params.k};
  const char* names[] = {"q", "k"};
  for (int i = 0; i < 2; i++) {
    const RopeTensor& tensor = *tensors[i];
    const int size = sizeof(T);
    check_vectors(names[i], tensor.x, tensor.x_stride_token, tensor.x_stride_head, size);
    check_vectors(names[i], tensor.out, tensor.out_stride_token, tensor.out_stride_head, size);
    check_vectors(names[i], tensor.dout, tensor.dout_stride_token, tensor.dout_stride_head, size);
    check_vectors("the norm weight", tensor.norm_weight, 0, 0, size);
  }
}

template <class T, RopeMode kMode>
void launch_rope(const RopeParams& params, int device_index) {
  const int rows = params.q.num_heads + params.k.num_heads;
  constexpr bool kBackward = kMode == RopeMode::kNormBackward;
  if (!kBackward && (params.total == 0 || rows == 0)) return;
  check_layout<T>(params);

  // A warp goes through all heads of a token, or through some where tokens are few. The backward
  // gives every warp whole tokens and a row of partial sums of its own.
  RopeKernelParams kernel_params{params, rows, 1};
  int64_t num_warps = params.num_partials;
  if (!kBackward) {
    const int rows_at_once = 4 * (kWarpSize / (params.head_dim / kVectorSize<T>));
    const int64_t wanted =
        std::clamp<int64_t>(ceil_div(kWantedWarps, params.total), 1, ceil_div(rows, rows_at_once));
    kernel_params.rows_per_item = static_cast<int>(ceil_div(rows, wanted));
    kernel_params.items_per_token = static_cast<int>(ceil_div(rows, kernel_params.rows_per_item));
    num_warps = params.total * kernel_params.items_per_token;
  }
  const int64_t num_blocks = std::min(ceil_div(num_warps, kWarpsPerBlock), kMaxGrid);
  launch("rope", &rope_kernel<T, kMode>, num_blocks, kRopeThreads, device_index, kernel_params);
}

template <RopeMode kMode>
void launch_dtype(const RopeParams& params, ScalarType dtype, int device_index) {
  switch (dtype) {
    case ScalarType::Float:
      return launch_rope<float, kMode>(params, device_index);
    case ScalarType::Half:
      return launch_rope<__half, kMode>(params, device_index);
    case ScalarType::BFloat16:
      return launch_rope<__nv_bfloat16, kMode>(params, device_index);
    default:
      KEYE_CHECK(false, "rope: dtype on CUDA must be fp32, fp16 or bf16, got ", dtype_name(dtype));
  }
}

void forward(const RopeParams& params, ScalarType dtype, int device_index) {
  if (params.q.norm_weight != nullptr) {
    launch_dtype<RopeMode::kNormRotate>(params, dtype, device_index);
  } else {
    launch_dtype<RopeMode::kRotate>(params, dtype, device_index);
  }
}

void backward(const RopeParams& params, ScalarType dtype, int device_index) {
  launch_dtype<RopeMode::kNormBackward>(params, dtype, device_index);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(keye_ops, CUDA, m) {
  rope_backend(RopeDevice::kCuda) = {&forward, &backward, &num_partials};
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("rope_", TORCH_BOX(&rope_inplace));
  m.impl("rope_backward", TORCH_BOX(&rope_backward));
}

}  // namespace keye_ops
