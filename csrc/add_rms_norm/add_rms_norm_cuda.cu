// add_rms_norm on CUDA: registration.
#include <torch/csrc/stable/library.h>

#include "add_rms_norm/add_rms_norm_launch.cuh"
#include "add_rms_norm/add_rms_norm_op.h"

namespace keye_ops {

STABLE_TORCH_LIBRARY_IMPL(keye_ops, CUDA, m) {
  add_rms_norm_backend(AddRmsNormDevice::kCuda) = {
      &launch_add_rms_norm_forward, &launch_add_rms_norm_backward, &norm_num_partials, kCudaTraits};
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("add_rms_norm_backward", TORCH_BOX(&add_rms_norm_backward));
}

}  // namespace keye_ops
