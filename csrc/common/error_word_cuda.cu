// The error word on CUDA: one on every device, from the start and at one place, so that CUDA graphs
// may hold its address.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <atomic>

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

}  // namespace

ErrorWord* error_word(int device_index) {
  constexpr int kCached = 64;  // devices; more than any machine has
  static std::atomic<void*> addresses[kCached];
  std::atomic<void*>* cached = device_index < kCached ? &addresses[device_index] : nullptr;
  void* address = cached != nullptr ? cached->load() : nullptr;
  if (address == nullptr) {
    const torch::stable::accelerator::DeviceGuard guard(device_index);
    check(cudaGetSymbolAddress(&address, device_error_word));
    if (cached != nullptr) cached->store(address);
  }
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

ErrorWord take_error_word(int device_index) {
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  check(cudaDeviceSynchronize());
  return take_current();
}

}  // namespace keye_ops
