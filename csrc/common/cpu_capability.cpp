#include "common/cpu_capability.h"

#include <cstdlib>
#include <string>

#include "common/check.h"

namespace keye_ops {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_bf16"};

CpuCapability best_capability() {
#if defined(KEYE_HAVE_X86_ISAS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) return CpuCapability::kAvx512Bf16;
  if (avx2 && avx512) return CpuCapability::kAvx512;
  if (avx2) return CpuCapability::kAvx2;
#endif
  return CpuCapability::kDefault;
}

CpuCapability choose() {
  const CpuCapability best = best_capability();
  const char* forced = std::getenv("KEYE_OPS_CPU_CAPABILITY");
  if (forced == nullptr || *forced == '\0') return best;
  for (int i = 0; i <= static_cast<int>(best); i++) {
    if (std::string(forced) == kNames[i]) return static_cast<CpuCapability>(i);
  }
  KEYE_CHECK(false,
             "KEYE_OPS_CPU_CAPABILITY must be default, avx2, avx512 or avx512_bf16 and at most ",
             kNames[static_cast<int>(best)], " on this CPU and build, got ", forced);
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability capability = choose();
  return capability;
}

const char* cpu_capability_name() { return kNames[static_cast<int>(cpu_capability())]; }

}  // namespace keye_ops
