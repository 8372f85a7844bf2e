// patch_embed: schema, argument checks, and the passes around torch's matrix products.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "common/allocate.h"
#include "common/aten.h"
#include "common/check.h"
#include "common/grid.h"
#include "common/partial_sums.h"
#include "patch_embed/patch_embed_op.h"

namespace keye_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "patch_embed";

// The values of a patch, however they are arranged.
int64_t inner_size(const Tensor& tensor) {
  int64_t inner = 1;
  for (int64_t i = 1; i < tensor.dim(); i++) inner *= tensor.size(i);
  return inner;
}

std::vector<int64_t> shape_vector(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

void check_contiguous(const char* name, const Tensor& tensor) {
  KEYE_CHECK(tensor.is_contiguous(), kOp, ": ", name, " must be contiguous, got strides [",
             tensor.stride(0), ", ", tensor.stride(1), "...]");
}

PatchEmbedBackend& backend_of(const Tensor& tensor) {
  return patch_embed_backend(tensor.is_cpu() ? PatchEmbedDevice::kCpu : PatchEmbedDevice::kCuda);
}

// On the host: every place is one of its image.
void check_position_values(const PatchEmbedParams& params) {
  int64_t image = 0;
  for (int64_t patch = 0; patch < params.total; patch++) {
    while (patch >= params.image_offsets[image + 1]) image++;
    const int64_t row = position_of(params, patch, 0), column = position_of(params, patch, 1);
    const bool good = row >= 0 && column >= 0 && row < params.grid[3 * image + 1] &&
                      column < params.grid[3 * image + 2];
    KEYE_CHECK(good, kOp, ": position_ids must lie inside their image's grid, got [", row, ", ",
               column, "]");
  }
}

void check_normalisation(const Tensor& pixel_values, const Tensor& weight,
                         const std::vector<double>& mean, const std::vector<double>& std) {
  if (pixel_values.scalar_type() != ScalarType::Byte) return;
  const size_t channels = weight.dim() == 4 ? weight.size(1) : 3;
  KEYE_CHECK(mean.size() == channels && std.size() == channels, kOp,
             ": image_mean and image_std must have ", channels, " values for uint8 pixels, got (",
             mean.size(), ", ", std.size(), ")");
  KEYE_CHECK(channels > 0 && inner_size(weight) % channels == 0, kOp,
             ": weight must have channels of equal size for uint8 pixels, got ", shape_of(weight));
  for (double x : std) KEYE_CHECK(x != 0, kOp, ": image_std must not hold 0, got ", x);
}

// Checks all but the gradient, and describes the positions.
PatchEmbedParams patch_embed_params(const Tensor& pixel_values, const Tensor& weight,
                                    const std::optional<Tensor>& bias, const Tensor& table,
                                    const Tensor& grid, const Tensor& image_offsets,
                                    const Tensor& position_ids, bool align_corners,
                                    const std::vector<double>& mean,
                                    const std::vector<double>& std) {
  check_floating(kOp, "weight", weight);
  KEYE_CHECK(weight.dim() == 2 || weight.dim() == 4, kOp,
             ": weight must be [C, 3, 14, 14] or [C, K], got ", shape_of(weight));
  const int64_t hidden = weight.size(0), inner = inner_size(weight);
  if (pixel_values.scalar_type() != ScalarType::Byte) {
    check_floating(kOp, "pixel_values (unless uint8)", pixel_values);
  }
  KEYE_CHECK(same_device(pixel_values, weight), kOp, ": pixel_values must be on ",
             device_name(weight), ", got ", device_name(pixel_values));
  KEYE_CHECK(pixel_values.dim() >= 2 && inner_size(pixel_values) == inner, kOp,
             ": pixel_values must be [N, ...] with ", inner, " values a patch, got ",
             shape_of(pixel_values));
  KEYE_CHECK(position_ids.dim() == 2 && position_ids.size(1) == 2, kOp,
             ": position_ids must be [N, 2], got ", shape_of(position_ids));
  const int64_t total = position_ids.size(0);
  KEYE_CHECK(pixel_values.size(0) == total, kOp, ": pixel_values must hold the ", total,
             " patches of the grid, got ", pixel_values.size(0));
  if (bias.has_value()) {
    KEYE_CHECK(bias->dim() == 1 && bias->size(0) == hidden, kOp, ": bias must be [", hidden,
               "], got ", shape_of(*bias));
    check_same(kOp, "bias", *bias, "weight", weight);
    KEYE_CHECK(bias->is_contiguous(), kOp, ": bias must be contiguous, got stride ",
               bias->stride(0));
  }
  KEYE_CHECK(table.dim() == 2 && table.size(1) == hidden, kOp,
             ": position_embedding must be [S*S, ", hidden, "], got ", shape_of(table));
  check_same(kOp, "position_embedding", table, "weight", weight);
  const int64_t side = std::llround(std::sqrt(static_cast<double>(table.size(0))));
  KEYE_CHECK(side > 0 && side * side == table.size(0), kOp,
             ": position_embedding must have a square number of rows, got ", table.size(0));
  KEYE_CHECK(is_integer(position_ids.scalar_type()) && same_device(position_ids, weight), kOp,
             ": position_ids must be int32 or int64 on ", device_name(weight), ", got ",
             dtype_name(position_ids.scalar_type()), " on ", device_name(position_ids));
  const bool check_values = backend_of(weight).traits.checks_values;
  check_grid(kOp, grid, image_offsets, weight, total, 1, check_values);
  check_normalisation(pixel_values, weight, mean, std);
  check_contiguous("weight", weight);
  check_contiguous("position_embedding", table);

  PatchEmbedParams params{};
  params.table = table.const_data_ptr();
  params.grid = grid.const_data_ptr<int32_t>();
  params.image_offsets = image_offsets.const_data_ptr<int32_t>();
  params.position_ids = position_ids.const_data_ptr();
  params.position_stride = stride_of(position_ids, 0);
  params.axis_stride = stride_of(position_ids, 1);
  params.total = total;
  params.hidden = hidden;
  params.num_images = grid.size(0);
  params.side = side;
  params.wide_ids = position_ids.scalar_type() == ScalarType::Long;
  params.align_corners = align_corners;
  if (check_values) check_position_values(params);
  return params;
}

// Whether the values of a patch lie one after another.
bool has_whole_patches(const Tensor& pixel_values) {
  int64_t stride = 1;
  for (int64_t i = pixel_values.dim() - 1; i > 0; i--) {
    if (pixel_values.size(i) > 1 && pixel_values.stride(i) != stride) return false;
    stride *= pixel_values.size(i);
  }
  return true;
}

// A matrix product's operands: pixels [N, K'] and the weight [C, K'], with zeros from K on. K' is K
// unless a device wants longer rows.
struct Operands {
  Tensor rows, weight;
};

// Whether every patch starts at a multiple of so many bytes.
bool is_aligned(const Tensor& pixels, int64_t bytes) {
  const int64_t stride = stride_of(pixels, 0) * static_cast<int64_t>(pixels.element_size());
  return reinterpret_cast<int64_t>(pixels.const_data_ptr()) % bytes == 0 && stride % bytes == 0;
}

Tensor pixels_to_pack(const PatchEmbedBackend& backend, const Tensor& pixel_values,
                      const Tensor& weight) {
  const Tensor pixels =
      has_whole_patches(pixel_values) ? pixel_values : torch::stable::contiguous(pixel_values);
  const ScalarType dtype = pixels.scalar_type();
  const bool taken = backend.packs_any_dtype || dtype == ScalarType::Byte ||
                     dtype == ScalarType::Float || dtype == weight.scalar_type();
  return taken ? pixels : torch::stable::to(pixels, weight.scalar_type());
}

// Pixels as rows in the weight's dtype: views where they are that already. The weight is left out
// unless it is wanted.
Operands operands(const Tensor& pixel_values, const Tensor& weight, const std::vector<double>& mean,
                  const std::vector<double>& std, bool wants_weight) {
  const PatchEmbedBackend& backend = backend_of(weight);
  const int64_t total = pixel_values.size(0), hidden = weight.size(0), inner = inner_size(weight);
  const int64_t values =
      std::max<int64_t>(1, backend.row_bytes / static_cast<int64_t>(weight.element_size()));
  const int64_t padded = (inner + values - 1) / values * values;
  const bool pads_weight = wants_weight && padded != inner;
  const Tensor pixels = pixels_to_pack(backend, pixel_values, weight);
  const bool is_byte = pixels.scalar_type() == ScalarType::Byte;
  const Tensor flat = torch::stable::view(weight, std::vector<int64_t>{hidden, inner});
  if (pixels.scalar_type() == weight.scalar_type() && padded == inner &&
      is_aligned(pixels, backend.row_bytes)) {
    return {torch::stable::view(pixels, std::vector<int64_t>{total, inner}), flat};
  }

  Tensor rows = new_empty_like(weight, {total, padded});
  Tensor weight_rows = pads_weight ? new_empty_like(weight, {hidden, padded}) : flat;
  if (total * inner == 0) return {rows, weight_rows};
  std::vector<ByteScale> by;
  for (size_t i = 0; is_byte && i < mean.size(); i++) by.push_back(byte_scale(mean[i], std[i]));
  PixelRowsParams params{};
  params.pixels = pixels.const_data_ptr();
  params.rows = rows.mutable_data_ptr();
  params.weight = pads_weight ? weight.const_data_ptr() : nullptr;
  params.weight_rows = pads_weight ? weight_rows.mutable_data_ptr() : nullptr;
  params.by = by.data();
  params.pixel_stride = stride_of(pixels, 0);
  params.total = total;
  params.inner = inner;
  params.padded = padded;
  params.hidden = hidden;
  params.channels = static_cast<int64_t>(by.size());
  const auto dtype = is_byte ? std::nullopt : std::optional(float_dtype_of(pixels.scalar_type()));
  backend.pack(params, dtype, float_dtype_of(weight.scalar_type()), weight.get_device_index());
  return {rows, weight_rows};
}

// dtable and dbias by patches that are sorted by their cells of the table. No value is read on the
// host.
void backward_by_cells(const PatchEmbedBackend& backend, PatchEmbedParams params, Tensor& dtable,
                       Tensor& dbias, const Tensor& dout, int device_index) {
  const Dtype dtype = float_dtype_of(dout.scalar_type());
  const Tensor cells = new_empty(dout, {params.total}, aoti_torch_dtype_int32());
  const Tensor fractions = new_empty(dout, {params.total, 2}, aoti_torch_dtype_float32());
  std::pair<Tensor, Tensor> sorted{cells, cells};
  if (params.total > 0) {
    params.cells = static_cast<int32_t*>(cells.mutable_data_ptr());
    params.fractions = static_cast<float*>(fractions.mutable_data_ptr());
    backend.cells(params, device_index);
    sorted = aten_stable_sort(cells);
    params.sorted_cells = sorted.first.const_data_ptr<int32_t>();
    params.order = sorted.second.const_data_ptr<int64_t>();
  }
  params.num_parts = backend.num_parts(params);
  const int64_t num_rows = params.side * params.side;
  if (params.num_parts == 1) {
    backend.backward(params, dtype, device_index);
  } else {
    const Tensor partials =
        new_empty(dout, {params.num_parts, num_rows, params.hidden}, aoti_torch_dtype_float32());
    params.partials = static_cast<float*>(partials.mutable_data_ptr());
    backend.backward(params, dtype, device_index);
    dtable = sum_of_rows(partials, dtable);
  }
  if (params.dbias != nullptr) dbias = sum_of_rows(dout, dbias);
}

// Into out, by one GEMM; or false.
bool embeds_fused(const Tensor& rows, const Tensor& weight, const PatchEmbedParams& patches,
                  Tensor& out) {
  PatchEmbedGemmParams params{};
  params.gemm = {rows.const_data_ptr(), weight.const_data_ptr(), out.mutable_data_ptr(),
                 row_stride(rows),      row_stride(weight),      patches.total,
                 patches.hidden,        weight.size(1)};
  params.patches = patches;
  return is_fit(params) && backend_of(out).fused(params, out.get_device_index());
}

}  // namespace

PatchEmbedBackend& patch_embed_backend(PatchEmbedDevice device) {
  static PatchEmbedBackend backends[2] = {};
  return backends[static_cast<int>(device)];
}

Tensor patch_embed(const Tensor& pixel_values, const Tensor& weight, std::optional<Tensor> bias,
                   const Tensor& position_embedding, const Tensor& grid,
                   const Tensor& image_offsets, const Tensor& position_ids, bool align_corners,
                   std::vector<double> image_mean, std::vector<double> image_std) {
  PatchEmbedParams params =
      patch_embed_params(pixel_values, weight, bias, position_embedding, grid, image_offsets,
                         position_ids, align_corners, image_mean, image_std);
  if (params.total * params.hidden == 0) {
    return new_empty_like(weight, {params.total, params.hidden});
  }
  const Operands product =
      operands(pixel_values, weight, image_mean, image_std, /*wants_weight=*/true);
  params.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  if (backend_of(weight).fused != nullptr && weight.scalar_type() == ScalarType::BFloat16) {
    Tensor tokens = new_empty_like(weight, {params.total, params.hidden});
    if (embeds_fused(product.rows, product.weight, params, tokens)) return tokens;
  }
  // NOTE: torch's product of bf16 takes twice as long with a bias.
  Tensor out = aten_linear(product.rows, product.weight, std::nullopt);
  params.out = out.mutable_data_ptr();
  backend_of(weight).add_positions(params, float_dtype_of(weight.scalar_type()),
                                   weight.get_device_index());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> patch_embed_backward(
    const Tensor& dout, const Tensor& pixel_values, const Tensor& weight,
    const Tensor& position_embedding, const Tensor& grid, const Tensor& image_offsets,
    const Tensor& position_ids, bool needs_dpixels, bool has_bias, bool align_corners,
    std::vector<double> image_mean, std::vector<double> image_std) {
  PatchEmbedParams params =
      patch_embed_params(pixel_values, weight, std::nullopt, position_embedding, grid,
                         image_offsets, position_ids, align_corners, image_mean, image_std);
  KEYE_CHECK(dout.dim() == 2 && dout.size(0) == params.total && dout.size(1) == params.hidden, kOp,
             ": dout must be [", params.total, ", ", params.hidden, "], got ", shape_of(dout));
  check_same(kOp, "dout", dout, "weight", weight);
  check_contiguous("dout", dout);

  Tensor dpixels = new_empty_like(pixel_values, {0});
  if (needs_dpixels) {
    const std::vector<int64_t> flat{params.hidden, inner_size(weight)};
    const Tensor product = torch::stable::matmul(dout, torch::stable::view(weight, flat));
    dpixels = torch::stable::view(in_dtype_of(product, pixel_values), shape_vector(pixel_values));
  }
  const Tensor rows =
      operands(pixel_values, weight, image_mean, image_std, /*wants_weight=*/false).rows;
  Tensor product = torch::stable::matmul(torch::stable::transpose(dout, 0, 1), rows);
  const int64_t inner = inner_size(weight);
  if (rows.size(1) != inner) product = torch::stable::narrow(product, 1, 0, inner);
  const Tensor dweight = torch::stable::view(in_dtype_of(product, weight), shape_vector(weight));
  Tensor dbias = new_empty_like(weight, {has_bias ? params.hidden : 0});
  Tensor dtable = new_empty_like(position_embedding);
  params.dout = dout.const_data_ptr();
  params.dtable = dtable.mutable_data_ptr();
  params.dbias = has_bias ? dbias.mutable_data_ptr() : nullptr;
  const PatchEmbedBackend& backend = backend_of(weight);
  const int device_index = weight.get_device_index();
  if (params.hidden > 0 && backend.cells != nullptr) {
    backward_by_cells(backend, params, dtable, dbias, dout, device_index);
  } else if (params.hidden > 0) {
    backend.backward(params, float_dtype_of(weight.scalar_type()), device_index);
  }
  return {dpixels, dweight, dbias, dtable};
}

STABLE_TORCH_LIBRARY_FRAGMENT(keye_ops, m) {
  m.def(
      "patch_embed(Tensor pixel_values, Tensor weight, Tensor? bias, Tensor position_embedding, "
      "Tensor grid, Tensor image_offsets, Tensor position_ids, bool align_corners=False, "
      "float[] image_mean=[0.5, 0.5, 0.5], float[] image_std=[0.5, 0.5, 0.5]) -> Tensor");
  m.def(
      "patch_embed_backward(Tensor dout, Tensor pixel_values, Tensor weight, "
      "Tensor position_embedding, Tensor grid, Tensor image_offsets, Tensor position_ids, "
      "bool needs_dpixels, bool has_bias, bool align_corners, float[] image_mean, "
      "float[] image_std) -> (Tensor, Tensor, Tensor, Tensor)");
}

}  // namespace keye_ops
