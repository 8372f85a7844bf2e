// The kernels of ../selftest on a GPU, by name, on arrays of the host.
#include "host_executor/selftest/cluster_sum.cuh"
#include "host_executor/selftest/gemm_mma.cuh"
#include "host_executor/selftest/gemm_wgmma_launch.h"
#include "host_executor/selftest/row_sums.cuh"
#include "host_executor/twin/run_on_gpu.h"

namespace keye_ops::selftest {
namespace {

using twin::DeviceArray;

// The arrays are the params' pointers, the numbers their integers, in order.
void run(const std::string& name, const std::vector<DeviceArray>& arrays, const int64_t* numbers,
         const twin::Shape& shape) {
  const auto integer = [numbers](int i) { return static_cast<int>(numbers[i]); };
  if (name == "gemm_mma") {
    const GemmMmaParams params{arrays[0].as<BFloat16>(),
                               arrays[1].as<BFloat16>(),
                               arrays[2].as<float>(),
                               integer(0),
                               integer(1),
                               integer(2)};
    run_kernel(&gemm_mma_kernel, shape, params);
  } else if (name == "gemm_wgmma") {
    run_kernel(&gemm_wgmma_kernel, shape,
               gemm_wgmma_params(arrays[0].as<BFloat16>(), arrays[1].as<BFloat16>(),
                                 arrays[2].as<BFloat16>(), numbers[0], numbers[1], numbers[2]));
  } else if (name == "cluster_sum") {
    run_kernel(&cluster_sum_kernel, shape,
               ClusterSumParams{arrays[0].as<float>(), arrays[1].as<float>(), integer(0)});
  } else if (name == "row_sums") {
    run_kernel(&row_sums_kernel, shape,
               RowSumsParams{arrays[0].as<float>(), arrays[1].as<float>(), arrays[2].as<float>(),
                             arrays[3].as<uint32_t>(), numbers[0], integer(1)});
  } else {
    KEYE_CHECK(false, "selftest: the name must be that of a kernel, got ", name);
  }
}

}  // namespace

// Null, or what went wrong. The shape: grid x and y, threads, shared bytes, cluster size.
extern "C" __attribute__((visibility("default"))) const char* selftest_run(
    const char* name, int num_arrays, void** arrays, const size_t* bytes, const int64_t* numbers,
    const uint32_t* shape) {
  return twin::error_of([&] {
    std::vector<DeviceArray> on_device;
    for (int i = 0; i < num_arrays; i++) on_device.emplace_back(arrays[i], bytes[i]);
    run(name, on_device, numbers, {dim3(shape[0], shape[1]), shape[2], shape[3], shape[4]});
    for (const DeviceArray& array : on_device) array.copy_back();
  });
}

}  // namespace keye_ops::selftest
