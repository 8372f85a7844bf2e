// merge_norm on CPU tensors by its CUDA kernels, while a test wants it.
#include "merge_norm/merge_norm_host_cuda.h"

#include "merge_norm/merge_norm_op.h"

namespace keye_ops {
namespace {

MergeNormBackend& cpu_backend() { return merge_norm_backend(MergeNormDevice::kCpu); }

const MergeNormBackend kCpuBackend = cpu_backend();

}  // namespace

extern "C" {

KEYE_API void merge_norm_host_cuda_install() {
  cpu_backend() = {&merge_norm_forward_host_cuda, &merge_norm_backward_host_cuda,
                   &merge_norm_num_partials_host_cuda, kCudaTraits};
}

KEYE_API void merge_norm_host_cuda_restore() { cpu_backend() = kCpuBackend; }
}

}  // namespace keye_ops
