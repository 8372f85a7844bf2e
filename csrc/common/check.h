// Checks of torch's tensors, for the ops.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <string>

#include "common/dtype.h"
#include "common/error.h"

namespace keye_ops {

inline std::string shape_of(const torch::stable::Tensor& tensor) {
  std::ostringstream stream;
  const auto sizes = tensor.sizes();
  for (size_t i = 0; i < sizes.size(); i++) stream << (i == 0 ? "[" : ", ") << sizes[i];
  stream << (sizes.empty() ? "[]" : "]");
  return stream.str();
}

inline const char* dtype_name(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Bool:
      return "torch.bool";
    default:
      return "another dtype";
  }
}

inline bool is_floating(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  return dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

inline bool is_integer(torch::headeronly::ScalarType dtype) {
  return dtype == torch::headeronly::ScalarType::Int ||
         dtype == torch::headeronly::ScalarType::Long;
}

// Of a dtype that is_floating lets through.
inline Dtype float_dtype_of(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      return Dtype::kBFloat16;
  }
}

inline bool same_device(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return a.device().type() == b.device().type() && a.get_device_index() == b.get_device_index();
}

// 0 for a dimension of one, whose stride says nothing.
inline int64_t stride_of(const torch::stable::Tensor& tensor, int64_t dim) {
  return tensor.size(dim) > 1 ? tensor.stride(dim) : 0;
}

// Of a matrix; where there is one row, the row's length.
inline int64_t row_stride(const torch::stable::Tensor& matrix) {
  return matrix.size(0) > 1 ? matrix.stride(0) : matrix.size(1);
}

inline void check_floating(const char* op, const char* name, const torch::stable::Tensor& tensor) {
  KEYE_CHECK(is_floating(tensor.scalar_type()), op, ": ", name,
             " must be fp64, fp32, fp16 or bf16, got ", dtype_name(tensor.scalar_type()));
}

// As Python prints it: cpu, cuda:0.
inline std::string device_name(const torch::stable::Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return message(tensor.is_cuda() ? "cuda:" : "device:", tensor.get_device_index());
}

// The dtype and device of another tensor.
inline void check_same(const char* op, const char* name, const torch::stable::Tensor& tensor,
                       const char* other_name, const torch::stable::Tensor& other) {
  KEYE_CHECK(tensor.scalar_type() == other.scalar_type() && same_device(tensor, other), op, ": ",
             name, " must have the dtype and device of ", other_name, " (",
             dtype_name(other.scalar_type()), ", ", device_name(other), "), got ",
             dtype_name(tensor.scalar_type()), ", ", device_name(tensor));
}

inline void check_integer(const char* op, const char* name, const torch::stable::Tensor& tensor,
                          const torch::stable::Tensor& other) {
  KEYE_CHECK(is_integer(tensor.scalar_type()) && same_device(tensor, other), op, ": ", name,
             " must be int32 or int64 on the device of the other arguments, got ",
             dtype_name(tensor.scalar_type()));
}

}  // namespace keye_ops
