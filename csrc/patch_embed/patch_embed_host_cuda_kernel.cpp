// patch_embed's CUDA kernels on the host executor: every tensor becomes a guarded copy.
#include <string>
#include <vector>

#include "host_executor/kernels.h"
#include "patch_embed/patch_embed_host_cuda.h"
#include "patch_embed/patch_embed_launch.cuh"

namespace keye_ops {
namespace {

using host_executor::Dimension;
using host_executor::Role;

struct Freed {
  ~Freed() { host_executor::free_copies(); }
};

// Strides are in elements.
template <class P>
void guard_argument(const char* name, P*& p, int64_t element_size,
                    std::vector<Dimension> dimensions, Role role) {
  if (p == nullptr) return;
  for (Dimension& dimension : dimensions) dimension.stride *= element_size;
  p = static_cast<P*>(host_executor::guard(name, p, element_size, dimensions, role));
}

template <class P>
void guard_rows(const char* name, P*& p, int64_t size, int64_t rows, int64_t columns, Role role) {
  guard_argument(name, p, size, {{rows, columns}, {columns, 1}}, role);
}

void guard_places(PatchEmbedParams& params) {
  guard_rows("grid", params.grid, 4, params.num_images, 3, Role::kInput);
  guard_rows("image_offsets", params.image_offsets, 4, params.num_images + 1, 1, Role::kInput);
  guard_argument("position_ids", params.position_ids, params.wide_ids ? 8 : 4,
                 {{params.total, params.position_stride}, {2, params.axis_stride}}, Role::kInput);
}

}  // namespace

void patch_embed_pack_host_cuda(const PixelRowsParams& given, std::optional<Dtype> pixels,
                                Dtype rows, int device_index) {
  const Freed freed;
  PixelRowsParams params = given;
  const int64_t size = size_of(rows);
  guard_argument("pixel_values", params.pixels, pixels ? size_of(*pixels) : 1,
                 {{params.total, params.pixel_stride}, {params.inner, 1}}, Role::kInput);
  guard_rows("rows", params.rows, size, params.total, params.padded, Role::kOutput);
  guard_rows("weight", params.weight, size, params.hidden, params.inner, Role::kInput);
  guard_rows("weight's rows", params.weight_rows, size, params.hidden, params.padded,
             Role::kOutput);
  launch_pack(params, pixels, rows, device_index);
  host_executor::copy_back();
}

void patch_embed_add_positions_host_cuda(const PatchEmbedParams& given, Dtype dtype,
                                         int device_index) {
  const Freed freed;
  PatchEmbedParams params = given;
  const int64_t size = size_of(dtype);
  guard_places(params);
  guard_rows("out", params.out, size, params.total, params.hidden, Role::kInOut);
  guard_rows("bias", params.bias, size, params.hidden, 1, Role::kInput);
  guard_rows("position_embedding", params.table, size, params.side * params.side, params.hidden,
             Role::kInput);
  launch_add_positions(params, dtype, device_index);
  host_executor::copy_back();
}

void patch_embed_cells_host_cuda(const PatchEmbedParams& given, int device_index) {
  const Freed freed;
  PatchEmbedParams params = given;
  guard_places(params);
  guard_rows("cells", params.cells, 4, params.total, 1, Role::kOutput);
  guard_rows("fractions", params.fractions, 4, params.total, 2, Role::kOutput);
  launch_cells(params, device_index);
  host_executor::copy_back();
}

void patch_embed_dtable_host_cuda(const PatchEmbedParams& given, Dtype dtype, int device_index) {
  const Freed freed;
  PatchEmbedParams params = given;
  const int64_t size = size_of(dtype), num_rows = params.side * params.side;
  params.dtable = params.partials == nullptr ? params.dtable : nullptr;
  guard_rows("dout", params.dout, size, params.total, params.hidden, Role::kInput);
  guard_rows("dtable", params.dtable, size, num_rows, params.hidden, Role::kOutput);
  guard_rows("dtable's parts", params.partials, 4, params.num_parts * num_rows, params.hidden,
             Role::kOutput);
  guard_rows("fractions", params.fractions, 4, params.total, 2, Role::kInput);
  guard_rows("sorted_cells", params.sorted_cells, 4, params.total, 1, Role::kInput);
  guard_rows("order", params.order, 8, params.total, 1, Role::kInput);
  launch_dtable(params, dtype, device_index);
  host_executor::copy_back();
}

int64_t patch_embed_num_parts_host_cuda(const PatchEmbedParams& params) {
  return patch_embed_num_parts(params);
}

int64_t patch_embed_row_bytes_host_cuda() { return kVectorBytes; }

}  // namespace keye_ops
