// patchify on CPU tensors by its CUDA kernels, while a test wants it.
#include "patchify/patchify_host_cuda.h"

#include "patchify/patchify_op.h"

namespace keye_ops {
namespace {

PatchifyBackend& cpu_backend() { return patchify_backend(PatchifyDevice::kCpu); }

const PatchifyBackend kCpuBackend = cpu_backend();

}  // namespace

extern "C" {

KEYE_API void patchify_host_cuda_install() { cpu_backend() = {&patchify_host_cuda}; }

KEYE_API void patchify_host_cuda_restore() { cpu_backend() = kCpuBackend; }
}

}  // namespace keye_ops
