// patch_embed: the host side that all devices share. Arguments are checked here, above the kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/backend.h"
#include "common/dtype.h"
#include "common/export.h"
#include "patch_embed/patch_embed.h"
#include "patch_embed/patch_embed_gemm.h"

namespace keye_ops {

enum class PatchEmbedDevice { kCpu = 0, kCuda = 1 };

// What a device offers. Launchers trust their params.
struct PatchEmbedBackend {
  // Pixels without a dtype are bytes. Others are of the weight's dtype or fp32, or of any.
  void (*pack)(const PixelRowsParams&, std::optional<Dtype> pixels, Dtype rows, int device_index);
  void (*add_positions)(const PatchEmbedParams&, Dtype, int device_index);
  // Product, bias and positions in one GEMM of bf16, or false where torch's GEMM and the pass are
  // to run; null without any.
  bool (*fused)(const PatchEmbedGemmParams&, int device_index);
  // The gradients of the table and the bias; or, of a backend with `cells`, of the table by patches
  // that are sorted by those, in num_parts parts.
  void (*backward)(const PatchEmbedParams&, Dtype, int device_index);
  void (*cells)(const PatchEmbedParams&, int device_index);
  int64_t (*num_parts)(const PatchEmbedParams&);
  bool packs_any_dtype;
  int64_t row_bytes;  // rows of pixels and of the weight start at multiples of so many
  BackendTraits traits;
};

// The entry of a device, which its library fills when it registers the ops below.
KEYE_API PatchEmbedBackend& patch_embed_backend(PatchEmbedDevice device);

KEYE_API torch::stable::Tensor patch_embed(
    const torch::stable::Tensor& pixel_values, const torch::stable::Tensor& weight,
    std::optional<torch::stable::Tensor> bias, const torch::stable::Tensor& position_embedding,
    const torch::stable::Tensor& grid, const torch::stable::Tensor& image_offsets,
    const torch::stable::Tensor& position_ids, bool align_corners, std::vector<double> image_mean,
    std::vector<double> image_std);

KEYE_API std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
                    torch::stable::Tensor>
patch_embed_backward(const torch::stable::Tensor& dout, const torch::stable::Tensor& pixel_values,
                     const torch::stable::Tensor& weight,
                     const torch::stable::Tensor& position_embedding,
                     const torch::stable::Tensor& grid, const torch::stable::Tensor& image_offsets,
                     const torch::stable::Tensor& position_ids, bool needs_dpixels, bool has_bias,
                     bool align_corners, std::vector<double> image_mean,
                     std::vector<double> image_std);

}  // namespace keye_ops
