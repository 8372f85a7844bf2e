// patch_embed: the host side that all devices share. Arguments are checked here, above the kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/backend.h"
#include "common/export.h"
#include "patch_embed/patch_embed.h"

namespace keye_ops {

enum class PatchEmbedDevice { kCpu = 0, kCuda = 1 };

// What a device offers. Launchers trust their params.
struct PatchEmbedBackend {
  void (*pack)(const PixelRowsParams&, torch::headeronly::ScalarType pixels,
               torch::headeronly::ScalarType rows, int device_index);
  void (*add_positions)(const PatchEmbedParams&, torch::headeronly::ScalarType, int device_index);
  void (*backward)(const PatchEmbedParams&, torch::headeronly::ScalarType, int device_index);
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
