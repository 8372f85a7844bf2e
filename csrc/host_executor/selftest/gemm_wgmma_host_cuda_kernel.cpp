#include "host_executor/kernels.h"
#include "host_executor/selftest/gemm_wgmma.cuh"
#include "host_executor/selftest/gemm_wgmma_launch.h"

namespace keye_ops::selftest {

static const bool kRegistered =
    host_executor::register_kernel("gemm_wgmma", [](const host_executor::Arguments& arguments) {
      const GemmWgmmaParams params =
          gemm_wgmma_params(arguments.array<BFloat16>("a"), arguments.array<BFloat16>("b"),
                            arguments.array<BFloat16>("c"), arguments.integer("m"),
                            arguments.integer("n"), arguments.integer("k"));
      return host_executor::bind_kernel(&gemm_wgmma_kernel, params);
    });

}  // namespace keye_ops::selftest
