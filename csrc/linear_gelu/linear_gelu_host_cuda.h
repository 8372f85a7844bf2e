// linear_gelu's CUDA kernel on the host executor: a backend for tensors in the host's memory.
#pragma once

#include "common/dtype.h"
#include "linear_gelu/linear_gelu.h"

namespace keye_ops {

void linear_gelu_pass_host_cuda(const LinearGeluParams& params, Dtype dtype, int device_index);

}  // namespace keye_ops
