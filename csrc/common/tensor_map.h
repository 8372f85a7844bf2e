// Describes a tensor to TMA, for a GPU and for the host executor by the same rules.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/error.h"
#include "common/ptx/tma.cuh"
#include "common/swizzle.h"

namespace keye_ops {

struct TensorMapSpec {
  const char* name;              // of the op and the tensor, for errors
  const void* base;              // aligned to 16 bytes
  int element_size;              // bytes: 1, 2, 4 or 8
  std::vector<int64_t> sizes;    // dimension 0 has unit stride
  std::vector<int64_t> strides;  // bytes, multiples of 16, of dimensions 1 and up
  std::vector<int64_t> box;      // what one copy moves
  Swizzle swizzle;
};

inline void check_tensor_map(const TensorMapSpec& spec) {
  constexpr int64_t kMaxSize = int64_t{1} << 32, kMaxStride = int64_t{1} << 40;
  const size_t rank = spec.sizes.size();
  KEYE_CHECK(rank >= 1 && rank <= 5, spec.name, ": TMA takes 1 to 5 dimensions, got ", rank);
  KEYE_CHECK(spec.strides.size() == rank - 1 && spec.box.size() == rank, spec.name,
             ": TMA takes a stride for every dimension but the first and a box of ", rank,
             " dimensions, got ", spec.strides.size(), " and ", spec.box.size());
  const int element_size = spec.element_size;
  KEYE_CHECK(element_size == 1 || element_size == 2 || element_size == 4 || element_size == 8,
             spec.name, ": TMA takes elements of 1, 2, 4 or 8 bytes, got ", element_size);
  const auto address = reinterpret_cast<uintptr_t>(spec.base);
  KEYE_CHECK(address % 16 == 0, spec.name, ": TMA takes an address aligned to 16 bytes, got ",
             address);
  for (size_t i = 0; i < rank; i++) {
    KEYE_CHECK(spec.sizes[i] >= 1 && spec.sizes[i] <= kMaxSize, spec.name,
               ": TMA takes sizes of 1 to 2**32, got ", spec.sizes[i], " in dimension ", i);
    KEYE_CHECK(spec.box[i] >= 1 && spec.box[i] <= 256, spec.name,
               ": TMA takes boxes of 1 to 256 elements, got ", spec.box[i], " in dimension ", i);
  }
  for (size_t i = 0; i + 1 < rank; i++) {
    const int64_t stride = spec.strides[i];
    KEYE_CHECK(stride >= 0 && stride < kMaxStride && stride % 16 == 0, spec.name,
               ": TMA takes strides of multiples of 16 bytes up to 2**40, got ", stride,
               " in dimension ", i + 1);
  }
  const int64_t row = spec.box[0] * element_size;
  KEYE_CHECK(row % 16 == 0, spec.name, ": TMA takes boxes of rows of a multiple of 16 bytes, got ",
             row);
  const int64_t span = swizzle_span(spec.swizzle);
  KEYE_CHECK(spec.swizzle == Swizzle::kNone || row <= span, spec.name,
             ": a box's rows must fit the swizzle of ", span, " bytes, got ", row);
}

inline TensorMap make_tensor_map(const TensorMapSpec& spec) {
  check_tensor_map(spec);
  const size_t rank = spec.sizes.size();
  TensorMap map;
#if defined(__CUDACC__)
  cuuint64_t sizes[5], strides[5];
  cuuint32_t box[5], element_strides[5];
  for (size_t i = 0; i < rank; i++) {
    sizes[i] = static_cast<cuuint64_t>(spec.sizes[i]);
    strides[i] = i + 1 < rank ? static_cast<cuuint64_t>(spec.strides[i]) : 0;
    box[i] = static_cast<cuuint32_t>(spec.box[i]);
    element_strides[i] = 1;
  }
  const CUtensorMapDataType type = spec.element_size == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : spec.element_size == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16
                                   : spec.element_size == 4 ? CU_TENSOR_MAP_DATA_TYPE_UINT32
                                                            : CU_TENSOR_MAP_DATA_TYPE_UINT64;

  // The driver is asked for the function, once: the library must load where there is none.
  static const auto encode = [&spec] {
    constexpr unsigned kSinceCuda = 12000;
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &function, kSinceCuda, cudaEnableDefault, &found);
    KEYE_CHECK(error == cudaSuccess && found == cudaDriverEntryPointSuccess, spec.name,
               ": the driver must have cuTensorMapEncodeTiled, got ", cudaGetErrorString(error));
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  const CUresult result = encode(
      &map, type, static_cast<cuuint32_t>(rank), const_cast<void*>(spec.base), sizes, strides, box,
      element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(spec.swizzle),
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  KEYE_CHECK(result == CUDA_SUCCESS, spec.name, ": cuTensorMapEncodeTiled must succeed, got error ",
             static_cast<int>(result));
#else
  map.base = const_cast<void*>(spec.base);
  map.rank = static_cast<uint32_t>(rank);
  map.element_size = static_cast<uint32_t>(spec.element_size);
  map.swizzle = static_cast<host_executor::Swizzle>(spec.swizzle);
  for (size_t i = 0; i < rank; i++) {
    map.sizes[i] = static_cast<uint64_t>(spec.sizes[i]);
    map.strides[i] = static_cast<uint64_t>(i == 0 ? spec.element_size : spec.strides[i - 1]);
    map.box[i] = static_cast<uint32_t>(spec.box[i]);
  }
#endif
  return map;
}

}  // namespace keye_ops
