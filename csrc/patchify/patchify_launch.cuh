// patchify on CUDA: which kernel, on how many blocks; for a GPU and for the host executor.
#pragma once

#include <algorithm>

#include "common/launch.cuh"
#include "patchify/patchify.cuh"

namespace keye_ops {

constexpr int kPatchifySpan = 6;                     // patches that 256 threads are best at
constexpr int kPatchifyChunkRows = 12;               // the same of source rows
constexpr int64_t kPatchifyWantedBlocks = 4096;      // enough to fill the largest GPU several times
constexpr int64_t kPatchifySharedBytes = 40 * 1024;  // lets several blocks share a processor
constexpr int64_t kPatchifyMaxSharedBytes = 96 * 1024;  // what every GPU has
constexpr int kPatchifyMaxShrink = 96;                  // that fits these
constexpr int kPatchifyMaxCudaPatch = 34;  // a thread has kPatchifyItems rows of two columns

constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

template <class W>
int64_t patchify_shared_bytes(const PatchifyKernelParams& params) {
  Arena arena{nullptr};
  patchify_shared<W>(params, arena);
  return arena.used;
}

// Sets what depends on the span.
inline void set_span(PatchifyKernelParams& params, int span) {
  const PatchifyAxis& across = params.patchify.across;
  params.span = span;
  // Pixels behind the span's columns, what alignment puts before them, and what four taps and a
  // word read too much.
  const double columns = span * params.patchify.patch_size - 1;
  const int pixels = static_cast<int>(columns * patchify_scale(across)) + patchify_taps(across) + 1;
  params.source_pitch = round_up(3 * pixels + 15 + 16, kVectorBytes);
}

// The widest span, then the most rows, that fit.
template <class W>
PatchifyKernelParams plan_patchify(const PatchifyParams& patchify) {
  PatchifyKernelParams params{};
  params.patchify = patchify;
  params.taps_across = round_up(patchify_taps(patchify.across), kPatchifyGroup);
  params.taps_down = patchify_taps(patchify.down);
  const int side = patchify.patch_size, grid_w = patchify.across.size / side;
  const int rows_of_threads = kPatchifyThreads / ((side + kPatchifyItems - 1) / kPatchifyItems);
  int span = std::min({kPatchifySpan, grid_w, std::max(1, rows_of_threads / (3 * side / 2))});
  params.chunk_rows = kPatchifyChunkRows;
  for (set_span(params, span); patchify_shared_bytes<W>(params) > kPatchifySharedBytes;) {
    if (params.span > 1) {
      set_span(params, (params.span + 1) / 2);
    } else if (params.chunk_rows > kPatchifyGroup) {
      params.chunk_rows -= kPatchifyGroup;
    } else {
      break;
    }
  }
  return params;
}

template <class W>
void launch_patchify_as(const PatchifyParams& patchify, int device_index) {
  PatchifyKernelParams params = plan_patchify<W>(patchify);
  const int64_t shared_bytes = patchify_shared_bytes<W>(params);
  KEYE_CHECK(shared_bytes <= kPatchifyMaxSharedBytes,
             "patchify: the filter on CUDA must fit shared memory of ", kPatchifyMaxSharedBytes,
             " bytes, got ", shared_bytes);
  const int side = patchify.patch_size;
  const int64_t grid_h = patchify.down.size / side, grid_w = patchify.across.size / side;
  const int64_t tiles = grid_h * ((grid_w + params.span - 1) / params.span);
  // A block makes its patches of several frames where there are enough blocks: its weights are
  // those of all of them.
  const int64_t groups = std::clamp<int64_t>(kPatchifyWantedBlocks / tiles, 1, patchify.num_frames);
  params.frames_per_block = static_cast<int>((patchify.num_frames + groups - 1) / groups);
  const int64_t num_groups =
      (patchify.num_frames + params.frames_per_block - 1) / params.frames_per_block;
  launch("patchify", &patchify_kernel<W>,
         {tiles * num_groups, kPatchifyThreads, static_cast<size_t>(shared_bytes)}, device_index,
         params);
}

inline void launch_patchify(const PatchifyParams& patchify, int device_index) {
  const int side = patchify.patch_size;
  KEYE_CHECK(side % 2 == 0 && side <= kPatchifyMaxCudaPatch,
             "patchify: patch_size on CUDA must be even, up to ", kPatchifyMaxCudaPatch, ", got ",
             side);
  KEYE_CHECK(!patchify.vertical_first, "patchify: vertical_first on CUDA must be False, got True");
  const double shrink = std::max(patchify_scale(patchify.across), patchify_scale(patchify.down));
  KEYE_CHECK(shrink <= kPatchifyMaxShrink, "patchify: frames on CUDA must shrink ",
             kPatchifyMaxShrink, " times at most, got ", shrink);
  if (patchify.is_float) {
    launch_patchify_as<float>(patchify, device_index);
  } else {
    launch_patchify_as<int32_t>(patchify, device_index);
  }
}

}  // namespace keye_ops
