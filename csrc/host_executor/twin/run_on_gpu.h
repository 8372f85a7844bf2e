// Runs a kernel on arrays of the host, for Python: no torch, one launch at a time.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "common/error.h"
#include "host_executor/twin/twin.h"

namespace keye_ops::twin {

Twins sm80_twins();
Twins sm90_twins();

inline void check(cudaError_t error, const char* what) {
  KEYE_CHECK(error == cudaSuccess, what, " must succeed, got ", cudaGetErrorString(error));
}

// A copy on the device of host memory, copied back on request.
class DeviceArray {
 public:
  DeviceArray(void* host, size_t bytes) : host_(host), bytes_(bytes) {
    check(cudaMalloc(&device_, bytes), "cudaMalloc");
    check(cudaMemcpy(device_, host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  DeviceArray(DeviceArray&& other) noexcept
      : host_(other.host_), device_(other.device_), bytes_(other.bytes_) {
    other.device_ = nullptr;
  }
  ~DeviceArray() { cudaFree(device_); }
  void copy_back() const {
    check(cudaMemcpy(host_, device_, bytes_, cudaMemcpyDeviceToHost), "the kernel");
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(device_);
  }

 private:
  void* host_;
  void* device_ = nullptr;
  size_t bytes_;
};

struct Shape {
  dim3 grid;
  unsigned num_threads, shared_bytes, cluster_size;
};

template <class Params>
void run_kernel(void (*kernel)(Params), const Shape& shape, const Params& params) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shape.shared_bytes)),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {shape.cluster_size, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.num_threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster_size > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, params), "cudaLaunchKernelEx");
  check(cudaDeviceSynchronize(), "the kernel");
}

// What went wrong, or null; valid until the next call.
template <class F>
const char* error_of(const F& f) {
  static std::string message;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace keye_ops::twin
