// varlen_attention on CPU tensors by its CUDA kernels, while a test wants it.
#include "varlen_attention/varlen_attention_host_cuda.h"

#include "varlen_attention/varlen_attention_op.h"

namespace keye_ops {
namespace {

AttentionBackend& cpu_backend() { return attention_backend(AttentionDevice::kCpu); }

const AttentionBackend kCpuBackend = cpu_backend();

}  // namespace

extern "C" {

KEYE_API void varlen_attention_host_cuda_install() {
  cpu_backend() = {&varlen_attention_forward_host_cuda, &varlen_attention_backward_host_cuda,
                   &varlen_attention_plan_host_cuda};
}

KEYE_API void varlen_attention_host_cuda_restore() { cpu_backend() = kCpuBackend; }

// 80 or 90: the GPU whose kernels run.
KEYE_API void varlen_attention_host_cuda_set_arch(int capability) {
  varlen_attention_set_capability(capability);
}
}

}  // namespace keye_ops
