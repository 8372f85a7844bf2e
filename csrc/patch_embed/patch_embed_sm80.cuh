// The epilogue of patch_embed's GEMM from sm_80 on, as a node of CUTLASS's visitor trees.
#pragma once

#include "patch_embed/patch_embed_epilogue.cuh"

namespace keye_ops {

template <class ThreadMap, int kTileRows, int kTileColumns>
struct PatchEmbedSm80Values {
  struct SharedStorage {
    RowTaps taps[kTileRows];
  };
  using Arguments = PatchEmbedParams;
  using Params = PatchEmbedParams;

  template <class Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }

  CUTLASS_HOST_DEVICE PatchEmbedSm80Values() {}
  CUTLASS_HOST_DEVICE PatchEmbedSm80Values(const Params& params, const SharedStorage& shared)
      : params(&params), taps(const_cast<RowTaps*>(shared.taps)) {}

  const Params* params;
  RowTaps* taps;  // of the tile's rows

  template <class Coordinates>
  struct Callbacks : cutlass::epilogue::threadblock::EmptyCallbacks {
    Coordinates coordinates;  // of the thread's values in out
    const Params* params;
    RowTaps* taps;
    int thread_idx, tile_row, tile_column;

    CUTLASS_DEVICE Callbacks(const Coordinates& coordinates) : coordinates(coordinates) {}

    CUTLASS_DEVICE void begin_epilogue() {
      for (int row = thread_idx; row < kTileRows; row += block_size()) {
        taps[row] = row_taps(*params, int64_t{tile_row} + row);
      }
      syncthreads();
    }

    template <class Accumulator, int kCount>
    CUTLASS_DEVICE cutlass::Array<float, kCount> visit(
        int step, int row_idx, int column_idx, int /*fragment*/,
        const cutlass::Array<Accumulator, kCount>& products) {
      static_assert(kCount == kTableVector, "a thread holds 16 bytes of a row");
      const auto at = coordinates(cute::_0{}, column_idx, row_idx, step);
      const int row = static_cast<int>(cute::get<0>(at)),
                column = static_cast<int>(cute::get<1>(at));
      float tokens[kCount];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kCount; i++) tokens[i] = products[i];
      add_positions(*params, taps[row - tile_row], column, tokens);
      cutlass::Array<float, kCount> sums;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kCount; i++) sums[i] = tokens[i];
      return sums;
    }
  };

  template <class Shape>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread_idx, Shape shape) {
    const auto coordinates = cute::group_modes<3, 6>(
        ThreadMap::partition(cute::make_identity_tensor(shape), thread_idx, tile));
    Callbacks<cute::remove_cvref_t<decltype(coordinates)>> callbacks(coordinates);
    callbacks.params = params;
    callbacks.taps = taps;
    callbacks.thread_idx = thread_idx;
    callbacks.tile_row = tile.m() * kTileRows;
    callbacks.tile_column = tile.n() * kTileColumns;
    return callbacks;
  }
};

}  // namespace keye_ops
