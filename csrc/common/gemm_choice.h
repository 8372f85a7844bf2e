// Fused GEMM or torch's: one table for all ops, and the environment variable
// KEYE_OPS_GEMM=fused|torch, which overrides it.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <string_view>

#include "common/error.h"
#include "common/gemm.h"

namespace keye_ops {

// Where torch's GEMM and our pass were measured to be faster than the fused kernel.
struct TorchGemm {
  std::string_view op;
  int capability;                 // of the device: 80, 90, ...
  int64_t smallest_m, largest_m;  // n and k exactly
  int64_t n, k;
  double fused_us, torch_us;  // as measured
};

// NOTE: no GPU has been measured yet, so everything is fused.
constexpr std::array<TorchGemm, 0> kTorchGemms{};

inline bool prefers_fused(std::string_view op, int capability, const GemmParams& params) {
  if (const char* forced = std::getenv("KEYE_OPS_GEMM")) {
    const std::string_view value = forced;
    KEYE_CHECK(value.empty() || value == "fused" || value == "torch",
               "KEYE_OPS_GEMM must be fused or torch, got ", value);
    if (!value.empty()) return value == "fused";
  }
  for (const TorchGemm& entry : kTorchGemms) {
    if (entry.op == op && entry.capability == capability && entry.n == params.n &&
        entry.k == params.k && params.m >= entry.smallest_m && params.m <= entry.largest_m) {
      return false;
    }
  }
  return true;
}

}  // namespace keye_ops
