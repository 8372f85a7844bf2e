// patchify on the CPU: the kernel, compiled once for every instruction set.
#pragma once

#include <cstdint>

#include "common/cpu_capability.h"
#include "patchify/patchify.h"

namespace keye_ops {

constexpr int kPatchifyRows = 16;     // source rows that are filtered at a time
constexpr int kPatchifyColumns = 64;  // output columns for which they are turned on their side

// The windows and weights of an axis.
struct PatchifyTable {
  const int32_t* first;  // [size]
  const int32_t* count;  // [size]
  const void* weights;   // [size, taps], int32 or fp32
  int taps;
};

struct PatchifyCpuParams {
  PatchifyParams patchify;
  PatchifyTable across, down;
  int pitch;         // of a row of one channel, between the passes
  int ring_rows;     // rows that are kept between the passes
  int turned_bytes;  // of a row's part behind kPatchifyColumns
};

// What a thread needs: bytes.
KEYE_DECLARE_FOR_ISAS(int64_t patchify_scratch_bytes(const PatchifyCpuParams&))
// Rows of patches [begin, end) of a frame.
KEYE_DECLARE_FOR_ISAS(void patchify_bands(const PatchifyCpuParams&, int64_t frame, int begin,
                                          int end, char* scratch))

}  // namespace keye_ops
