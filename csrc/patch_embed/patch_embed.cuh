// patch_embed on CUDA, all but the matrix product: pixels to rows, positions, and the gradient of
// the table of positions.
#pragma once

#include <type_traits>

#include "common/vec.cuh"
#include "patch_embed/patch_embed.h"
#include "patch_embed/patch_embed_place.cuh"

namespace keye_ops {

constexpr int kPackThreads = 128;
constexpr int kPackRows = 8;  // of a block
constexpr int kMaxByteChannels = 4;

// ---- pixels to rows ----

struct PackKernelParams {
  PixelRowsParams rows;
  ByteScale by[kMaxByteChannels];
  int64_t num_pixel_blocks;  // the blocks behind pack the weight
  int area;                  // values of a channel, bytes only
  int pixel_word;            // bytes: every row of pixels is a number of such words, aligned
  int weight_word;
};

template <int kBytes>
struct alignas(kBytes) PackWord {
  uint32_t values[kBytes / 4];
};

// The first num_bytes bytes at a source as words, and zeros.
template <int kBytes, int kWords>
KEYE_DEVICE void load_words(const unsigned char* source, int num_bytes, uint32_t (&words)[kWords]) {
  constexpr int kStep = kBytes / 4;
  if constexpr (kWords % kStep == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += kStep) {
      PackWord<kBytes> word = {};
      const int at = 4 * i;
      if (at < num_bytes) word = load_bytes<PackWord<kBytes>>(source + at);
#pragma unroll
      for (int j = 0; j < kStep; j++) words[i + j] = word.values[j];
    }
  }
}

// The same from a source that is only aligned to its values.
template <class Bits, int kWords>
KEYE_DEVICE void load_values(const unsigned char* source, int num_bytes,
                             uint32_t (&words)[kWords]) {
  constexpr int kSize = sizeof(Bits), kPerWord = 4 / kSize;
#pragma unroll
  for (int i = 0; i < kWords; i++) {
    words[i] = 0;
#pragma unroll
    for (int j = 0; j < kPerWord; j++) {
      const int at = 4 * i + j * kSize;
      if (at < num_bytes) {
        words[i] |= uint32_t{*reinterpret_cast<const Bits*>(source + at)} << (8 * kSize * j);
      }
    }
  }
}

// kWords words at a source whose row is a whole number of words of word_bytes bytes.
template <class P, int kWords>
KEYE_DEVICE void load_row_words(const unsigned char* source, int num_bytes, int word_bytes,
                                uint32_t (&words)[kWords]) {
  if (kWords % 4 == 0 && word_bytes == 16) {
    load_words<16>(source, num_bytes, words);
  } else if (kWords % 2 == 0 && word_bytes >= 8) {
    load_words<8>(source, num_bytes, words);
  } else if (sizeof(P) == 4 || word_bytes >= 4) {
    load_words<4>(source, num_bytes, words);
  } else {
    load_values<std::conditional_t<sizeof(P) == 1, uint8_t, uint16_t>>(source, num_bytes, words);
  }
}

// Values first, first + 1, ... of a row of bytes; those behind the row are 0.
template <int kVec, int kWords>
KEYE_DEVICE void normalise(const PackKernelParams& params, int first,
                           const uint32_t (&words)[kWords], float (&values)[kVec]) {
  const int num_values = static_cast<int>(params.rows.inner) - first;
  int channel = first / params.area;
  int left = params.area - first % params.area;  // values of this channel
  ByteScale by = params.by[channel];
#pragma unroll
  for (int i = 0; i < kVec; i++) {
    const auto byte = static_cast<float>(words[i / 4] >> 8 * (i % 4) & 0xffu);
    values[i] = i < num_values ? normalised_byte(byte, by) : 0.0f;
    if (--left == 0 && i + 1 < num_values) {
      by = params.by[++channel];
      left = params.area;
    }
  }
}

// 16 bytes of a row, from its value `first` on.
template <class P, class T>
KEYE_DEVICE void pack_chunk(const PackKernelParams& params, const P* row, int word_bytes, int first,
                            T* out) {
  constexpr int kVec = kVectorSize<T>;
  constexpr int kWords = kVec * static_cast<int>(sizeof(P)) / 4;
  const int num_bytes = (static_cast<int>(params.rows.inner) - first) * static_cast<int>(sizeof(P));
  uint32_t words[kWords];
  load_row_words<P>(reinterpret_cast<const unsigned char*>(row + first), num_bytes, word_bytes,
                    words);
  if constexpr (std::is_same_v<P, T>) {
    store_bytes(out + first, Chunk{{words[0], words[1], words[2], words[3]}});
  } else {
    float values[kVec];
    if constexpr (std::is_same_v<P, uint8_t>) {
      normalise(params, first, words, values);
    } else {
      static_assert(std::is_same_v<P, float>, "pixels are bytes, floats or of the weight's dtype");
#pragma unroll
      for (int i = 0; i < kVec; i++) values[i] = float_of_bits(words[i]);
    }
    store_vector(out + first, values);
  }
}

// The block-th kPackRows of num_rows rows.
template <class P, class T>
KEYE_DEVICE void pack_rows(const PackKernelParams& params, const P* in, int64_t in_stride, T* out,
                           int64_t num_rows, int word_bytes, int64_t block) {
  constexpr int kVec = kVectorSize<T>;
  const int num_chunks = static_cast<int>(params.rows.padded / kVec);
  const int64_t first_row = block * kPackRows;
  const int rows = static_cast<int>(min(int64_t{kPackRows}, num_rows - first_row));
  for (int i = thread_idx(); i < rows * num_chunks; i += kPackThreads) {
    const int row = i / num_chunks, chunk = i % num_chunks;
    pack_chunk(params, in + (first_row + row) * in_stride, word_bytes, chunk * kVec,
               out + (first_row + row) * params.rows.padded);
  }
}

template <class P, class T>
KEYE_KERNEL(kPackThreads, 8)
patch_embed_pack_kernel(KEYE_PARAMS PackKernelParams params) {
  const PixelRowsParams& rows = params.rows;
  if (block_idx() < params.num_pixel_blocks) {
    pack_rows(params, static_cast<const P*>(rows.pixels), rows.pixel_stride,
              static_cast<T*>(rows.rows), rows.total, params.pixel_word, block_idx());
  } else {
    pack_rows(params, static_cast<const T*>(rows.weight), rows.inner,
              static_cast<T*>(rows.weight_rows), rows.hidden, params.weight_word,
              block_idx() - params.num_pixel_blocks);
  }
}

// ---- positions ----

constexpr int kPositionThreads = 128;
constexpr int kPositionRows = 16;  // tokens of a block

// Adds the bias and the positions to the product of pixels and weight, in place.
template <class T>
KEYE_KERNEL(kPositionThreads, 6)
patch_embed_positions_kernel(KEYE_PARAMS PatchEmbedParams params) {
  constexpr int kVec = kVectorSize<T>;
  auto* block_taps = reinterpret_cast<PatchTaps<float>*>(shared_memory());
  const int64_t first = block_idx() * kPositionRows;
  const int num_rows = static_cast<int>(min(int64_t{kPositionRows}, params.total - first));

  // A thread finds the place of a patch.
  if (thread_idx() < num_rows) {
    block_taps[thread_idx()] = checked_taps(params, first + thread_idx());
  }
  syncthreads();

  // Then the threads go through the chunks of all rows.
  const auto* table = static_cast<const T*>(params.table);
  const auto* bias = static_cast<const T*>(params.bias);
  const int num_chunks = static_cast<int>(params.hidden / kVec);
  int row = thread_idx() / num_chunks, chunk = thread_idx() % num_chunks;
  while (row < num_rows) {
    const PatchTaps<float>& taps = block_taps[row];
    const int column = chunk * kVec;
    T* out = static_cast<T*>(params.out) + (first + row) * params.hidden + column;
    float token[kVec] = {};
    if (taps.good) {
      float corners[4][kVec], b[kVec] = {};
      load_vector(out, token);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        load_vector(table + taps.rows[k] * params.hidden + column, corners[k]);
      }
      if (bias != nullptr) load_vector(bias + column, b);
#pragma unroll
      for (int i = 0; i < kVec; i++) {
        const float values[4] = {corners[0][i], corners[1][i], corners[2][i], corners[3][i]};
        token[i] = add_position(token[i], b[i], values, taps.shares);
      }
    }
    store_vector(out, token);

    chunk += kPositionThreads;
    while (chunk >= num_chunks) {
      chunk -= num_chunks;
      row++;
    }
  }
}

// ---- the gradient of the table ----

// Patches lie in cells of the table, between four of its rows. Sorted by their cells, those that a
// row of the table belongs to are four runs. A block sums a part of them for one row.
constexpr int kCellThreads = 128;
constexpr int kGradGroup = 16;     // patches that are summed in fp32; sums of those in fp64
constexpr int kGradThreads = 160;  // as many chunks of a row: Keye's 1152 in 16 bits are 144

KEYE_KERNEL(kCellThreads, 8) patch_embed_cells_kernel(KEYE_PARAMS PatchEmbedParams params) {
  const int64_t patch = block_idx() * kCellThreads + thread_idx();
  if (patch >= params.total) return;
  const PatchPlace place = checked_place(params, patch);
  AxisTaps<float> r{params.side, 0, 0.0f}, c{};  // a cell behind all others
  if (place.error == DeviceError::kNone) {
    r = axis_taps<float>(place.row, place.num_rows, params.side, params.align_corners);
    c = axis_taps<float>(place.column, place.num_columns, params.side, params.align_corners);
  }
  params.cells[patch] = static_cast<int32_t>(r.low * params.side + c.low);
  params.fractions[2 * patch] = r.fraction;
  params.fractions[2 * patch + 1] = c.fraction;
}

struct GradKernelParams {
  PatchEmbedParams patch;
  int num_slices;    // of a row's chunks, a block each
  int slice_chunks;  // at most kGradThreads
};

// A patch of the list, and the share that the block's row of the table has in it.
struct GradEntry {
  int64_t patch;
  float share;
};

struct GradShared {
  int64_t bounds[4][2];  // of the runs in sorted_cells: begin and end
  GradEntry entries[kGradThreads];
};

// How many patches lie in cells before this one.
KEYE_DEVICE int64_t patches_before(const PatchEmbedParams& params, int64_t cell) {
  int64_t first = 0, last = params.total;
  while (first < last) {
    const int64_t middle = first + (last - first) / 2;
    if (params.sorted_cells[middle] < cell) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return first;
}

// The share of the table's row (row, column) in a patch of cell (row - up, column - left): a cell
// at the border has the same row of the table twice.
KEYE_DEVICE float share_of_row(const PatchEmbedParams& params, int up, int left, bool last_row,
                               bool last_column, int64_t patch) {
  float shares[4];
  bilinear_shares(params.fractions[2 * patch], params.fractions[2 * patch + 1], shares);
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const bool same_row = k / 2 == up || (up == 0 && last_row);
    const bool same_column = k % 2 == left || (left == 0 && last_column);
    if (same_row && same_column) sum += shares[k];
  }
  return sum;
}

template <class T>
KEYE_KERNEL(kGradThreads, 5)
patch_embed_dtable_kernel(KEYE_PARAMS GradKernelParams kernel_params) {
  constexpr int kVec = kVectorSize<T>;
  const PatchEmbedParams& params = kernel_params.patch;
  auto& shared = *reinterpret_cast<GradShared*>(shared_memory());
  const int slice = static_cast<int>(block_idx() % kernel_params.num_slices);
  const int64_t table_row = block_idx() / kernel_params.num_slices % (params.side * params.side);
  const int64_t part = block_idx() / kernel_params.num_slices / (params.side * params.side);
  const int64_t row = table_row / params.side, column = table_row % params.side;

  // Find the four runs; there is no cell before the first row or column.
  if (thread_idx() < 8) {
    const int run = thread_idx() / 2, up = run / 2, left = run % 2;
    const bool exists = row >= up && column >= left;
    const int64_t cell = (row - up) * params.side + column - left + thread_idx() % 2;
    shared.bounds[run][thread_idx() % 2] = exists ? patches_before(params, cell) : 0;
  }
  syncthreads();
  int64_t ends[4], length = 0;  // ends of the runs in the list of all
#pragma unroll
  for (int run = 0; run < 4; run++) {
    length += shared.bounds[run][1] - shared.bounds[run][0];
    ends[run] = length;
  }
  const int64_t begin = length * part / params.num_parts;
  const int64_t end = length * (part + 1) / params.num_parts;

  const int first_chunk = slice * kernel_params.slice_chunks;
  const int chunk = first_chunk + thread_idx();
  const bool active = thread_idx() < kernel_params.slice_chunks && chunk < params.hidden / kVec;
  const T* dout = static_cast<const T*>(params.dout) + chunk * kVec;
  double total[kVec] = {};
  for (int64_t base = begin; base < end; base += kGradThreads) {
    // A thread finds the share of one patch ...
    const int64_t i = base + thread_idx();
    if (i < end) {
      const int run = (i >= ends[0]) + (i >= ends[1]) + (i >= ends[2]);
      const int64_t run_begin = run == 0 ? 0 : run == 1 ? ends[0] : run == 2 ? ends[1] : ends[2];
      const int64_t patch = params.order[shared.bounds[run][0] + i - run_begin];
      shared.entries[thread_idx()] = {patch,
                                      share_of_row(params, run / 2, run % 2, row == params.side - 1,
                                                   column == params.side - 1, patch)};
    }
    syncthreads();

    // ... then all go through the patches.
    if (active) {
      const int count = static_cast<int>(min(int64_t{kGradThreads}, end - base));
      for (int group = 0; group < count; group += kGradGroup) {
        const int group_end = min(group + kGradGroup, count);
        float sum[kVec] = {};
#pragma unroll 4
        for (int j = group; j < group_end; j++) {
          const GradEntry& entry = shared.entries[j];
          float values[kVec];
          load_vector(dout + entry.patch * params.hidden, values);
#pragma unroll
          for (int v = 0; v < kVec; v++) sum[v] += entry.share * values[v];
        }
#pragma unroll
        for (int v = 0; v < kVec; v++) total[v] += double{sum[v]};
      }
    }
    syncthreads();
  }

  if (!active) return;
  float rounded[kVec];
#pragma unroll
  for (int v = 0; v < kVec; v++) rounded[v] = static_cast<float>(total[v]);
  const int64_t place = table_row * params.hidden + int64_t{chunk} * kVec;
  if (params.partials == nullptr) {
    store_vector(static_cast<T*>(params.dtable) + place, rounded);
    return;
  }
  float* partial = params.partials + part * params.side * params.side * params.hidden + place;
#pragma unroll
  for (int v = 0; v < kVec; v += kVectorSize<float>) {
    const float values[] = {rounded[v], rounded[v + 1], rounded[v + 2], rounded[v + 3]};
    store_vector(partial + v, values);
  }
}

}  // namespace keye_ops
