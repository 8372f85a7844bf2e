// patch_embed on the CPU: the kernels, compiled once for every instruction set.
#pragma once

#include <cstdint>

#include "common/cpu_capability.h"
#include "common/dtype.h"
#include "patch_embed/patch_embed.h"

namespace keye_ops {

constexpr int64_t kPatchEmbedColumns = 64;  // of the table's gradient, summed by one thread

// Patches [begin, end); the pixels are bytes or of a floating dtype.
KEYE_DECLARE_FOR_ISAS(void pack_bytes(const PixelRowsParams&, Dtype rows, int64_t begin,
                                      int64_t end))
KEYE_DECLARE_FOR_ISAS(void pack_floats(const PixelRowsParams&, Dtype pixels, Dtype rows,
                                       int64_t begin, int64_t end))
KEYE_DECLARE_FOR_ISAS(void patch_embed_add_positions(const PatchEmbedParams&, Dtype, int64_t begin,
                                                     int64_t end))
// A block of columns of dtable and dbias. Sums is [side**2 + 1, kPatchEmbedColumns].
KEYE_DECLARE_FOR_ISAS(void patch_embed_backward_columns(const PatchEmbedParams&, Dtype,
                                                        int64_t block, double* sums))

}  // namespace keye_ops
