// The twins on a GPU, by name: those that Ampere runs, and the library's C functions.
#include "host_executor/twin/memory.cuh"
#include "host_executor/twin/run_on_gpu.h"
#include "host_executor/twin/warp.cuh"

namespace keye_ops::twin {

Twins sm80_twins() {
  Twins twins;
  add_warp_twins(twins);
  add_memory_twins(twins);
  return twins;
}

namespace {

// Those that this GPU can run.
const Twins& twins_of_device() {
  static const Twins twins = [] {
    Twins list = sm80_twins();
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0),
          "cudaDeviceGetAttribute");
    if (major == 9) {
      for (const Twin& twin : sm90_twins()) list.push_back(twin);
    }
    return list;
  }();
  return twins;
}

}  // namespace

// Null where there is no GPU.
extern "C" __attribute__((visibility("default"))) const char* twin_list() {
  static std::string text;
  return error_of([] { text = describe(twins_of_device()); }) == nullptr ? text.c_str() : nullptr;
}

// Null, or what went wrong. The seed is that of the host executor's schedule.
extern "C" __attribute__((visibility("default"))) const char* twin_run(const char* name,
                                                                       uint32_t* in, uint32_t* out,
                                                                       uint64_t /*seed*/) {
  return error_of([&] {
    const Twin& twin = find_twin(twins_of_device(), name);
    const DeviceArray device_in(in, twin.in_words * 4), device_out(out, twin.out_words * 4);
    const Shape shape{dim3(twin.grid[0], twin.grid[1], twin.grid[2]), twin.num_threads,
                      twin.shared_bytes, twin.cluster_size};
    run_kernel(twin.kernel, shape,
               twin_params(twin, device_in.as<uint32_t>(), device_out.as<uint32_t>()));
    device_out.copy_back();
  });
}

}  // namespace keye_ops::twin
