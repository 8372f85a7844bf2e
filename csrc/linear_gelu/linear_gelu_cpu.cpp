// linear_gelu on the CPU: threads, and registration.
#include "linear_gelu/linear_gelu_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/parallel.h"
#include "linear_gelu/linear_gelu_op.h"

namespace keye_ops {
namespace {

constexpr int64_t kElementsPerTask = 32768;

void pass(const LinearGeluParams& params, Dtype dtype, int /*device_index*/) {
  const auto elements = KEYE_SELECT_ISA(linear_gelu_pass);
  const int64_t tasks = (params.numel + kElementsPerTask - 1) / kElementsPerTask;
  for_each_task(tasks, [&](int64_t i) {
    const int64_t begin = i * kElementsPerTask;
    elements(params, dtype, begin, std::min(begin + kElementsPerTask, params.numel));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(keye_ops, CPU, m) {
  linear_gelu_backend(LinearGeluDevice::kCpu) = {&pass, /*fused=*/nullptr};
  m.impl("linear_gelu", TORCH_BOX(&linear_gelu));
  m.impl("linear_gelu_forward", TORCH_BOX(&linear_gelu_forward));
  m.impl("linear_gelu_backward", TORCH_BOX(&linear_gelu_backward));
}

}  // namespace keye_ops
