#include "host_executor/kernels.h"
#include "host_executor/selftest/gemm_mma.cuh"

namespace keye_ops::selftest {

static const bool kRegistered =
    host_executor::register_kernel("gemm_mma", [](const host_executor::Arguments& arguments) {
      GemmMmaParams params{};
      params.a = arguments.array<BFloat16>("a");
      params.b = arguments.array<BFloat16>("b");
      params.c = arguments.array<float>("c");
      params.m = static_cast<int>(arguments.integer("m"));
      params.n = static_cast<int>(arguments.integer("n"));
      params.k = static_cast<int>(arguments.integer("k"));
      return host_executor::bind_kernel(&gemm_mma_kernel, params);
    });

}  // namespace keye_ops::selftest
