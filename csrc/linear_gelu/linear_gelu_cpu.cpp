// linear_gelu on the CPU: threads, and registration.
#include "linear_gelu/linear_gelu_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/check.h"
#include "linear_gelu/linear_gelu_op.h"

namespace keye_ops {
namespace {

constexpr int64_t kGrainElements = 16384;  // less is not worth a thread

void pass(const LinearGeluParams& params, torch::headeronly::ScalarType dtype,
          int /*device_index*/) {
  const auto elements = KEYE_SELECT_ISA(linear_gelu_pass);
  torch::stable::parallel_for(0, params.numel, kGrainElements, [&](int64_t begin, int64_t end) {
    elements(params, float_dtype_of(dtype), begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(keye_ops, CPU, m) {
  linear_gelu_backend(LinearGeluDevice::kCpu) = {&pass};
  m.impl("linear_gelu", TORCH_BOX(&linear_gelu));
  m.impl("linear_gelu_backward", TORCH_BOX(&linear_gelu_backward));
}

}  // namespace keye_ops
