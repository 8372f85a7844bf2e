// add_layer_norm's CUDA kernels on the host executor: a backend for tensors in the host's memory.
#pragma once

#include "add_layer_norm/add_layer_norm.h"
#include "common/dtype.h"

namespace keye_ops {

void add_layer_norm_forward_host_cuda(const AddLayerNormParams& params, Dtype dtype,
                                      int device_index);
void add_layer_norm_backward_host_cuda(const AddLayerNormParams& params, Dtype dtype,
                                       int device_index);
int add_layer_norm_num_partials_host_cuda(int64_t rows);

}  // namespace keye_ops
