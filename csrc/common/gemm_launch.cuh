// Launches a GEMM of CUTLASS as launch.cuh does a kernel: on the tensor's device, on the current
// stream, with the error raised.
#pragma once

#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include "common/gemm.h"
#include "common/launch.cuh"

namespace keye_ops {

template <class Gemm, class Arguments>
void launch_gemm(const char* op, const GemmParams& params, const Arguments& arguments,
                 int device_index) {
  const auto check = [&](const char* step, cutlass::Status status) {
    KEYE_CHECK(status == cutlass::Status::kSuccess, op, ": the GEMM of ", params.m, " x ", params.n,
               " x ", params.k, " must ", step, ", got ", cutlassGetStatusString(status));
  };
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  check("be of a shape that the kernel takes", Gemm::can_implement(arguments));
  const size_t workspace_bytes = Gemm::get_workspace_size(arguments);
  KEYE_CHECK(workspace_bytes == 0, op, ": the GEMM must need no workspace, got ", workspace_bytes,
             " bytes");
  Gemm gemm;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  check("be set up", gemm.initialize(arguments, nullptr, cuda_stream));
  check("be launched", gemm.run(cuda_stream));
  if (kValidates) validate_launch(stream);
}

}  // namespace keye_ops
