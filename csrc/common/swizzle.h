// The swizzles of shared memory that TMA, wgmma and conflict-free ldmatrix share.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace keye_ops {

// The span in bytes within which 16-byte chunks change places; as CUtensorMapSwizzle counts.
enum class Swizzle : uint32_t { kNone, k32, k64, k128 };

KEYE_HOST_DEVICE constexpr uint32_t swizzle_span(Swizzle swizzle) {
  return 16u << static_cast<uint32_t>(swizzle);
}

// Where the byte at an offset from memory aligned to 1024 lies: the chunk's index within the span
// is XORed with the index of the 128-byte line. The pattern has a period of 8 spans.
KEYE_HOST_DEVICE constexpr uint32_t swizzled(Swizzle swizzle, uint32_t offset) {
  return offset ^ (offset >> 3 & (swizzle_span(swizzle) - 16));
}

}  // namespace keye_ops
