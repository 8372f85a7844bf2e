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

void patch_embed_sm80(const PatchEmbedGemmParams& params, int device_index);
void patch_embed_sm90(const PatchEmbedGemmParams& params, int device_index);

}  // namespace keye_ops
