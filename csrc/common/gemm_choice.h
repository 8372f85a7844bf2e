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

// NOTE: measured on an H200, linear_gelu at m = 1296 and patch_embed at m = 19200 (at m = 5184 it
// is faster fused, 50 against 59 us); where nothing was measured, everything is fused.
constexpr int64_t kAnyM = std::numeric_limits<int64_t>::max();
constexpr std::array<TorchGemm, 2> kTorchGemms{{
    {"linear_gelu", 90, 1024, kAnyM, 4608, 4608, 144.4, 90.8},
    {"patch_embed", 90, 16384, kAnyM, 1152, 592, 139.6, 95.8},
}};

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
