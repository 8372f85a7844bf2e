// rope on the CPU: threads, and registration.
#include "rope/rope_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "rope/rope_op.h"

namespace keye_ops {
namespace {

constexpr int64_t kGrainElements = 65536;  // less is not worth a thread

int64_t grain_tokens(const RopeParams& params) {
  const int64_t elements = int64_t{params.q.num_heads + params.k.num_heads} * params.head_dim;
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements));
}

void forward(const RopeParams& params, Dtype dtype, int /*device_index*/) {
  const auto tokens = KEYE_SELECT_ISA(rope_forward_tokens);
  torch::stable::parallel_for(
      0, params.total, grain_tokens(params),
      [&](int64_t begin, int64_t end) { tokens(params, dtype, begin, end); });
}

int num_partials(int64_t total) {
  return static_cast<int>((total + kRopeTokensPerPartial - 1) / kRopeTokensPerPartial);
}

void backward(const RopeParams& params, Dtype dtype, int /*device_index*/) {
  const auto partials = KEYE_SELECT_ISA(rope_backward_partials);
  torch::stable::parallel_for(0, params.num_partials, 1, [&](int64_t begin, int64_t end) {
    partials(params, dtype, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(keye_ops, CPU, m) {
  rope_backend(RopeDevice::kCpu) = {&forward, &backward, &num_partials, kCpuTraits};
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("rope_", TORCH_BOX(&rope_inplace));
  m.impl("rope_backward", TORCH_BOX(&rope_backward));
}

}  // namespace keye_ops
