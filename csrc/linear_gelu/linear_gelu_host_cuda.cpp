// linear_gelu on CPU tensors by its CUDA kernel, while a test wants it.
#include "linear_gelu/linear_gelu_host_cuda.h"

#include "common/gelu.h"
#include "common/gemm_host_cuda.h"
#include "linear_gelu/linear_gelu_op.h"

namespace keye_ops {
namespace {

LinearGeluBackend& cpu_backend() { return linear_gelu_backend(LinearGeluDevice::kCpu); }

const LinearGeluBackend kCpuBackend = cpu_backend();

bool fused_host_cuda(const LinearGeluGemmParams& params, int /*device_index*/) {
  const auto* bias = static_cast<const BFloat16*>(params.bias);
  const auto epilogue = [&](double product, int64_t /*row*/, int64_t column) {
    const double hidden = product + double{load(bias + column)};
    return params.tanh ? gelu<true>(hidden) : gelu<false>(hidden);
  };
  return multiply_host_cuda("linear_gelu", params.gemm, epilogue);
}

}  // namespace

extern "C" {

KEYE_API void linear_gelu_host_cuda_install() {
  cpu_backend() = {&linear_gelu_pass_host_cuda, /*fused=*/nullptr};
}

// After the other: with a stand-in for the fused GEMM.
KEYE_API void linear_gelu_host_cuda_install_fused() { cpu_backend().fused = &fused_host_cuda; }

KEYE_API void linear_gelu_host_cuda_restore() { cpu_backend() = kCpuBackend; }
}

}  // namespace keye_ops
