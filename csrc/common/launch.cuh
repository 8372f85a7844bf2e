// The one way to launch a kernel: on the tensor's device, on the current stream, with the error
// raised.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>

#include "common/check.h"

namespace keye_ops {

constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;

template <class Params>
void launch(const char* op, void (*kernel)(Params), int64_t num_blocks, int num_threads,
            int device_index, const Params& params) {
  KEYE_CHECK(num_blocks >= 1 && num_blocks <= kMaxGrid, op,
             ": a launch takes 1 to 2**31 - 1 blocks, got ", num_blocks);
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  kernel<<<static_cast<unsigned>(num_blocks), num_threads, 0, static_cast<cudaStream_t>(stream)>>>(
      params);
  const cudaError_t error = cudaGetLastError();
  KEYE_CHECK(error == cudaSuccess, op, ": the launch of ", num_blocks, " blocks of ", num_threads,
             " threads must succeed, got ", cudaGetErrorString(error));
}

}  // namespace keye_ops
