// Which of an op's GEMM kernels a GPU runs, of those that were built.
#pragma once

#include "common/device_facts.h"
#include "common/gemm_choice.h"

#if defined(KEYE_GEMM_SM80)
#define KEYE_SM80_GEMM(launcher) &launcher
#else
#define KEYE_SM80_GEMM(launcher) nullptr
#endif
#if defined(KEYE_GEMM_SM90)
#define KEYE_SM90_GEMM(launcher) &launcher
#else
#define KEYE_SM90_GEMM(launcher) nullptr
#endif

namespace keye_ops {

template <class Params>
using GemmLauncher = void (*)(const Params&, int device_index);

// Launches one of them, or none where torch's GEMM is to run.
template <class Params>
bool launch_built_gemm(std::string_view op, const Params& params, int device_index,
                       GemmLauncher<Params> sm80, GemmLauncher<Params> sm90) {
  const int capability = device_facts(device_index).capability;
  const GemmLauncher<Params> launcher = capability == 90 && sm90 != nullptr ? sm90
                                        : capability >= 80                  ? sm80
                                                                            : nullptr;
  if (launcher == nullptr || !prefers_fused(op, capability, params.gemm)) return false;
  launcher(params, device_index);
  return true;
}

}  // namespace keye_ops
