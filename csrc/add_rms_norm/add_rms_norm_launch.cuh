// add_rms_norm on CUDA: which kernel, on how many blocks; for a GPU and for the host executor.
#pragma once

#include "add_rms_norm/add_rms_norm.cuh"
#include "common/norm_launch.cuh"

namespace keye_ops {

template <class T>
void launch_add_rms_norm_forward(const AddRmsNormParams& params, int device_index) {
  const char* op = "add_rms_norm";
  check_norm_rows<T>(op, "x", params.x, params.x_stride);
  check_norm_rows<T>(op, "residual", params.residual, params.residual_stride);
  check_norm_rows<T>(op, "weight", params.weight, 0);
  NormLaunch norm = norm_launch<T>(op, params.total, params.hidden, 0, params.eps);
  norm.plan.weight = params.weight;
  launch_norm(op, &add_rms_norm_forward_kernel<T, kNormChunks>, &add_rms_norm_forward_kernel<T, 0>,
              norm, device_index, AddRmsNormKernelParams{params, norm.plan});
}

template <class T>
void launch_add_rms_norm_backward(const AddRmsNormParams& params, int device_index) {
  const char* op = "add_rms_norm";
  check_norm_rows<T>(op, "sum", params.x, params.x_stride);
  check_norm_rows<T>(op, "dnormed", params.dnormed, params.dnormed_stride);
  check_norm_rows<T>(op, "dsum", params.dsum, params.dsum_stride);
  check_norm_rows<T>(op, "weight", params.weight, 0);
  NormLaunch norm =
      norm_launch<T>(op, params.total, params.hidden, params.num_partials, params.eps);
  norm.plan.weight = params.weight;
  norm.plan.dweight_partial = static_cast<float*>(params.dweight_partial);
  launch_norm(op, &add_rms_norm_backward_kernel<T, kNormChunks>,
              &add_rms_norm_backward_kernel<T, 0>, norm, device_index,
              AddRmsNormKernelParams{params, norm.plan});
}

inline void launch_add_rms_norm_forward(const AddRmsNormParams& params, Dtype dtype,
                                        int device_index) {
  with_cuda_type_of("add_rms_norm", dtype, [&](auto type) {
    launch_add_rms_norm_forward<decltype(type)>(params, device_index);
  });
}

inline void launch_add_rms_norm_backward(const AddRmsNormParams& params, Dtype dtype,
                                         int device_index) {
  with_cuda_type_of("add_rms_norm", dtype, [&](auto type) {
    launch_add_rms_norm_backward<decltype(type)>(params, device_index);
  });
}

}  // namespace keye_ops
