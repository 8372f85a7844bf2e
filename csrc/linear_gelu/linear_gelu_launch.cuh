// linear_gelu's pass on CUDA: which kernel, on how many blocks; for a GPU and for the host
// executor.
#pragma once

#include <algorithm>

#include "common/dtype.h"
#include "common/launch.cuh"
#include "linear_gelu/linear_gelu.cuh"

namespace keye_ops {

template <class T, bool kTanh, bool kBackward>
void launch_linear_gelu_pass_of(const LinearGeluParams& params, int device_index) {
  constexpr int64_t kBlock = kVectorSize<T> * kLinearGeluThreads * kLinearGeluVectors;
  const int64_t num_blocks = (params.numel + kBlock - 1) / kBlock;
  launch("linear_gelu", &linear_gelu_kernel<T, kTanh, kBackward>, {num_blocks, kLinearGeluThreads},
         device_index, params);
}

template <class T>
void launch_linear_gelu_pass_of(const LinearGeluParams& params, int device_index) {
  if (params.dout == nullptr) {
    params.tanh ? launch_linear_gelu_pass_of<T, true, false>(params, device_index)
                : launch_linear_gelu_pass_of<T, false, false>(params, device_index);
  } else {
    params.tanh ? launch_linear_gelu_pass_of<T, true, true>(params, device_index)
                : launch_linear_gelu_pass_of<T, false, true>(params, device_index);
  }
}

inline void launch_linear_gelu_pass(const LinearGeluParams& params, Dtype dtype, int device_index) {
  switch (dtype) {
    case Dtype::kFloat:
      return launch_linear_gelu_pass_of<float>(params, device_index);
    case Dtype::kHalf:
      return launch_linear_gelu_pass_of<Half>(params, device_index);
    case Dtype::kBFloat16:
      return launch_linear_gelu_pass_of<BFloat16>(params, device_index);
    case Dtype::kDouble:
      KEYE_CHECK(false, "linear_gelu: dtype on CUDA must be fp32, fp16 or bf16, got torch.float64");
  }
}

}  // namespace keye_ops
