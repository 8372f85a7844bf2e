// patch_embed's CUDA kernels on the host executor: a backend for tensors in the host's memory.
#pragma once

#include <optional>

#include "common/dtype.h"
#include "patch_embed/patch_embed.h"

namespace keye_ops {

void patch_embed_pack_host_cuda(const PixelRowsParams& params, std::optional<Dtype> pixels,
                                Dtype rows, int device_index);
void patch_embed_add_positions_host_cuda(const PatchEmbedParams& params, Dtype dtype,
                                         int device_index);
void patch_embed_cells_host_cuda(const PatchEmbedParams& params, int device_index);
void patch_embed_dtable_host_cuda(const PatchEmbedParams& params, Dtype dtype, int device_index);
int64_t patch_embed_num_parts_host_cuda(const PatchEmbedParams& params);
int64_t patch_embed_row_bytes_host_cuda();

}  // namespace keye_ops
