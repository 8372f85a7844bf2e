// patchify on CUDA: registration.
#include <torch/csrc/stable/library.h>

#include "patchify/patchify_launch.cuh"
#include "patchify/patchify_op.h"

namespace keye_ops {

STABLE_TORCH_LIBRARY_IMPL(keye_ops, CUDA, m) {
  patchify_backend(PatchifyDevice::kCuda) = {&launch_patchify};
  m.impl("patchify", TORCH_BOX(&patchify));
}

}  // namespace keye_ops
