// varlen_attention on CUDA: registration.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <cstring>

#include "common/device_facts.h"
#include "varlen_attention/varlen_attention_kernels.h"
#include "varlen_attention/varlen_attention_op.h"
#include "varlen_attention/varlen_attention_plan_launch.cuh"

namespace keye_ops {
namespace {

// Whether sm_90a's own kernels may run: not with KEYE_OPS_SM90=0.
[[maybe_unused]] const bool kTakesSm90 = [] {
  const char* value = std::getenv("KEYE_OPS_SM90");
  return value == nullptr || std::strcmp(value, "0") != 0;
}();

void forward(const VarlenAttentionParams& params, Dtype dtype, int device_index) {
#if defined(KEYE_ATTENTION_SM90)
  const DeviceFacts facts = device_facts(device_index);
  if (facts.capability == 90 && kTakesSm90) {
    return varlen_attention_sm90_forward(params, dtype, facts.num_sms, device_index);
  }
#endif
  varlen_attention_sm80_forward(params, dtype, device_index);
}

void backward(const VarlenAttentionParams& params, Dtype dtype, int device_index) {
#if defined(KEYE_ATTENTION_SM90)
  const DeviceFacts facts = device_facts(device_index);
  if (facts.capability == 90 && kTakesSm90) {
    return varlen_attention_sm90_backward(params, dtype, facts.num_sms, device_index);
  }
#endif
  varlen_attention_sm80_backward(params, dtype, device_index);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(keye_ops, CUDA, m) {
  attention_backend(AttentionDevice::kCuda) = {&forward, &backward, &launch_attention_plan};
  m.impl("varlen_attention", TORCH_BOX(&varlen_attention));
  m.impl("varlen_attention_backward", TORCH_BOX(&varlen_attention_backward));
  m.impl("varlen_attention_plan", TORCH_BOX(&varlen_attention_plan));
}

}  // namespace keye_ops
