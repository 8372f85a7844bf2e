// Pieces of one block of scratch memory.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace keye_ops {

// Gives out aligned pieces one after another; without memory it only counts what is used.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class X>
  KEYE_HOST_DEVICE X* take(int64_t count) {
    constexpr int64_t kAlign = 64;
    X* piece = base == nullptr ? nullptr : reinterpret_cast<X*>(base + used);
    used += (count * static_cast<int64_t>(sizeof(X)) + kAlign - 1) / kAlign * kAlign;
    return piece;
  }
};

}  // namespace keye_ops
