// add_layer_norm on the CPU: threads, and registration.
#include "add_layer_norm/add_layer_norm_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "add_layer_norm/add_layer_norm_op.h"
#include "common/check.h"
#include "common/parallel.h"

namespace keye_ops {
namespace {

constexpr int64_t kGrainElements = 65536;  // less is not worth a thread

void forward(const AddLayerNormParams& params, Dtype dtype, int /*device_index*/) {
  const auto rows = KEYE_SELECT_ISA(add_layer_norm_forward_rows);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / params.hidden);
  torch::stable::parallel_for(0, params.total, grain,
                              [&](int64_t begin, int64_t end) { rows(params, dtype, begin, end); });
}

int num_partials(int64_t total) {
  return static_cast<int>((total + kAddLayerNormRowsPerPartial - 1) / kAddLayerNormRowsPerPartial);
}

void backward(const AddLayerNormParams& params, Dtype dtype, int /*device_index*/) {
  const auto partial = KEYE_SELECT_ISA(add_layer_norm_backward_partial);
  for_each_task(params.num_partials, [&](int64_t i) { partial(params, dtype, i); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(keye_ops, CPU, m) {
  add_layer_norm_backend(AddLayerNormDevice::kCpu) = {&forward, &backward, &num_partials,
                                                      kCpuTraits};
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&add_layer_norm_backward));
}

}  // namespace keye_ops
