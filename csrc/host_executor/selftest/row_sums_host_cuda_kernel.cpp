#include "host_executor/kernels.h"
#include "host_executor/selftest/row_sums.cuh"

namespace keye_ops::selftest {

static const bool kRegistered =
    host_executor::register_kernel("row_sums", [](const host_executor::Arguments& arguments) {
      const RowSumsParams params{
          arguments.array<float>("x"),     arguments.array<float>("sums"),
          arguments.array<float>("total"), arguments.array<uint32_t>("arrived"),
          arguments.integer("x_stride"),   static_cast<int>(arguments.integer("columns"))};
      return host_executor::bind_kernel(&row_sums_kernel, params);
    });

}  // namespace keye_ops::selftest
