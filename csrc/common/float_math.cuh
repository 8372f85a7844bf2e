// For one float in a kernel what exp.h and simd.h have for vectors on the host.
#pragma once

#include "common/host_device.h"
#include "common/ptx/approx.cuh"

namespace keye_ops {

// b where either is NaN.
KEYE_DEVICE float larger_of(float a, float b) { return a > b ? a : b; }
KEYE_DEVICE float exp2_nonpositive(float x) { return ptx::ex2_approx_ftz(x); }
KEYE_DEVICE float reciprocal_of(float x) { return ptx::rcp_approx_ftz(x); }

}  // namespace keye_ops
