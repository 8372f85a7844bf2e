// add_rms_norm on CPU tensors by its CUDA kernels, while a test wants it.
#include "add_rms_norm/add_rms_norm_host_cuda.h"

#include "add_rms_norm/add_rms_norm_op.h"

namespace keye_ops {
namespace {

AddRmsNormBackend& cpu_backend() { return add_rms_norm_backend(AddRmsNormDevice::kCpu); }

const AddRmsNormBackend kCpuBackend = cpu_backend();

}  // namespace

extern "C" {

KEYE_API void add_rms_norm_host_cuda_install() {
  cpu_backend() = {&add_rms_norm_forward_host_cuda, &add_rms_norm_backward_host_cuda,
                   &add_rms_norm_num_partials_host_cuda, kCudaTraits};
}

KEYE_API void add_rms_norm_host_cuda_restore() { cpu_backend() = kCpuBackend; }
}

}  // namespace keye_ops
