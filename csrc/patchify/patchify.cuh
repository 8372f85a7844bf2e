// patchify on CUDA: a block makes a few neighbouring patches of a frame, then of the next frames.
// Source rows come to shared memory a chunk at a time, the horizontal pass leaves the block's
// columns of them there, and every thread adds those to its output values, which stay in registers.
#pragma once

#include "common/arena.h"
#include "common/vec.cuh"
#include "patchify/patchify.h"

namespace keye_ops {

constexpr int kPatchifyThreads = 256;
constexpr int kPatchifyGroup = 4;  // rows, and taps, that the horizontal pass takes at a time
constexpr int kPatchifyItems = 8;  // output rows of a thread, at most
static_assert(kPatchifyGroup == 4, "four weights are 16 bytes, four pixels three words");

struct PatchifyKernelParams {
  PatchifyParams patchify;
  int span;          // patches of a row of patches that a block makes
  int chunk_rows;    // source rows in shared memory, a multiple of kPatchifyGroup
  int source_pitch;  // bytes from one to the next, a multiple of 16
  int taps_across;   // a multiple of kPatchifyGroup
  int taps_down;     // no multiple
  int frames_per_block;
};

// What a pass keeps: W is the type of the weights.
template <class W>
struct PatchifyPass;
template <>
struct PatchifyPass<int32_t> {
  using Between = uint8_t;
};
template <>
struct PatchifyPass<float> {
  using Between = float;
};

template <class W>
struct PatchifyShared {
  using Between = typename PatchifyPass<W>::Between;
  PatchifyWindow* across;  // [columns]
  PatchifyWindow* down;    // [patch_size]
  double* sums;            // [columns + patch_size], of the filters' values
  W* across_weights;       // [taps_across / 4][columns][4]
  W* down_weights;         // [patch_size][taps_down]
  uint8_t* source;         // [chunk_rows][source_pitch]
  Between* between;        // [chunk_rows][3][columns]
  uint8_t* tile;           // [span][3][patch_size][patch_size]
};

template <class W>
KEYE_HOST_DEVICE PatchifyShared<W> patchify_shared(const PatchifyKernelParams& params,
                                                   Arena& arena) {
  const int64_t side = params.patchify.patch_size, columns = params.span * side;
  PatchifyShared<W> shared;
  shared.across = arena.take<PatchifyWindow>(columns);
  shared.down = arena.take<PatchifyWindow>(side);
  shared.sums = arena.take<double>(columns + side);
  shared.across_weights = arena.take<W>(params.taps_across * columns);
  shared.down_weights = arena.take<W>(params.taps_down * side);
  shared.source = arena.take<uint8_t>(int64_t{params.chunk_rows} * params.source_pitch);
  shared.between = arena.take<typename PatchifyPass<W>::Between>(columns * 3 * params.chunk_rows);
  shared.tile = arena.take<uint8_t>(3 * columns * side);
  return shared;
}

// What a block makes, the same in every frame.
struct PatchifyTile {
  int64_t patch;           // its first, within the frame
  int columns;             // of the output
  int first_byte;          // of a source row
  int first_row, end_row;  // of the source
};

// ---- weights ----

// Windows and weights of the block's columns and rows.
template <class W>
KEYE_DEVICE void make_weights(const PatchifyKernelParams& params, const PatchifyShared<W>& shared,
                              int first_column, int columns, int first_row) {
  const PatchifyAxis &across = params.patchify.across, &down = params.patchify.down;
  const int side = params.patchify.patch_size;
  for (int i = thread_idx(); i < columns + side; i += kPatchifyThreads) {
    const bool is_column = i < columns;
    const PatchifyAxis& axis = is_column ? across : down;
    const PatchifyWindow window =
        patchify_window(axis, is_column ? first_column + i : first_row + i - columns);
    (is_column ? shared.across[i] : shared.down[i - columns]) = window;
    shared.sums[i] = patchify_sum(axis, window);
  }
  syncthreads();
  for (int i = thread_idx(); i < params.taps_across * columns; i += kPatchifyThreads) {
    const int column = i % columns, tap = i / columns;
    const PatchifyWindow window = shared.across[column];
    // Behind the last tap weights are zero: taps are taken by fours.
    const double value = tap < window.count ? patchify_value(across, window, tap) : 0.0;
    const int at = (tap / kPatchifyGroup * columns + column) * kPatchifyGroup;
    shared.across_weights[at + tap % kPatchifyGroup] =
        patchify_weight(value / shared.sums[column], across.precision, W{});
  }
  for (int i = thread_idx(); i < params.taps_down * side; i += kPatchifyThreads) {
    const int row = i / params.taps_down, tap = i % params.taps_down;
    const PatchifyWindow window = shared.down[row];
    if (tap >= window.count) continue;
    shared.down_weights[i] = patchify_weight(
        patchify_value(down, window, tap) / shared.sums[columns + row], down.precision, W{});
  }
}

// ---- source rows ----

// The address of the tile's first byte of a source row, modulo 16: it is the same in shared memory.
KEYE_DEVICE int misalignment(const uint8_t* row, int first_byte) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row + first_byte) % kVectorBytes);
}

// 16 bytes of memory, of which those outside of [begin, end) become zeros.
KEYE_DEVICE Chunk load_inside(const uint8_t* at, const uint8_t* begin, const uint8_t* end) {
  if (at >= begin && at + kVectorBytes <= end) return load_bytes<Chunk>(at);
  Chunk chunk = {};
#pragma unroll
  for (int i = 0; i < kVectorBytes; i++) {
    const bool inside = at + i >= begin && at + i < end;
    const uint32_t byte = inside ? at[i] : 0;
    chunk.values[i / 4] |= byte << (i % 4 * 8);
  }
  return chunk;
}

// Rows [first_row, first_row + num_rows) of a frame; row i is at i * source_pitch, as far behind a
// multiple of 16 as in memory.
KEYE_DEVICE void load_rows(const PatchifyKernelParams& params, const PatchifyTile& tile,
                           const uint8_t* frame, int first_row, int num_rows, uint8_t* shared) {
  const int chunks = params.source_pitch / kVectorBytes;
  for (int i = thread_idx(); i < num_rows * chunks; i += kPatchifyThreads) {
    const int row_idx = i / chunks, chunk_idx = i % chunks;
    // The last group of rows is filled up with the last row.
    const int64_t y = min(first_row + row_idx, tile.end_row - 1);
    const uint8_t* row = frame + y * params.patchify.stride_row;
    const uint8_t* aligned = row + tile.first_byte - misalignment(row, tile.first_byte);
    const int row_bytes = params.patchify.across.source * 3, byte = chunk_idx * kVectorBytes;
    const int at = row_idx * params.source_pitch + byte;
    store_bytes(shared + at, load_inside(aligned + byte, row, row + row_bytes));
  }
}

// ---- the horizontal pass ----

KEYE_DEVICE void multiply_add(int32_t& sum, int32_t weight, uint32_t value) {
  sum += weight * static_cast<int32_t>(value);
}
KEYE_DEVICE void multiply_add(float& sum, float weight, uint32_t value) {
  sum = fmaf(weight, static_cast<float>(value), sum);
}
KEYE_DEVICE void multiply_add(float& sum, float weight, float value) {
  sum = fmaf(weight, value, sum);
}

KEYE_DEVICE int32_t start_of_sum(int precision, int32_t /*type*/) { return 1 << (precision - 1); }
KEYE_DEVICE float start_of_sum(int /*precision*/, float /*type*/) { return 0.0f; }

KEYE_DEVICE uint8_t between_of(int32_t sum, int precision) {
  return static_cast<uint8_t>(patchify_level(sum, precision));
}
KEYE_DEVICE float between_of(float sum, int /*precision*/) { return sum; }

KEYE_DEVICE int level_of(int32_t sum, int precision) { return patchify_level(sum, precision); }
KEYE_DEVICE int level_of(float sum, int /*precision*/) { return patchify_level(sum); }

template <class W>
struct alignas(16) FourWeights {
  W values[kPatchifyGroup];
};

// Four pixels, 12 bytes, that begin in the first of four words behind `shift` bits.
template <class W>
KEYE_DEVICE void add_pixels(const uint32_t (&words)[4], int shift, const FourWeights<W>& weights,
                            W (&sums)[3]) {
#pragma unroll
  for (int i = 0; i < 3; i++) {
    const uint64_t two = uint64_t{words[i + 1]} << 32 | words[i];
    const auto bytes = static_cast<uint32_t>(two >> shift);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int at = i * 4 + j;
      multiply_add(sums[at % 3], weights.values[at / 3], bytes >> (j * 8) & 0xffu);
    }
  }
}

// A column of four rows at a time: a thread loads the weights once for all of them.
template <class W>
KEYE_DEVICE void filter_across(const PatchifyKernelParams& params, const PatchifyShared<W>& shared,
                               const PatchifyTile& tile, const uint8_t* frame, int first_row,
                               int num_groups) {
  constexpr int kRows = kPatchifyGroup;
  const int precision = params.patchify.across.precision;
  for (int i = thread_idx(); i < tile.columns * num_groups; i += kPatchifyThreads) {
    const int column = i % tile.columns, row_idx = i / tile.columns * kRows;
    const int pixel_byte = shared.across[column].first * 3 - tile.first_byte;

    const uint8_t* word[kRows];
    uint32_t words[kRows][4];
    int shift[kRows];
    W sums[kRows][3];
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const int64_t y = min(first_row + row_idx + r, tile.end_row - 1);
      const int at =
          pixel_byte + misalignment(frame + y * params.patchify.stride_row, tile.first_byte);
      word[r] = shared.source + (row_idx + r) * params.source_pitch + at / 4 * 4;
      shift[r] = at % 4 * 8;
      words[r][3] = load_bytes<uint32_t>(word[r]);
      for (int c = 0; c < 3; c++) sums[r][c] = start_of_sum(precision, W{});
    }

    const int groups = (shared.across[column].count + kPatchifyGroup - 1) / kPatchifyGroup;
    for (int group = 0; group < groups; group++) {
      const auto weights = load_bytes<FourWeights<W>>(
          shared.across_weights + (group * tile.columns + column) * kPatchifyGroup);
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        words[r][0] = words[r][3];
#pragma unroll
        for (int k = 1; k < 4; k++) words[r][k] = load_bytes<uint32_t>(word[r] += 4);
        add_pixels(words[r], shift[r], weights, sums[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; r++) {
#pragma unroll
      for (int c = 0; c < 3; c++) {
        shared.between[((row_idx + r) * 3 + c) * tile.columns + column] =
            between_of(sums[r][c], precision);
      }
    }
  }
}

// ---- the vertical pass ----

// Two neighbouring columns of one channel, and every num_groups-th row of the patch.
struct PatchifyOwned {
  int pair, group, num_groups;  // a thread past the last group has no row
};

template <class B>
struct alignas(2 * sizeof(B)) Two {
  B values[2];
};

// Adds the rows of a chunk to the thread's sums.
template <class W>
KEYE_DEVICE void filter_down(const PatchifyKernelParams& params, const PatchifyShared<W>& shared,
                             const PatchifyTile& tile, const PatchifyOwned& owned, int first_row,
                             int num_rows, W (&sums)[kPatchifyItems][2]) {
  using B = typename PatchifyShared<W>::Between;
#pragma unroll
  for (int k = 0; k < kPatchifyItems; k++) {
    const int row = owned.group + k * owned.num_groups;
    if (row >= params.patchify.patch_size) break;
    const int first = shared.down[row].first, end = first + shared.down[row].count;
    const W* weights = shared.down_weights + row * params.taps_down - first;
    for (int y = max(first, first_row); y < min(end, first_row + num_rows); y++) {
      const auto two =
          load_bytes<Two<B>>(shared.between + (y - first_row) * 3 * tile.columns + owned.pair * 2);
      multiply_add(sums[k][0], weights[y], two.values[0]);
      multiply_add(sums[k][1], weights[y], two.values[1]);
    }
  }
}

// The thread's values to where they belong in the block's patches.
template <class W>
KEYE_DEVICE void store_levels(const PatchifyKernelParams& params, const PatchifyTile& tile,
                              const PatchifyOwned& owned, const W (&sums)[kPatchifyItems][2],
                              uint8_t* patches) {
  const int side = params.patchify.patch_size, precision = params.patchify.down.precision;
  const int channel = owned.pair * 2 / tile.columns, column = owned.pair * 2 % tile.columns;
  const int plane = column / side * 3 + channel;
#pragma unroll
  for (int k = 0; k < kPatchifyItems; k++) {
    const int row = owned.group + k * owned.num_groups;
    if (row >= side) break;
    const int low = level_of(sums[k][0], precision), high = level_of(sums[k][1], precision);
    const int at = (plane * side + row) * side + column % side;
    store_bytes(patches + at, static_cast<uint16_t>(high << 8 | low));
  }
}

// ---- the kernel ----

template <class W>
KEYE_KERNEL(kPatchifyThreads, 3)
patchify_kernel(KEYE_PARAMS PatchifyKernelParams params) {
  const PatchifyParams& patchify = params.patchify;
  const int side = patchify.patch_size;
  const int grid_h = patchify.down.size / side, grid_w = patchify.across.size / side;
  const int num_spans = (grid_w + params.span - 1) / params.span;
  const int first_patch = static_cast<int>(block_idx() % num_spans) * params.span;
  const int band = static_cast<int>(block_idx() / num_spans % grid_h);
  const int64_t frame_group = block_idx() / num_spans / grid_h;

  Arena arena{reinterpret_cast<char*>(shared_memory())};
  const auto shared = patchify_shared<W>(params, arena);
  PatchifyTile tile;
  tile.patch = int64_t{band} * grid_w + first_patch;
  tile.columns = min(params.span, grid_w - first_patch) * side;
  // NOTE: the windows are there for all; the barrier of the first chunk is that of the weights.
  make_weights(params, shared, first_patch * side, tile.columns, band * side);
  tile.first_byte = shared.across[0].first * 3;
  tile.first_row = shared.down[0].first;
  tile.end_row = shared.down[side - 1].first + shared.down[side - 1].count;

  const int num_pairs = tile.columns * 3 / 2;
  const int group = thread_idx() / num_pairs, num_thread_groups = kPatchifyThreads / num_pairs;
  const PatchifyOwned owned{thread_idx() % num_pairs, group < num_thread_groups ? group : side,
                            num_thread_groups};
  const int64_t first_frame = frame_group * params.frames_per_block;
  const int64_t end_frame = min(first_frame + params.frames_per_block, patchify.num_frames);
  for (int64_t frame_idx = first_frame; frame_idx < end_frame; frame_idx++) {
    const uint8_t* frame = patchify.frames + frame_idx * patchify.stride_frame;
    W sums[kPatchifyItems][2];
#pragma unroll
    for (int k = 0; k < kPatchifyItems; k++) {
      sums[k][0] = sums[k][1] = start_of_sum(patchify.down.precision, W{});
    }

    for (int first_row = tile.first_row; first_row < tile.end_row; first_row += params.chunk_rows) {
      const int num_rows = min(params.chunk_rows, tile.end_row - first_row);
      const int num_groups = (num_rows + kPatchifyGroup - 1) / kPatchifyGroup;
      load_rows(params, tile, frame, first_row, num_groups * kPatchifyGroup, shared.source);
      syncthreads();
      filter_across(params, shared, tile, frame, first_row, num_groups);
      syncthreads();
      filter_down(params, shared, tile, owned, first_row, num_rows, sums);
    }

    // Patches of a block lie one after another in memory, too.
    store_levels(params, tile, owned, sums, shared.tile);
    syncthreads();
    const int patch_bytes = 3 * side * side;
    uint8_t* out = patchify.out + (frame_idx * grid_h * grid_w + tile.patch) * patch_bytes;
    for (int i = thread_idx() * 4; i < tile.columns / side * patch_bytes;
         i += kPatchifyThreads * 4) {
      store_bytes(out + i, load_bytes<uint32_t>(shared.tile + i));
    }
  }
}

}  // namespace keye_ops
