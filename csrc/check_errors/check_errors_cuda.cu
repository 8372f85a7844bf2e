// check_errors on CUDA: a word on every device, which exists from the start and never moves, so
// that CUDA graphs may hold its address.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "check_errors/check_errors_op.h"
#include "common/launch.cuh"

namespace keye_ops {
namespace {

__device__ ErrorWord device_error_word;

void check(cudaError_t error) {
  KEYE_CHECK(error == cudaSuccess, "check_errors: the device must give its error word, got ",
             cudaGetErrorString(error));
}

// On the current device, once it has nothing left to do.
ErrorWord take_current() {
  ErrorWord word, empty{};
  check(cudaMemcpyFromSymbol(&word, device_error_word, sizeof(word)));
  if (word.code != 0) check(cudaMemcpyToSymbol(device_error_word, &empty, sizeof(empty)));
  return word;
}

ErrorWord take(int device_index) {
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  check(cudaDeviceSynchronize());
  return take_current();
}

const bool kRegistered = [] {
  take_cuda_error_word() = &take;
  return true;
}();

}  // namespace

ErrorWord* error_word(int device_index) {
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  void* address = nullptr;
  check(cudaGetSymbolAddress(&address, device_error_word));
  return static_cast<ErrorWord*>(address);
}

void validate_launch(void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(cuda_stream, &capturing));
  if (capturing != cudaStreamCaptureStatusNone) return;
  check(cudaStreamSynchronize(cuda_stream));
  const ErrorWord word = take_current();
  KEYE_CHECK(word.code == 0, text_of(word));
}

}  // namespace keye_ops
