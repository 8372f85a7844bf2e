// add_rms_norm on the CPU: threads, and registration.
#include "add_rms_norm/add_rms_norm_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "add_rms_norm/add_rms_norm_op.h"
#include "common/parallel.h"

namespace keye_ops {
namespace {

constexpr int64_t kGrainElements = 65536;  // less is not worth a thread

void forward(const AddRmsNormParams& params, Dtype dtype, int /*device_index*/) {
  const auto rows = KEYE_SELECT_ISA(add_rms_norm_forward_rows);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / params.hidden);
  torch::stable::parallel_for(0, params.total, grain,
                              [&](int64_t begin, int64_t end) { rows(params, dtype, begin, end); });
}

int num_partials(int64_t total) {
  return static_cast<int>((total + kAddRmsNormRowsPerPartial - 1) / kAddRmsNormRowsPerPartial);
}

void backward(const AddRmsNormParams& params, Dtype dtype, int /*device_index*/) {
  const auto partial = KEYE_SELECT_ISA(add_rms_norm_backward_partial);
  for_each_task(params.num_partials, [&](int64_t i) { partial(params, dtype, i); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(keye_ops, CPU, m) {
  add_rms_norm_backend(AddRmsNormDevice::kCpu) = {&forward, &backward, &num_partials, kCpuTraits};
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("add_rms_norm_backward", TORCH_BOX(&add_rms_norm_backward));
}

}  // namespace keye_ops
