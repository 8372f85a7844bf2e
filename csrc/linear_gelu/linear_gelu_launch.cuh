// linear_gelu's pass on CUDA: which kernel, on how many blocks; for a GPU and for the host
// executor.
#pragma once

#include "common/launch.cuh"
#include "linear_gelu/linear_gelu.cuh"

namespace keye_ops {

template <class T, bool kTanh, bool kBackward>
void launch_linear_gelu_pass_of(const LinearGeluParams& params, int device_index) {
  constexpr int64_t kBlock = kVectorSize<T> * kLinearGeluThreads * kLinearGeluVectors;
  launch("linear_gelu", &linear_gelu_kernel<T, kTanh, kBackward>,
         {ceil_div(params.numel, kBlock), kLinearGeluThreads}, device_index, params);
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
  with_cuda_type_of("linear_gelu", dtype, [&](auto type) {
    launch_linear_gelu_pass_of<decltype(type)>(params, device_index);
  });
}

}  // namespace keye_ops
