// The CPU instruction set to use, chosen at run time.
#pragma once

#include <cstddef>

namespace keye_ops {

enum class CpuCapability { kDefault = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmxBf16 = 4 };

// The best that this CPU and this build have. The environment variable KEYE_OPS_CPU_CAPABILITY
// (default, avx2, avx512, avx512_bf16, amx_bf16) forces one; throws if the CPU or the build lacks
// it.
CpuCapability cpu_capability();

// "default", "avx2", "avx512", "avx512_bf16" or "amx_bf16".
const char* cpu_capability_name();

}  // namespace keye_ops

// Kernel files are compiled once for every instruction set, each time into a namespace of its own:
// KEYE_ISA is set by the build to isa_default, isa_avx2, isa_avx512, isa_avx512_bf16 or
// isa_amx_bf16.
#if defined(KEYE_HAVE_X86_ISAS)
#define KEYE_DECLARE_FOR_ISAS(declaration) \
  namespace isa_default {                  \
  declaration;                             \
  }                                        \
  namespace isa_avx2 {                     \
  declaration;                             \
  }                                        \
  namespace isa_avx512 {                   \
  declaration;                             \
  }                                        \
  namespace isa_avx512_bf16 {              \
  declaration;                             \
  }                                        \
  namespace isa_amx_bf16 {                 \
  declaration;                             \
  }
#define KEYE_SELECT_ISA(function)                                                                \
  (::keye_ops::cpu_capability() == ::keye_ops::CpuCapability::kAmxBf16 ? &isa_amx_bf16::function \
   : ::keye_ops::cpu_capability() == ::keye_ops::CpuCapability::kAvx512Bf16                      \
       ? &isa_avx512_bf16::function                                                              \
   : ::keye_ops::cpu_capability() == ::keye_ops::CpuCapability::kAvx512 ? &isa_avx512::function  \
   : ::keye_ops::cpu_capability() == ::keye_ops::CpuCapability::kAvx2   ? &isa_avx2::function    \
                                                                        : &isa_default::function)
#else
#define KEYE_DECLARE_FOR_ISAS(declaration) \
  namespace isa_default {                  \
  declaration;                             \
  }
#define KEYE_SELECT_ISA(function) (::keye_ops::cpu_capability(), &isa_default::function)
#endif
