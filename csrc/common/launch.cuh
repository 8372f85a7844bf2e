// The one way to launch a kernel: on the tensor's device, on the current stream, within the
// device's limits, with the error raised; or, in a host build, on the executor, with its findings
// raised.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "common/dtype.h"
#include "common/error.h"
#include "common/error_word.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#else
#include "host_executor/executor.h"
#endif

namespace keye_ops {

constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;
constexpr int kMaxBlockThreads = 1024;

struct LaunchShape {
  int64_t num_blocks;
  int num_threads;
  size_t shared_bytes = 0;  // dynamic
  int cluster_size = 1;     // blocks
};

// Whether every launch waits for its kernel and raises what that reports (KEYE_OPS_VALIDATE=1).
inline const bool kValidates = [] {
  const char* value = std::getenv("KEYE_OPS_VALIDATE");
  return value != nullptr && std::strcmp(value, "1") == 0;
}();

#if defined(__CUDACC__)

// The error word of a device, for the params of kernels that read what only the device sees.
ErrorWord* error_word(int device_index);
// Waits for the device, and takes what its word holds.
ErrorWord take_error_word(int device_index);
// Waits for a stream of the current device and raises what its kernels have reported; not while a
// graph is captured.
void validate_launch(void* stream);

constexpr size_t kSharedBytesForAll = 48 * 1024;  // more must be asked for

template <class Params>
void launch_checked(const char* op, void (*kernel)(Params), const LaunchShape& shape,
                    int device_index, const Params& params) {
  const auto check = [&](cudaError_t error) {
    KEYE_CHECK(error == cudaSuccess, op, ": the launch of ", shape.num_blocks, " blocks of ",
               shape.num_threads, " threads with ", shape.shared_bytes,
               " bytes of shared memory must succeed, got ", cudaGetErrorString(error));
  };
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  if (shape.shared_bytes > kSharedBytesForAll) {
    int limit = 0;
    check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_index));
    KEYE_CHECK(shape.shared_bytes <= static_cast<size_t>(limit), op, ": a block on this GPU has ",
               limit, " bytes of shared memory at most, got ", shape.shared_bytes);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)));
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster_size), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.num_blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.num_threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = shape.cluster_size > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, params));
  if (kValidates) validate_launch(stream);
}

#else

inline ErrorWord* host_error_word() {
  return static_cast<ErrorWord*>(host_executor::device_variable("error_word", sizeof(ErrorWord)));
}
// A guarded copy of it, as of every tensor.
inline ErrorWord* error_word(int /*device_index*/) {
  return static_cast<ErrorWord*>(host_executor::guard(
      "error_word", host_error_word(), sizeof(ErrorWord), {}, host_executor::Role::kInOut));
}

inline void validate_launch(int device_index) {
  ErrorWord& word = *error_word(device_index);
  const ErrorWord found = word;
  word = {};
  KEYE_CHECK(found.code == 0, text_of(found));
}

template <class Params>
void launch_checked(const char* op, void (*kernel)(Params), const LaunchShape& shape,
                    int device_index, const Params& params) {
  struct Call {
    void (*kernel)(Params);
    const Params& params;
  };
  const Call call{kernel, params};
  host_executor::LaunchConfig config;
  config.grid.x = static_cast<uint32_t>(shape.num_blocks);
  config.block.x = static_cast<uint32_t>(shape.num_threads);
  config.cluster.x = static_cast<uint32_t>(shape.cluster_size);
  config.shared_bytes = shape.shared_bytes;
  const auto run = [](const void* context) {
    const Call& call = *static_cast<const Call*>(context);
    call.kernel(call.params);
  };
  const host_executor::Report report =
      host_executor::launch(config, run, &call, host_executor::default_schedule());
  host_executor::reports().push_back(report);
  KEYE_CHECK(report.findings.empty(), op, ": a launch on the host executor must have no findings, ",
             "got\n", report.text());
  if (kValidates) validate_launch(device_index);
}

#endif

template <class Params>
void launch(const char* op, void (*kernel)(Params), const LaunchShape& shape, int device_index,
            const Params& params) {
  KEYE_CHECK(shape.num_blocks >= 1 && shape.num_blocks <= kMaxGrid, op,
             ": a launch takes 1 to 2**31 - 1 blocks, got ", shape.num_blocks);
  KEYE_CHECK(shape.num_threads >= 1 && shape.num_threads <= kMaxBlockThreads, op,
             ": a block takes 1 to ", kMaxBlockThreads, " threads, got ", shape.num_threads);
  launch_checked(op, kernel, shape, device_index, params);
}

// ---- what every launcher needs ----

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f with a value of the C++ type of a dtype that kernels take.
template <class F>
void with_cuda_type_of(const char* op, Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat:
      return f(float{});
    case Dtype::kHalf:
      return f(Half{});
    case Dtype::kBFloat16:
      return f(BFloat16{});
    case Dtype::kDouble:
      KEYE_CHECK(false, op, ": dtype on CUDA must be fp32, fp16 or bf16, got torch.float64");
  }
}

}  // namespace keye_ops
