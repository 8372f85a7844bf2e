// linear_gelu on CPU tensors by its CUDA kernel, while a test wants it.
#include "linear_gelu/linear_gelu_host_cuda.h"

#include "linear_gelu/linear_gelu_op.h"

namespace keye_ops {
namespace {

LinearGeluBackend& cpu_backend() { return linear_gelu_backend(LinearGeluDevice::kCpu); }

const LinearGeluBackend kCpuBackend = cpu_backend();

}  // namespace

extern "C" {

KEYE_API void linear_gelu_host_cuda_install() {
  cpu_backend() = {&linear_gelu_pass_host_cuda, /*fused=*/nullptr};
}

KEYE_API void linear_gelu_host_cuda_restore() { cpu_backend() = kCpuBackend; }
}

}  // namespace keye_ops
