// The floating dtypes that every op takes on the CPU.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace keye_ops {

// 16-bit floats as they lie in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

enum class Dtype { kDouble, kFloat, kHalf, kBFloat16 };

constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2;
}

// Calls f with a value of the C++ type, whose type alone matters.
template <class F>
KEYE_HOST_DEVICE auto with_type_of(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kDouble:
      return f(double{});
    case Dtype::kFloat:
      return f(float{});
    case Dtype::kHalf:
      return f(Half{});
    default:
      return f(BFloat16{});
  }
}

}  // namespace keye_ops
