// merge_norm on CUDA: registration.
#include <torch/csrc/stable/library.h>

#include "merge_norm/merge_norm_launch.cuh"
#include "merge_norm/merge_norm_op.h"

namespace keye_ops {

STABLE_TORCH_LIBRARY_IMPL(keye_ops, CUDA, m) {
  merge_norm_backend(MergeNormDevice::kCuda) = {
      &launch_merge_norm_forward, &launch_merge_norm_backward, &norm_num_partials, kCudaTraits};
  m.impl("merge_norm", TORCH_BOX(&merge_norm));
  m.impl("merge_norm_backward", TORCH_BOX(&merge_norm_backward));
}

}  // namespace keye_ops
