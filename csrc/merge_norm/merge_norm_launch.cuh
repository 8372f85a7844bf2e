// merge_norm on CUDA: which kernel, on how many blocks; for a GPU and for the host executor.
#pragma once

#include "common/norm_launch.cuh"
#include "merge_norm/merge_norm.cuh"

namespace keye_ops {

// num_partials of 0 is for a forward.
template <class T>
NormLaunch merge_norm_plan(const MergeNormParams& params, int num_partials) {
  check_norm_rows<T>("merge_norm", "x", params.x, params.x_stride);
  check_norm_rows<T>("merge_norm", "the patches", nullptr, params.hidden);
  check_norm_rows<T>("merge_norm", "weight", params.weight, 0);
  const int64_t square = params.side * params.side;
  const int64_t num_rows = params.norm_first ? params.total : params.total / square;
  const int64_t width = params.norm_first ? params.hidden : square * params.hidden;
  NormLaunch norm = norm_launch<T>("merge_norm", num_rows, width, num_partials, params.eps);
  norm.plan.weight = params.weight;
  return norm;
}

template <class T>
MergeNormKernelParams merge_norm_kernel_params(const MergeNormParams& params, const NormPlan& plan,
                                               int device_index) {
  MergeNormKernelParams kernel_params{params, plan};
  kernel_params.op.error_word = error_word(device_index);
  kernel_params.patch_chunks = static_cast<int>(params.hidden / kVectorSize<T>);
  kernel_params.per_patch_chunks = 1.0f / static_cast<float>(kernel_params.patch_chunks);
  kernel_params.per_side = 1.0f / static_cast<float>(params.side);
  return kernel_params;
}

template <class T>
void launch_merge_norm_forward(const MergeNormParams& params, int device_index) {
  NormLaunch norm = merge_norm_plan<T>(params, 0);
  check_norm_rows<T>("merge_norm", "bias", params.bias, 0);
  norm.plan.bias = params.bias;
  const auto kernel_params = merge_norm_kernel_params<T>(params, norm.plan, device_index);
  launch_norm("merge_norm", &merge_norm_forward_kernel<T, kNormChunks>,
              &merge_norm_forward_kernel<T, 0>, norm, device_index, kernel_params);
}

template <class T>
void launch_merge_norm_backward(const MergeNormParams& params, int device_index) {
  NormLaunch norm = merge_norm_plan<T>(params, params.num_partials);
  check_norm_rows<T>("merge_norm", "dout", params.dout, params.dout_stride);
  norm.plan.dweight_partial = static_cast<float*>(params.dweight_partial);
  norm.plan.dbias_partial = static_cast<float*>(params.dbias_partial);
  const auto kernel_params = merge_norm_kernel_params<T>(params, norm.plan, device_index);
  launch_norm("merge_norm", &merge_norm_backward_kernel<T, kNormChunks>,
              &merge_norm_backward_kernel<T, 0>, norm, device_index, kernel_params);
}

inline void launch_merge_norm_forward(const MergeNormParams& params, Dtype dtype,
                                      int device_index) {
  with_cuda_type_of("merge_norm", dtype, [&](auto type) {
    launch_merge_norm_forward<decltype(type)>(params, device_index);
  });
}

inline void launch_merge_norm_backward(const MergeNormParams& params, Dtype dtype,
                                       int device_index) {
  with_cuda_type_of("merge_norm", dtype, [&](auto type) {
    launch_merge_norm_backward<decltype(type)>(params, device_index);
  });
}

}  // namespace keye_ops
