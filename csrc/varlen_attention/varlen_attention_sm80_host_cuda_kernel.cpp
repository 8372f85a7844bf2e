// varlen_attention's kernels for every GPU from sm_80 on, on the host executor.
#include "varlen_attention/varlen_attention_backward_sm80_launch.cuh"
#include "varlen_attention/varlen_attention_host_cuda.h"
#include "varlen_attention/varlen_attention_sm80_launch.cuh"

namespace keye_ops {

const AttentionHostCudaKernels kAttentionSm80HostCuda = {
    &launch_attention_sm80_forward, &launch_attention_delta, &launch_attention_dkdv_sm80,
    &launch_attention_dq_sm80};

}  // namespace keye_ops
