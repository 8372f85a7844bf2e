// Errors: every message names the op, the requirement and the value received.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace keye_ops {

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream stream;
  ((stream << parts), ...);
  return stream.str();
}

// A macro, so that the message is built on failure only.
#define KEYE_CHECK(condition, ...) \
  if (!(condition)) throw std::runtime_error(::keye_ops::message(__VA_ARGS__))

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

}  // namespace keye_ops
