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

// ---- launches by name, past the op's checks: with any grid, and values that ops would refuse ----

namespace {

using host_executor::Arguments;
using host_executor::bind_kernel;
using host_executor::BoundKernel;
using host_executor::register_kernel;

PatchEmbedParams named_params(const Arguments& arguments) {
  PatchEmbedParams params{};
  params.total = arguments.integer("total");
  params.side = arguments.integer("side");
  params.num_parts = 1;
  params.fractions = arguments.array_if_any<float>("fractions");
  return params;
}

PatchEmbedParams named_places(const Arguments& arguments) {
  PatchEmbedParams params = named_params(arguments);
  params.grid = arguments.array<int32_t>("grid");
  params.image_offsets = arguments.array<int32_t>("image_offsets");
  params.position_ids = arguments.array<void>("position_ids");
  params.error_word = arguments.array<ErrorWord>("error_word");
  params.position_stride = arguments.integer("position_stride");
  params.axis_stride = arguments.integer("axis_stride");
  params.num_images = arguments.integer("num_images");
  params.wide_ids = arguments.integer("wide_ids") != 0;
  params.align_corners = arguments.integer("align_corners") != 0;
  return params;
}

// Calls f with a value of the type, whose number is 0 for fp32, 1 for fp16, 2 for bf16.
template <class F>
BoundKernel with_named_type(const Arguments& arguments, const F& f) {
  switch (arguments.integer("dtype")) {
    case 0:
      return f(float{});
    case 1:
      return f(Half{});
    default:
      return f(BFloat16{});
  }
}

template <class T>
BoundKernel bind_pack(const Arguments& arguments) {
  PackKernelParams params{};
  params.rows.pixels = arguments.array<void>("pixels");
  params.rows.rows = arguments.array<void>("rows");
  params.rows.weight = arguments.array_if_any<void>("weight");
  params.rows.weight_rows = arguments.array_if_any<void>("weight_rows");
  params.rows.pixel_stride = arguments.integer("pixel_stride");
  params.rows.total = arguments.integer("total");
  params.rows.inner = arguments.integer("inner");
  params.rows.padded = arguments.integer("padded");
  params.rows.hidden = arguments.integer("hidden");
  params.num_pixel_blocks = arguments.integer("num_pixel_blocks");
  params.pixel_word = static_cast<int>(arguments.integer("pixel_word"));
  params.weight_word = static_cast<int>(arguments.integer("weight_word"));
  params.area = static_cast<int>(arguments.integer("area"));
  for (int i = 0; i < kMaxByteChannels; i++) {
    const std::string name = std::to_string(i);
    params.by[i] = byte_scale(arguments.number("mean" + name), arguments.number("std" + name));
  }
  switch (arguments.integer("pixel_dtype")) {
    case 0:
      return bind_kernel(&patch_embed_pack_kernel<float, T>, params);
    case 3:
      return bind_kernel(&patch_embed_pack_kernel<uint8_t, T>, params);
    default:
      return bind_kernel(&patch_embed_pack_kernel<T, T>, params);
  }
}

const bool kRegistered[] = {
    register_kernel("patch_embed_pack",
                    [](const Arguments& arguments) {
                      return with_named_type(arguments, [&](auto type) {
                        return bind_pack<decltype(type)>(arguments);
                      });
                    }),
    register_kernel("patch_embed_positions",
                    [](const Arguments& arguments) {
                      PatchEmbedParams params = named_places(arguments);
                      params.out = arguments.array<void>("out");
                      params.bias = arguments.array_if_any<void>("bias");
                      params.table = arguments.array<void>("table");
                      params.hidden = arguments.integer("hidden");
                      return with_named_type(arguments, [&](auto type) {
                        return bind_kernel(&patch_embed_positions_kernel<decltype(type)>, params);
                      });
                    }),
    register_kernel("patch_embed_cells",
                    [](const Arguments& arguments) {
                      PatchEmbedParams params = named_places(arguments);
                      params.cells = arguments.array<int32_t>("cells");
                      return bind_kernel(&patch_embed_cells_kernel, params);
                    }),
    register_kernel("patch_embed_dtable",
                    [](const Arguments& arguments) {
                      GradKernelParams params{named_params(arguments), 0, 0};
                      params.patch.dout = arguments.array<void>("dout");
                      params.patch.dtable = arguments.array_if_any<void>("dtable");
                      params.patch.partials = arguments.array_if_any<float>("partials");
                      params.patch.sorted_cells = arguments.array<int32_t>("sorted_cells");
                      params.patch.order = arguments.array<int64_t>("order");
                      params.patch.hidden = arguments.integer("hidden");
                      params.patch.num_parts = arguments.integer("num_parts");
                      params.num_slices = static_cast<int>(arguments.integer("num_slices"));
                      params.slice_chunks = static_cast<int>(arguments.integer("slice_chunks"));
                      return with_named_type(arguments, [&](auto type) {
                        return bind_kernel(&patch_embed_dtable_kernel<decltype(type)>, params);
                      });
                    }),
};

}  // namespace

}  // namespace keye_ops
