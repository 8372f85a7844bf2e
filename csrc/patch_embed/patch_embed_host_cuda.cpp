// patch_embed on CPU tensors by its CUDA kernels, while a test wants it.
#include "patch_embed/patch_embed_host_cuda.h"

#include "patch_embed/patch_embed_op.h"

namespace keye_ops {
namespace {

PatchEmbedBackend& cpu_backend() { return patch_embed_backend(PatchEmbedDevice::kCpu); }

const PatchEmbedBackend kCpuBackend = cpu_backend();

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

KEYE_API void patch_embed_host_cuda_restore() { cpu_backend() = kCpuBackend; }
}

}  // namespace keye_ops
