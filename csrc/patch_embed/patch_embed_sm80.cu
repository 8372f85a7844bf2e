// patch_embed's GEMM for every GPU from sm_80 on that has none of its own.
#include "common/gemm_sm80.cuh"
#include "patch_embed/patch_embed_gemm.h"
#include "patch_embed/patch_embed_sm80.cuh"

namespace keye_ops {

void patch_embed_sm80(const PatchEmbedGemmParams& params, int device_index) {
  using Values = PatchEmbedSm80Values<Sm80ThreadMap, Sm80Tile::kM, Sm80Tile::kN>;
  Sm80Gemm<Values>::launch("patch_embed", params.gemm, params.patches, device_index);
}

}  // namespace keye_ops
