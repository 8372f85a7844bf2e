// add_rms_norm's CUDA kernels on the host executor: a backend for tensors in the host's memory.
#pragma once

#include "add_rms_norm/add_rms_norm.h"
#include "common/dtype.h"

namespace keye_ops {

void add_rms_norm_forward_host_cuda(const AddRmsNormParams& params, Dtype dtype, int device_index);
void add_rms_norm_backward_host_cuda(const AddRmsNormParams& params, Dtype dtype, int device_index);
int add_rms_norm_num_partials_host_cuda(int64_t rows);

}  // namespace keye_ops
