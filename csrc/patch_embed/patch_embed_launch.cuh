// patch_embed on CUDA: which kernels, on how many blocks; for a GPU and for the host executor.
#pragma once

#include <algorithm>
#include <numeric>
#include <optional>

#include "common/launch.cuh"
#include "patch_embed/patch_embed.cuh"

namespace keye_ops {

constexpr int64_t kPartPatches = 8192;                  // that are worth another part of the sums
constexpr int64_t kPartialBytes = int64_t{64} << 20;    // of all parts
constexpr int64_t kMaxPackedValues = int64_t{1} << 24;  // of a patch

// ---- pixels to rows ----

// The largest word that divides the address, the stride and the length of all rows.
inline int row_word(const void* rows, int64_t stride_bytes, int64_t row_bytes) {
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(rows));
  const int64_t common = std::gcd(std::gcd(address, stride_bytes), row_bytes);
  return static_cast<int>(std::gcd<int64_t>(common, kVectorBytes));
}

template <class P, class T>
void launch_pack_of(const PixelRowsParams& params, int device_index) {
  KEYE_CHECK(params.padded <= kMaxPackedValues, "patch_embed: a patch on CUDA must have up to ",
             kMaxPackedValues, " values, got ", params.inner);
  PackKernelParams kernel_params{};
  kernel_params.rows = params;
  kernel_params.area = static_cast<int>(params.inner);
  if constexpr (std::is_same_v<P, uint8_t>) {
    KEYE_CHECK(params.channels <= kMaxByteChannels, "patch_embed: uint8 pixels on CUDA must have ",
               "up to ", kMaxByteChannels, " channels, got ", params.channels);
    std::copy_n(params.by, params.channels, kernel_params.by);
    kernel_params.area = static_cast<int>(params.inner / params.channels);
  }
  kernel_params.rows.by = nullptr;
  const auto pixel_size = static_cast<int64_t>(sizeof(P)), size = static_cast<int64_t>(sizeof(T));
  kernel_params.pixel_word =
      row_word(params.pixels, params.pixel_stride * pixel_size, params.inner * pixel_size);
  kernel_params.weight_word = row_word(params.weight, params.inner * size, params.inner * size);
  kernel_params.num_pixel_blocks = ceil_div(params.total, kPackRows);
  const int64_t weight_blocks = params.weight == nullptr ? 0 : ceil_div(params.hidden, kPackRows);
  const int64_t num_blocks = kernel_params.num_pixel_blocks + weight_blocks;
  if (num_blocks == 0) return;
  launch("patch_embed", &patch_embed_pack_kernel<P, T>, {num_blocks, kPackThreads}, device_index,
         kernel_params);
}

// Pixels without a dtype are bytes.
inline void launch_pack(const PixelRowsParams& params, std::optional<Dtype> pixels, Dtype rows,
                        int device_index) {
  KEYE_CHECK(!pixels || *pixels == rows || *pixels == Dtype::kFloat,
             "patch_embed: pixels packed on CUDA must be uint8, fp32 or of the weight's dtype");
  with_cuda_type_of("patch_embed", rows, [&](auto row) {
    using T = decltype(row);
    if (!pixels) return launch_pack_of<uint8_t, T>(params, device_index);
    if (*pixels == rows) return launch_pack_of<T, T>(params, device_index);
    return launch_pack_of<float, T>(params, device_index);
  });
}

// ---- positions and the gradient of the table ----

inline void check_hidden(const PatchEmbedParams& params, int vector) {
  KEYE_CHECK(params.hidden % vector == 0 && params.hidden <= kMaxPackedValues,
             "patch_embed: hidden on CUDA must be a multiple of ", vector, " up to ",
             kMaxPackedValues, " in this dtype, got ", params.hidden);
  for (const void* rows : {static_cast<const void*>(params.out), params.bias, params.table,
                           params.dout, static_cast<const void*>(params.dtable)}) {
    KEYE_CHECK(reinterpret_cast<uintptr_t>(rows) % kVectorBytes == 0,
               "patch_embed: bias, position_embedding and dout on CUDA must start at multiples of ",
               kVectorBytes, " bytes, got ", rows);
  }
}

inline void launch_add_positions(const PatchEmbedParams& given, Dtype dtype, int device_index) {
  PatchEmbedParams params = given;
  params.error_word = error_word(device_index);
  with_cuda_type_of("patch_embed", dtype, [&](auto type) {
    using T = decltype(type);
    check_hidden(params, kVectorSize<T>);
    launch("patch_embed", &patch_embed_positions_kernel<T>,
           {ceil_div(params.total, kPositionRows), kPositionThreads,
            kPositionRows * sizeof(PatchTaps<float>)},
           device_index, params);
  });
}

inline void launch_cells(const PatchEmbedParams& given, int device_index) {
  PatchEmbedParams params = given;
  params.error_word = error_word(device_index);
  KEYE_CHECK(params.side <= 46340, "patch_embed: position_embedding on CUDA must have fewer than ",
             "2**31 rows, got ", params.side * params.side);
  launch("patch_embed", &patch_embed_cells_kernel,
         {ceil_div(params.total, kCellThreads), kCellThreads}, device_index, params);
}

// Into how many parts the sums of all rows are cut, so that no block goes through too many patches;
// by the shapes alone, for the order of the sums is part of the result.
inline int64_t patch_embed_num_parts(const PatchEmbedParams& params) {
  const int64_t bytes = params.side * params.side * params.hidden * 4;
  const int64_t most = std::max<int64_t>(1, kPartialBytes / std::max<int64_t>(1, bytes));
  return std::clamp<int64_t>(params.total / kPartPatches, 1, most);
}

inline void launch_dtable(const PatchEmbedParams& params, Dtype dtype, int device_index) {
  with_cuda_type_of("patch_embed", dtype, [&](auto type) {
    using T = decltype(type);
    check_hidden(params, kVectorSize<T>);
    const int64_t num_chunks = params.hidden / kVectorSize<T>;
    GradKernelParams kernel_params{params, 0, 0};
    kernel_params.num_slices = static_cast<int>(ceil_div(num_chunks, kGradThreads));
    kernel_params.slice_chunks = static_cast<int>(ceil_div(num_chunks, kernel_params.num_slices));
    const int64_t num_blocks =
        kernel_params.num_slices * params.side * params.side * params.num_parts;
    launch("patch_embed", &patch_embed_dtable_kernel<T>,
           {num_blocks, kGradThreads, sizeof(GradShared)}, device_index, kernel_params);
  });
}

}  // namespace keye_ops
