// linear_gelu on CUDA: registration.
#include <torch/csrc/stable/library.h>

#include "common/gemm_kernels.h"
#include "linear_gelu/linear_gelu_launch.cuh"
#include "linear_gelu/linear_gelu_op.h"

namespace keye_ops {
namespace {

bool fused(const LinearGeluGemmParams& params, int device_index) {
  return launch_built_gemm<LinearGeluGemmParams>("linear_gelu", params, device_index,
                                                 KEYE_SM80_GEMM(linear_gelu_sm80),
                                                 KEYE_SM90_GEMM(linear_gelu_sm90));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(keye_ops, CUDA, m) {
  linear_gelu_backend(LinearGeluDevice::kCuda) = {&launch_linear_gelu_pass, &fused};
  m.impl("linear_gelu", TORCH_BOX(&linear_gelu));
  m.impl("linear_gelu_forward", TORCH_BOX(&linear_gelu_forward));
  m.impl("linear_gelu_backward", TORCH_BOX(&linear_gelu_backward));
}

}  // namespace keye_ops
