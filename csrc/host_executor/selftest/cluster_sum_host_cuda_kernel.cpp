#include "host_executor/kernels.h"
#include "host_executor/selftest/cluster_sum.cuh"

namespace keye_ops::selftest {

static const bool kRegistered =
    host_executor::register_kernel("cluster_sum", [](const host_executor::Arguments& arguments) {
      const ClusterSumParams params{arguments.array<float>("x"), arguments.array<float>("out"),
                                    static_cast<int>(arguments.integer("slice"))};
      return host_executor::bind_kernel(&cluster_sum_kernel, params);
    });

}  // namespace keye_ops::selftest
