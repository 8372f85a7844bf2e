// add_layer_norm on CPU tensors by its CUDA kernels, while a test wants it.
#include "add_layer_norm/add_layer_norm_host_cuda.h"

#include "add_layer_norm/add_layer_norm_op.h"

namespace keye_ops {
namespace {

AddLayerNormBackend& cpu_backend() { return add_layer_norm_backend(AddLayerNormDevice::kCpu); }

const AddLayerNormBackend kCpuBackend = cpu_backend();

}  // namespace

extern "C" {

KEYE_API void add_layer_norm_host_cuda_install() {
  cpu_backend() = {&add_layer_norm_forward_host_cuda, &add_layer_norm_backward_host_cuda,
                   &add_layer_norm_num_partials_host_cuda, kCudaTraits};
}

KEYE_API void add_layer_norm_host_cuda_restore() { cpu_backend() = kCpuBackend; }
}

}  // namespace keye_ops
