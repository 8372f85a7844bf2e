// patch_embed on the CPU: the passes before and after torch's matrix product.
#include <algorithm>

#include "common/simd.h"
#include "patch_embed/patch_embed_cpu.h"

namespace keye_ops::KEYE_ISA {
namespace {

// ---- pixels to rows ----

Floats floats_of(const uint8_t* p) {
  typedef uint8_t Bytes __attribute__((vector_size(kSimdWidth)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(__builtin_convertvector(bytes, Ints), Floats);
}

template <class T>
void bytes_to_rows(const PixelRowsParams& params, int64_t begin, int64_t end) {
  const int64_t area = params.inner / params.channels;
  for (int64_t patch = begin; patch < end; patch++) {
    const uint8_t* pixels =
        static_cast<const uint8_t*>(params.pixels) + patch * params.pixel_stride;
    T* row = static_cast<T*>(params.rows) + patch * params.inner;
    for (int64_t channel = 0; channel < params.channels; channel++) {
      const ByteScale& by = params.by[channel];
      int64_t i = 0;
      if constexpr (!std::is_same_v<T, double>) {
        for (; i + kSimdWidth <= area; i += kSimdWidth) {
          store_vector(row + i, normalised_byte(floats_of(pixels + i), by));
        }
      }
      for (; i < area; i++) store(row + i, normalised_byte(static_cast<float>(pixels[i]), by));
      pixels += area, row += area;
    }
  }
}

template <class P, class T>
void floats_to_rows(const PixelRowsParams& params, int64_t begin, int64_t end) {
  constexpr bool kVectors = !std::is_same_v<P, double> && !std::is_same_v<T, double>;
  for (int64_t patch = begin; patch < end; patch++) {
    const P* pixels = static_cast<const P*>(params.pixels) + patch * params.pixel_stride;
    T* row = static_cast<T*>(params.rows) + patch * params.inner;
    int64_t i = 0;
    if constexpr (kVectors) {
      for (; i + kSimdWidth <= params.inner; i += kSimdWidth) {
        store_vector(row + i, load_vector(pixels + i));
      }
    }
    for (; i < params.inner; i++) store(row + i, static_cast<Compute<T>>(load(pixels + i)));
  }
}

// ---- positions ----

// V is a vector or one value.
template <class V, class T>
KEYE_HOST_DEVICE void add_mixed(const T* const (&rows)[4], const PatchTaps<Compute<T>>& taps,
                                const T* bias, T* out, int64_t i) {
  const V corners[4] = {load_as(V{}, rows[0] + i), load_as(V{}, rows[1] + i),
                        load_as(V{}, rows[2] + i), load_as(V{}, rows[3] + i)};
  const V b = bias == nullptr ? V{} : load_as(V{}, bias + i);
  store_as(out + i, add_position(load_as(V{}, out + i), b, corners, taps.shares));
}

template <class T>
void add_positions(const PatchEmbedParams& params, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t hidden = params.hidden;
  const T* bias = static_cast<const T*>(params.bias);
  int64_t image = image_of(params, begin);
  for (int64_t patch = begin; patch < end; patch++) {
    while (patch >= params.image_offsets[image + 1]) image++;
    const auto taps = patch_taps<C>(params, image, patch);
    const T* table = static_cast<const T*>(params.table);
    const T* const rows[4] = {table + taps.rows[0] * hidden, table + taps.rows[1] * hidden,
                              table + taps.rows[2] * hidden, table + taps.rows[3] * hidden};
    T* out = static_cast<T*>(params.out) + patch * hidden;
    int64_t i = 0;
    for (; i + kSimdWidth <= hidden; i += kSimdWidth) add_mixed<Lanes<C>>(rows, taps, bias, out, i);
    for (; i < hidden; i++) add_mixed<C>(rows, taps, bias, out, i);
  }
}

// ---- gradients of the table and the bias ----

// All patches in order, so that sums do not depend on threads.
template <class T>
void backward_columns(const PatchEmbedParams& params, int64_t block, double* sums) {
  using C = Compute<T>;
  const int64_t hidden = params.hidden, first = block * kPatchEmbedColumns;
  const int64_t width = std::min(kPatchEmbedColumns, hidden - first);
  const int64_t num_rows = params.side * params.side;
  double* bias_sums = sums + num_rows * kPatchEmbedColumns;
  for (int64_t i = 0; i < (num_rows + 1) * kPatchEmbedColumns; i++) sums[i] = 0;

  int64_t image = 0;
  for (int64_t patch = 0; patch < params.total; patch++) {
    while (patch >= params.image_offsets[image + 1]) image++;
    const auto taps = patch_taps<C>(params, image, patch);
    const T* dout = static_cast<const T*>(params.dout) + patch * hidden + first;
    const auto add = [&](auto x, int64_t i) __attribute__((always_inline)) {
      add_to(bias_sums + i, x);
      for (int k = 0; k < 4; k++) {
        add_to(sums + taps.rows[k] * kPatchEmbedColumns + i, x * taps.shares[k]);
      }
    };
    int64_t i = 0;
    for (; i + kSimdWidth <= width; i += kSimdWidth) add(load_as(Lanes<C>{}, dout + i), i);
    for (; i < width; i++) add(load_as(C{}, dout + i), i);
  }

  const auto write = [&](T* to, const double* from) {
    for (int64_t i = 0; i < width; i++) store(to + i, static_cast<C>(from[i]));
  };
  for (int64_t row = 0; row < num_rows; row++) {
    write(static_cast<T*>(params.dtable) + row * hidden + first, sums + row * kPatchEmbedColumns);
  }
  if (params.dbias != nullptr) write(static_cast<T*>(params.dbias) + first, bias_sums);
}

}  // namespace

void pack_bytes(const PixelRowsParams& params, Dtype rows, int64_t begin, int64_t end) {
  with_type_of(rows, [&](auto type) { bytes_to_rows<decltype(type)>(params, begin, end); });
}

void pack_floats(const PixelRowsParams& params, Dtype pixels, Dtype rows, int64_t begin,
                 int64_t end) {
  with_type_of(pixels, [&](auto pixel) {
    with_type_of(rows, [&](auto row) {
      floats_to_rows<decltype(pixel), decltype(row)>(params, begin, end);
    });
  });
}

void patch_embed_add_positions(const PatchEmbedParams& params, Dtype dtype, int64_t begin,
                               int64_t end) {
  with_type_of(dtype, [&](auto type) { add_positions<decltype(type)>(params, begin, end); });
}

void patch_embed_backward_columns(const PatchEmbedParams& params, Dtype dtype, int64_t block,
                                  double* sums) {
  with_type_of(dtype, [&](auto type) { backward_columns<decltype(type)>(params, block, sums); });
}

}  // namespace keye_ops::KEYE_ISA
