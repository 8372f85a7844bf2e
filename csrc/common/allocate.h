// New tensors, contiguous and uninitialised, by the C call: the boxed operator costs more.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace keye_ops {

// Asks for huge pages under fresh memory on the host, before it is first touched. An allocation of
// more than 32 MB is new to the process each time, and its page faults cost more than most ops.
inline void use_huge_pages(void* data, int64_t num_bytes) {
#if defined(__linux__)
  constexpr int64_t kHugePage = int64_t{2} << 20;
  if (num_bytes < 2 * kHugePage) return;
  const int64_t begin = (reinterpret_cast<int64_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const int64_t end = (reinterpret_cast<int64_t>(data) + num_bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline torch::stable::Tensor new_empty(const torch::stable::Tensor& like,
                                       const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  int32_t device_type = 0;
  int32_t device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype, device_type, device_index,
                                                  &handle));
  torch::stable::Tensor tensor(handle);
  if (device_type == aoti_torch_device_type_cpu()) {
    use_huge_pages(tensor.mutable_data_ptr(),
                   tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  }
  return tensor;
}

inline torch::stable::Tensor new_empty_like(const torch::stable::Tensor& like,
                                            const std::vector<int64_t>& sizes) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return new_empty(like, sizes, dtype);
}

inline torch::stable::Tensor new_empty_like(const torch::stable::Tensor& like) {
  const auto sizes = like.sizes();
  return new_empty_like(like, {sizes.begin(), sizes.end()});
}

}  // namespace keye_ops
