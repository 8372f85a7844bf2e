// patchify: the host side that all devices share. Arguments are checked here, above the kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "common/export.h"
#include "patchify/patchify.h"

namespace keye_ops {

enum class PatchifyDevice { kCpu = 0, kCuda = 1 };

// What a device offers. Launchers trust their params.
struct PatchifyBackend {
  void (*forward)(const PatchifyParams&, int device_index);
};

// The entry of a device, which its library fills when it registers the op below.
KEYE_API PatchifyBackend& patchify_backend(PatchifyDevice device);

KEYE_API torch::stable::Tensor patchify(const torch::stable::Tensor& frames, int64_t height,
                                        int64_t width, int64_t patch_size, bool bicubic,
                                        int64_t arithmetic, bool vertical_first);

}  // namespace keye_ops
