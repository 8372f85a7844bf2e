// patch_embed on CUDA: registration.
#include <torch/csrc/stable/library.h>

#include "common/gemm_kernels.h"
#include "patch_embed/patch_embed_launch.cuh"
#include "patch_embed/patch_embed_op.h"

namespace keye_ops {
namespace {

bool fused(const PatchEmbedGemmParams& given, int device_index) {
  PatchEmbedGemmParams params = given;
  params.patches.error_word = error_word(device_index);
  return launch_built_gemm<PatchEmbedGemmParams>("patch_embed", params, device_index,
                                                 KEYE_SM80_GEMM(patch_embed_sm80),
                                                 KEYE_SM90_GEMM(patch_embed_sm90));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(keye_ops, CUDA, m) {
  patch_embed_backend(PatchEmbedDevice::kCuda) = {&launch_pack,
                                                  &launch_add_positions,
                                                  &fused,
                                                  &launch_dtable,
                                                  &launch_cells,
                                                  &patch_embed_num_parts,
                                                  /*packs_any_dtype=*/false,
                                                  /*row_bytes=*/kVectorBytes,
                                                  kCudaTraits};
  m.impl("patch_embed", TORCH_BOX(&patch_embed));
  m.impl("patch_embed_backward", TORCH_BOX(&patch_embed_backward));
}

}  // namespace keye_ops
