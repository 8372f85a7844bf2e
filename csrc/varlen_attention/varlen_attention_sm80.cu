// varlen_attention for every GPU from sm_80 on.
#include "varlen_attention/varlen_attention_backward_sm80_launch.cuh"
#include "varlen_attention/varlen_attention_kernels.h"
#include "varlen_attention/varlen_attention_sm80_launch.cuh"

namespace keye_ops {

void varlen_attention_sm80_forward(const VarlenAttentionParams& params, Dtype dtype,
                                   int device_index) {
  launch_attention_sm80_forward(params, dtype, device_index);
}

void varlen_attention_sm80_backward(const VarlenAttentionParams& params, Dtype dtype,
                                    int device_index) {
  launch_attention_sm80_backward(params, dtype, device_index);
}

}  // namespace keye_ops
