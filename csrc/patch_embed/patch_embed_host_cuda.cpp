// patch_embed on CPU tensors by its CUDA kernels, while a test wants it.
#include "patch_embed/patch_embed_host_cuda.h"

#include "common/gemm_host_cuda.h"
#include "patch_embed/patch_embed_op.h"

namespace keye_ops {
namespace {

PatchEmbedBackend& cpu_backend() { return patch_embed_backend(PatchEmbedDevice::kCpu); }

const PatchEmbedBackend kCpuBackend = cpu_backend();

bool fused_host_cuda(const PatchEmbedGemmParams& params, int /*device_index*/) {
  const PatchEmbedParams& patches = params.patches;
  const auto* bias = static_cast<const BFloat16*>(patches.bias);
  const auto* table = static_cast<const BFloat16*>(patches.table);
  const auto epilogue = [&](double product, int64_t patch, int64_t column) {
    const auto taps = patch_taps<double>(patches, image_of(patches, patch), patch);
    if (!taps.good) return 0.0;
    double corners[4];
    for (int i = 0; i < 4; i++) corners[i] = load(table + taps.rows[i] * patches.hidden + column);
    const double added = bias == nullptr ? 0.0 : load(bias + column);
    return add_position(product, added, corners, taps.shares);
  };
  return multiply_host_cuda("patch_embed", params.gemm, epilogue);
}

}  // namespace

extern "C" {

KEYE_API void patch_embed_host_cuda_install() {
  cpu_backend() = {&patch_embed_pack_host_cuda,
                   &patch_embed_add_positions_host_cuda,
                   /*fused=*/nullptr,
                   &patch_embed_dtable_host_cuda,
                   &patch_embed_cells_host_cuda,
                   &patch_embed_num_parts_host_cuda,
                   /*packs_any_dtype=*/false,
                   patch_embed_row_bytes_host_cuda(),
                   kCudaTraits};
}

// After the other: with a stand-in for the fused GEMM.
KEYE_API void patch_embed_host_cuda_install_fused() { cpu_backend().fused = &fused_host_cuda; }

KEYE_API void patch_embed_host_cuda_restore() { cpu_backend() = kCpuBackend; }
}

}  // namespace keye_ops
