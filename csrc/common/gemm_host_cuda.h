// In place of a fused GEMM, in tests of what ops tell it: plain loops on the host.
#pragma once

#include <string_view>

#include "common/gemm_choice.h"
#include "common/simd.h"

namespace keye_ops {

constexpr int kHostCudaCapability = 90;

// out = epilogue(product, row, column), unless torch's GEMM is to run.
template <class Epilogue>
bool multiply_host_cuda(std::string_view op, const GemmParams& params, const Epilogue& epilogue) {
  if (!prefers_fused(op, kHostCudaCapability, params)) return false;
  const auto *a = static_cast<const BFloat16*>(params.a),
             *b = static_cast<const BFloat16*>(params.b);
  auto* out = static_cast<BFloat16*>(params.out);
  for (int64_t row = 0; row < params.m; row++) {
    for (int64_t column = 0; column < params.n; column++) {
      double product = 0;
      for (int64_t i = 0; i < params.k; i++) {
        product += double{load(a + row * params.a_stride + i)} *
                   double{load(b + column * params.b_stride + i)};
      }
      store(out + row * params.n + column, static_cast<float>(epilogue(product, row, column)));
    }
  }
  return true;
}

}  // namespace keye_ops
