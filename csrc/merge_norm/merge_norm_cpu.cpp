// merge_norm on the CPU: threads, and registration.
#include "merge_norm/merge_norm_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/check.h"
#include "common/parallel.h"
#include "merge_norm/merge_norm_op.h"

namespace keye_ops {
namespace {

constexpr int64_t kGrainElements = 65536;  // less is not worth a thread

void forward(const MergeNormParams& params, Dtype dtype, int /*device_index*/) {
  const auto tokens = KEYE_SELECT_ISA(merge_norm_forward_tokens);
  const int64_t square = params.side * params.side;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (square * params.hidden));
  torch::stable::parallel_for(0, params.total / square, grain, [&](int64_t begin, int64_t end) {
    tokens(params, dtype, begin, end);
  });
}

int num_partials(int64_t tokens) {
  return static_cast<int>((tokens + kMergeNormTokensPerPartial - 1) / kMergeNormTokensPerPartial);
}

void backward(const MergeNormParams& params, Dtype dtype, int /*device_index*/) {
  const auto partial = KEYE_SELECT_ISA(merge_norm_backward_partial);
  for_each_task(params.num_partials, [&](int64_t i) { partial(params, dtype, i); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(keye_ops, CPU, m) {
  merge_norm_backend(MergeNormDevice::kCpu) = {&forward, &backward, &num_partials, kCpuTraits};
  m.impl("merge_norm", TORCH_BOX(&merge_norm));
  m.impl("merge_norm_backward", TORCH_BOX(&merge_norm_backward));
}

}  // namespace keye_ops
