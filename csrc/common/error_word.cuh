// How a kernel reports a bad value.
#pragma once

#include "common/error_word.h"
#include "common/memory.cuh"

namespace keye_ops {

// The first report stays; its value is whole once the kernel has ended.
KEYE_DEVICE void report_error(ErrorWord* word, DeviceError error, double value) {
  const auto code = static_cast<uint32_t>(error);
  if (atomic_compare_and_swap(&word->code, uint32_t{0}, code) == 0) word->value = value;
}

}  // namespace keye_ops
