// add_layer_norm on CUDA: registration.
#include <torch/csrc/stable/library.h>

#include "add_layer_norm/add_layer_norm_launch.cuh"
#include "add_layer_norm/add_layer_norm_op.h"

namespace keye_ops {

STABLE_TORCH_LIBRARY_IMPL(keye_ops, CUDA, m) {
  add_layer_norm_backend(AddLayerNormDevice::kCuda) = {&launch_add_layer_norm_forward,
                                                       &launch_add_layer_norm_backward,
                                                       &norm_num_partials, kCudaTraits};
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&add_layer_norm_backward));
}

}  // namespace keye_ops
