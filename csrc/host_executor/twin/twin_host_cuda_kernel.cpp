#include "host_executor/kernels.h"
#include "host_executor/twin/memory.cuh"
#include "host_executor/twin/sm90.cuh"
#include "host_executor/twin/warp.cuh"
#include "host_executor/twin/wgmma.cuh"

namespace keye_ops::twin {
namespace {

// NOTE: variables of the namespace: guards of those in functions would need more of the
// sanitizer's runtime than the executor has.
const Twins kTwins = [] {
  Twins twins;
  add_warp_twins(twins);
  add_memory_twins(twins);
  add_sm90_twins(twins);
  add_wgmma_twins(twins);
  for (const Twin& twin : twins) {
    host_executor::register_kernel(
        "twin " + twin.name, [twin](const host_executor::Arguments& arguments) {
          return host_executor::bind_kernel(
              twin.kernel, twin_params(twin, arguments.array<const uint32_t>("in"),
                                       arguments.array<uint32_t>("out")));
        });
  }
  return twins;
}();

const std::string kList = describe(kTwins);

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* twin_list() { return kList.c_str(); }

}  // namespace keye_ops::twin
