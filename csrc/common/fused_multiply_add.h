// a * b + c with one rounding, for float, for vectors of floats, and for device code.
#pragma once

#if defined(__CUDACC__)
#include <cmath>

#include "common/host_device.h"

namespace keye_ops {

KEYE_HOST_DEVICE float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }

}  // namespace keye_ops
#else
#include "common/simd.h"
#endif
