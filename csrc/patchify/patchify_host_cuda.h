// patchify's CUDA kernels on the host executor: a backend for tensors in the host's memory.
#pragma once

#include "patchify/patchify.h"

namespace keye_ops {

void patchify_host_cuda(const PatchifyParams& params, int device_index);

}  // namespace keye_ops
