// varlen_attention's CUDA kernels on the host executor: a backend for tensors in the host's memory.
#pragma once

#include "common/dtype.h"
#include "varlen_attention/varlen_attention.h"

namespace keye_ops {

void varlen_attention_forward_host_cuda(const VarlenAttentionParams& params, Dtype dtype,
                                        int device_index);
void varlen_attention_backward_host_cuda(const VarlenAttentionParams& params, Dtype dtype,
                                         int device_index);
void varlen_attention_plan_host_cuda(const VarlenAttentionParams& params, int32_t* memory,
                                     bool with_k_tiles, int device_index);

// The launches of an architecture, each compiled in a file of its own.
struct AttentionHostCudaKernels {
  using Launch = void (*)(const VarlenAttentionParams& params, Dtype dtype, int device_index);
  Launch forward, delta, dkdv, dq;
};
extern const AttentionHostCudaKernels kAttentionSm80HostCuda, kAttentionSm90HostCuda;

// The GPU whose kernels run: 80 or 90.
void varlen_attention_set_capability(int capability);

}  // namespace keye_ops
