// rope on CPU tensors by its CUDA kernels, while a test wants it.
#include "rope/rope_host_cuda.h"

#include "rope/rope_op.h"

namespace keye_ops {
namespace {

RopeBackend& cpu_backend() { return rope_backend(RopeDevice::kCpu); }

const RopeBackend kCpuBackend = cpu_backend();

}  // namespace

extern "C" {

KEYE_API void rope_host_cuda_install() {
  cpu_backend() = {&rope_forward_host_cuda, &rope_backward_host_cuda, &rope_num_partials_host_cuda,
                   kCudaTraits};
}

KEYE_API void rope_host_cuda_restore() { cpu_backend() = kCpuBackend; }
}

}  // namespace keye_ops
