// varlen_attention on CUDA: launchers by architecture, each compiled in a file of its own.
#pragma once

#include "common/dtype.h"
#include "varlen_attention/varlen_attention.h"

namespace keye_ops {

void varlen_attention_sm80_forward(const VarlenAttentionParams& params, Dtype dtype,
                                   int device_index);
void varlen_attention_sm80_backward(const VarlenAttentionParams& params, Dtype dtype,
                                    int device_index);
void varlen_attention_sm90_forward(const VarlenAttentionParams& params, Dtype dtype, int num_sms,
                                   int device_index);
void varlen_attention_sm90_backward(const VarlenAttentionParams& params, Dtype dtype, int num_sms,
                                    int device_index);

}  // namespace keye_ops
