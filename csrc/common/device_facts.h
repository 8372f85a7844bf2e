// What launchers ask of a GPU, asked once.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>

#include "common/error.h"

namespace keye_ops {

struct DeviceFacts {
  int capability;  // 80, 90, ...
  int num_sms;
};

inline int device_attribute(cudaDeviceAttr attribute, int device_index) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device_index);
  KEYE_CHECK(error == cudaSuccess, "keye_ops: attributes of device ", device_index,
             " must be readable, got ", cudaGetErrorString(error));
  return value;
}

inline DeviceFacts device_facts(int device_index) {
  constexpr int kCached = 64;
  static std::array<std::atomic<int64_t>, kCached> cache{};  // capability << 32 | num_sms
  const bool cached = device_index >= 0 && device_index < kCached;
  int64_t word = cached ? cache[device_index].load(std::memory_order_relaxed) : 0;
  if (word == 0) {
    const int64_t capability =
        10 * device_attribute(cudaDevAttrComputeCapabilityMajor, device_index) +
        device_attribute(cudaDevAttrComputeCapabilityMinor, device_index);
    word = capability << 32 | device_attribute(cudaDevAttrMultiProcessorCount, device_index);
    if (cached) cache[device_index].store(word, std::memory_order_relaxed);
  }
  return {static_cast<int>(word >> 32), static_cast<int>(word & 0xffffffff)};
}

}  // namespace keye_ops
