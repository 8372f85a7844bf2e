// merge_norm's CUDA kernels on the host executor: a backend for tensors in the host's memory.
#pragma once

#include "common/dtype.h"
#include "merge_norm/merge_norm.h"

namespace keye_ops {

void merge_norm_forward_host_cuda(const MergeNormParams& params, Dtype dtype, int device_index);
void merge_norm_backward_host_cuda(const MergeNormParams& params, Dtype dtype, int device_index);
int merge_norm_num_partials_host_cuda(int64_t rows);

}  // namespace keye_ops
