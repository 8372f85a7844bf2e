// patch_embed's GEMM for sm_90a.
#include "common/gemm_sm90.cuh"
#include "patch_embed/patch_embed_gemm.h"
#include "patch_embed/patch_embed_sm90.cuh"

namespace keye_ops {

void patch_embed_sm90(const PatchEmbedGemmParams& params, int device_index) {
  using Epilogue = PatchEmbedSm90Values<Sm90Tile, GemmElement>;
  Sm90Gemm<Epilogue>::launch("patch_embed", params.gemm, params.patches, device_index);
}

}  // namespace keye_ops
