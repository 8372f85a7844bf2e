// The epilogue of patch_embed's GEMM for sm_90a, as a node of CUTLASS's visitor trees.
#pragma once

#include <cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp>

#include "patch_embed/patch_embed_epilogue.cuh"

namespace keye_ops {

template <class Tile, class Element>
struct PatchEmbedSm90Values {
  static constexpr int kTileRows = cute::size<0>(Tile{});
  static constexpr int kTileColumns = cute::size<1>(Tile{});

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
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape, class... Rest>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, Rest...) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE PatchEmbedSm90Values() {}
  CUTLASS_HOST_DEVICE PatchEmbedSm90Values(const Params& params, const SharedStorage& shared)
      : params(&params), taps(const_cast<RowTaps*>(shared.taps)) {}

  const Params* params;
  RowTaps* taps;  // of the tile's rows

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(
      const cutlass::epilogue::fusion::detail::ProducerLoadArgs<Args...>&) {
    return cutlass::epilogue::fusion::EmptyProducerLoadCallbacks{};
  }

  template <class Coordinates>
  struct ConsumerStoreCallbacks : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    Coordinates coordinates;  // of the thread's values from its first on
    const Params* params;
    RowTaps* taps;
    int thread_idx, num_threads;
    int tile_row, tile_column;    // of out
    int first_row, first_column;  // of the thread's first value in the tile

    CUTLASS_DEVICE ConsumerStoreCallbacks(const Coordinates& coordinates)
        : coordinates(coordinates) {}

    CUTLASS_DEVICE void begin() {
      for (int row = thread_idx; row < kTileRows; row += num_threads) {
        taps[row] = row_taps(*params, int64_t{tile_row} + row);
      }
    }
    // The taps are read by other threads than found them.
    CUTLASS_DEVICE bool begin_sync_needed() const { return true; }

    template <class Accumulator, int kCount>
    CUTLASS_DEVICE cutlass::Array<Element, kCount> visit(
        const cutlass::Array<Accumulator, kCount>& products, int epi_v, int epi_m, int epi_n) {
      static_assert(kCount == kQuadValues, "a thread holds 2 rows of 32 columns");
      const auto at = coordinates(cute::_, cute::_, cute::_, epi_m, epi_n)(epi_v * kCount);
      const int row = first_row + static_cast<int>(cute::get<0>(at));
      const int column = first_column + static_cast<int>(cute::get<1>(at)) - 2 * (thread_idx % 4);
      float tokens[kCount];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kCount; i++) tokens[i] = products[i];
      add_positions_in_quad(*params, taps[row], taps[row + 8], thread_idx,
                            int64_t{tile_column} + column, tokens);
      cutlass::Array<float, kCount> sums;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kCount; i++) sums[i] = tokens[i];
      return cutlass::NumericArrayConverter<Element, float, kCount>{}(sums);
    }
  };

  template <bool kReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Args...>& args) {
    const auto [m, n, k, l] = args.problem_shape_mnkl;
    const auto [tile_m, tile_n, tile_k, tile_l] = args.tile_coord_mnkl;
    ConsumerStoreCallbacks<decltype(args.tCcD)> callbacks(args.tCcD);
    callbacks.params = params;
    callbacks.taps = taps;
    callbacks.thread_idx = args.thread_idx;
    callbacks.num_threads = static_cast<int>(cute::size(args.tiled_copy));
    callbacks.tile_row = tile_m * kTileRows;
    callbacks.tile_column = tile_n * kTileColumns;
    // The residue is what lies behind the thread's first value.
    callbacks.first_row = m - cute::get<0>(args.residue_tCcD) - callbacks.tile_row;
    callbacks.first_column = n - cute::get<1>(args.residue_tCcD) - callbacks.tile_column;
    return callbacks;
  }
};

}  // namespace keye_ops
