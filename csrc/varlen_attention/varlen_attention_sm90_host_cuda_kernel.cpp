// varlen_attention's kernels for sm_90a on the host executor.
#include "varlen_attention/varlen_attention_backward_sm90_launch.cuh"
#include "varlen_attention/varlen_attention_host_cuda.h"
#include "varlen_attention/varlen_attention_sm90_launch.cuh"

namespace keye_ops {
namespace {

constexpr int kPretendedSms = 3;

// A launch on so many multiprocessors.
template <void (*kLaunch)(const VarlenAttentionParams&, Dtype, int, int)>
void on_pretended_sms(const VarlenAttentionParams& params, Dtype dtype, int device_index) {
  kLaunch(params, dtype, kPretendedSms, device_index);
}

}  // namespace

const AttentionHostCudaKernels kAttentionSm90HostCuda = {
    &on_pretended_sms<&launch_attention_sm90_forward>, &launch_attention_delta,
    &on_pretended_sms<&launch_attention_dkdv_sm90>, &on_pretended_sms<&launch_attention_dq_sm90>};

}  // namespace keye_ops
