// What the GEMMs of CUTLASS multiply.
#pragma once

#include <cutlass/bfloat16.h>

namespace keye_ops {

using GemmElement = cutlass::bfloat16_t;
constexpr int kGemmAlignment = 8;  // elements in 16 bytes

}  // namespace keye_ops
