#include "common/cpu_capability.h"

#include <cstdlib>
#include <string>

#include "common/check.h"

#if defined(KEYE_HAVE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace keye_ops {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

#if defined(KEYE_HAVE_X86_ISAS)
// Whether the CPU has tiles of bf16 and the kernel lets this process use them: their registers are
// large, so Linux wants to be asked once.
bool can_use_amx() {
#if defined(KEYE_HAVE_AMX)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kAmxBf16Bit = 1u << 22, kAmxTileBit = 1u << 24;
  if ((edx & kAmxBf16Bit) == 0 || (edx & kAmxTileBit) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

CpuCapability best_capability() {
#if defined(KEYE_HAVE_X86_ISAS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx2 && avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16 && can_use_amx()) return CpuCapability::kAmxBf16;
  if (bf16) return CpuCapability::kAvx512Bf16;
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
  KEYE_CHECK(
      false,
      "KEYE_OPS_CPU_CAPABILITY must be default, avx2, avx512, avx512_bf16 or amx_bf16 and at most ",
      kNames[static_cast<int>(best)], " on this CPU and build, got ", forced);
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability capability = choose();
  return capability;
}

const char* cpu_capability_name() { return kNames[static_cast<int>(cpu_capability())]; }

}  // namespace keye_ops
