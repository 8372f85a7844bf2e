// The epilogue of patch_embed's GEMM from sm_80 on, on the host executor: a block does with a
// tile's products what CUTLASS's epilogue does, but for their way through shared memory.
#include "host_executor/epilogue/cuda_names.h"
// NOTE: CUTLASS's headers come behind the names.
#include "common/gemm_sm80_epilogue.cuh"
#include "host_executor/epilogue/patch_embed_epilogue.h"
#include "patch_embed/patch_embed_sm80.cuh"

namespace keye_ops {
namespace {

using namespace cute;

using Node = PatchEmbedSm80Values<Sm80ThreadMap, Sm80Tile::kM, Sm80Tile::kN>;

void patch_embed_sm80_epilogue_kernel(const EpilogueTestParams params) {
  const int m = static_cast<int>(params.patches.total), n = static_cast<int>(params.patches.hidden);
  const int num_tiles_n = (n + Sm80Tile::kN - 1) / Sm80Tile::kN;
  const cutlass::gemm::GemmCoord tile(static_cast<int>(block_idx()) / num_tiles_n,
                                      static_cast<int>(block_idx()) % num_tiles_n, 0);

  // Where the map of threads itself says that an access is.
  const auto first = Sm80ThreadMap::initial_offset(thread_idx());
  using Count = typename Sm80ThreadMap::Count;
  using Iterations = typename Sm80ThreadMap::Iterations;
  using Delta = typename Sm80ThreadMap::Delta;
  static_assert(Count::kGroup == 1 && Count::kCluster == 1 && Iterations::kGroup == 1 &&
                    Iterations::kCluster == 1,
                "steps go through rows only");

  auto& shared = *reinterpret_cast<typename Node::SharedStorage*>(shared_memory());
  Node node(params.patches, shared);
  auto callbacks = node.get_callbacks(tile, thread_idx(), make_shape(m, n, 1));
  callbacks.begin_epilogue();
  for (int step = 0; step < Count::kRow; step++) {
    callbacks.begin_step(step);
    for (int fragment = 0; fragment < Iterations::kRow * Iterations::kColumn; fragment++) {
      const int row_idx = fragment / Iterations::kColumn;
      const int column_idx = fragment % Iterations::kColumn;
      if (column_idx == 0) callbacks.begin_row(row_idx);
      const int row = tile.m() * Sm80Tile::kM + first.row() + row_idx * Delta::kRow +
                      step * Sm80ThreadMap::Shape::kRow;
      const int column = tile.n() * Sm80Tile::kN + first.column() + column_idx * Delta::kColumn;
      const bool inside = row < m && column < n;
      cutlass::Array<float, kGemmAlignment> products;
      for (int i = 0; i < kGemmAlignment; i++) {
        products[i] = inside ? params.products[int64_t{row} * n + column + i] : 0.0f;
      }
      const auto tokens = callbacks.visit(step, row_idx, column_idx, fragment, products);
      for (int i = 0; i < kGemmAlignment && inside; i++) {
        store_bytes(params.out + int64_t{row} * n + column + i,
                    BFloat16{GemmElement(tokens[i]).storage});
      }
    }
    callbacks.end_step(step);
  }
  callbacks.end_epilogue();
}

const bool kRegistered =
    register_epilogue_test("patch_embed_sm80_epilogue", &patch_embed_sm80_epilogue_kernel);

}  // namespace
}  // namespace keye_ops
