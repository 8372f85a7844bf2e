// patch_embed as one GEMM whose epilogue adds the bias and the positions: a launcher for every
// architecture that has its own.
#pragma once

#include "common/gemm.h"
#include "patch_embed/patch_embed.h"

namespace keye_ops {

struct PatchEmbedGemmParams {
  GemmParams gemm;  // rows [total, k], weight [hidden, k], out [total, hidden]
  PatchEmbedParams patches;
};

// Whether the kernels take it.
inline bool is_fit(const PatchEmbedGemmParams& params) {
  const PatchEmbedParams& patches = params.patches;
  return is_fit(params.gemm) && is_aligned(patches.bias) && is_aligned(patches.table) &&
         patches.side <= 46340;  // rows of the table are counted in int32
}

void patch_embed_sm80(const PatchEmbedGemmParams& params, int device_index);
void patch_embed_sm90(const PatchEmbedGemmParams& params, int device_index);

}  // namespace keye_ops
