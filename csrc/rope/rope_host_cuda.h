// rope's CUDA kernels on the host executor: a backend for tensors in the host's memory.
#pragma once

#include "common/dtype.h"
#include "rope/rope.h"

namespace keye_ops {

void rope_forward_host_cuda(const RopeParams& params, Dtype dtype, int device_index);
void rope_backward_host_cuda(const RopeParams& params, Dtype dtype, int device_index);
int rope_num_partials_host_cuda(int64_t total);

}  // namespace keye_ops
