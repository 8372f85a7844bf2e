// linear_gelu as one GEMM whose epilogue adds the bias and applies GELU: a launcher for every
// architecture that has its own.
#pragma once

#include "common/gemm.h"

namespace keye_ops {

struct LinearGeluGemmParams {
  GemmParams gemm;   // x [m, k], weight [n, k], out [m, n]
  const void* bias;  // [n], aligned to 16 bytes
  bool tanh;         // the approximation
};

void linear_gelu_sm80(const LinearGeluGemmParams& params, int device_index);
void linear_gelu_sm90(const LinearGeluGemmParams& params, int device_index);

}  // namespace keye_ops
