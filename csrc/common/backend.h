// What the kernels of a device want from the host side of every op.
#pragma once

namespace keye_ops {

struct BackendTraits {
  bool checks_values;      // the host reads cu_seqlens, grids and positions first, and raises
  bool partials_are_fp64;  // partial sums of parameters' gradients, else fp32
};

constexpr BackendTraits kCpuTraits{true, true};
constexpr BackendTraits kCudaTraits{false, false};

}  // namespace keye_ops
