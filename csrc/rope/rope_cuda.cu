// rope on CUDA: registration.
#include <torch/csrc/stable/library.h>

#include "rope/rope_launch.cuh"
#include "rope/rope_op.h"

namespace keye_ops {

STABLE_TORCH_LIBRARY_IMPL(keye_ops, CUDA, m) {
  rope_backend(RopeDevice::kCuda) = {&launch_rope_forward, &launch_rope_backward,
                                     &rope_num_partials, kCudaTraits};
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("rope_", TORCH_BOX(&rope_inplace));
  m.impl("rope_backward", TORCH_BOX(&rope_backward));
}

}  // namespace keye_ops
