// varlen_attention for sm_90a.
#include "varlen_attention/varlen_attention_backward_sm90_launch.cuh"
#include "varlen_attention/varlen_attention_kernels.h"
#include "varlen_attention/varlen_attention_sm90_launch.cuh"

namespace keye_ops {

void varlen_attention_sm90_forward(const VarlenAttentionParams& params, Dtype dtype, int num_sms,
                                   int device_index) {
  launch_attention_sm90_forward(params, dtype, num_sms, device_index);
}

void varlen_attention_sm90_backward(const VarlenAttentionParams& params, Dtype dtype, int num_sms,
                                    int device_index) {
  launch_attention_sm90_backward(params, dtype, num_sms, device_index);
}

}  // namespace keye_ops
