// The epilogue of patch_embed's GEMM for sm_90a on the host executor: a block of a warpgroup does
// with a tile's products what CUTLASS's collective does, but for the copies.
#include "host_executor/epilogue/cuda_names.h"
// NOTE: CUTLASS's headers come behind the names.
#include "common/gemm_sm90_epilogue.cuh"
#include "host_executor/epilogue/patch_embed_epilogue.h"
#include "patch_embed/patch_embed_sm90.cuh"

namespace keye_ops {
namespace {

using namespace cute;

using Node = PatchEmbedSm90Values<Sm90Tile, GemmElement>;
using Collective = Sm90Epilogue<Node>;

void patch_embed_sm90_epilogue_kernel(const EpilogueTestParams params) {
  const PatchEmbedParams& patches = params.patches;
  const int m = static_cast<int>(patches.total), n = static_cast<int>(patches.hidden);
  const int num_tiles_n = (n + size<1>(Sm90Tile{}) - 1) / size<1>(Sm90Tile{});
  const int tile_m = static_cast<int>(block_idx()) / num_tiles_n;
  const int tile_n = static_cast<int>(block_idx()) % num_tiles_n;
  const auto mma =
      make_tiled_mma(decltype(GMMA::ss_op_selector<GemmElement, GemmElement, float, Sm90Tile>()){});

  // Where wgmma leaves its sums is the one layout that is not the epilogue's own.
  const auto whole = make_identity_tensor(make_shape(m, n));
  const auto tile = local_tile(whole, take<0, 2>(Sm90Tile{}), make_coord(tile_m, tile_n));
  const auto places = mma.get_thread_slice(thread_idx()).partition_C(tile);
  auto sums = partition_fragment_C(mma, take<0, 2>(Sm90Tile{}));
  auto rows = make_fragment_like<int>(sums), columns = make_fragment_like<int>(sums);
  for (int i = 0; i < size(sums); i++) {
    rows(i) = get<0>(places(i));
    columns(i) = get<1>(places(i));
    const bool inside = rows(i) < m && columns(i) < n;
    sums(i) = inside ? params.products[int64_t{rows(i)} * n + columns(i)] : 0.0f;
  }

  // As the collective's store does.
  using EpilogueTile = typename Collective::EpilogueTile;
  constexpr int kCount = Collective::DispatchPolicy::FragmentSize;
  const auto copy_c = make_tiled_copy_C_atom(typename Collective::CopyAtomC{}, mma);
  const auto r2s =
      make_tiled_copy_S(Copy_Atom<typename Collective::CopyOpR2S, GemmElement>{}, copy_c);
  const auto thread_r2s = r2s.get_slice(thread_idx());
  const auto thread_places = thread_r2s.partition_S(flat_divide(tile, EpilogueTile{}));
  auto fragments = recast<cutlass::Array<float, kCount>>(thread_r2s.retile_S(sums));
  auto row_fragments = recast<cutlass::Array<int, kCount>>(thread_r2s.retile_S(rows));
  auto column_fragments = recast<cutlass::Array<int, kCount>>(thread_r2s.retile_S(columns));
  const auto coordinates = make_coord_tensor(tile.layout());
  const auto thread_coordinates = make_coord_tensor(thread_places.layout());
  const auto residue = make_coord(m, n) - tile(_0{});
  const auto thread_residue = make_coord(m, n) - thread_places(_0{});
  auto no_source = make_tensor<float>(Shape<_1>{});
  const cutlass::epilogue::fusion::detail::ConsumerStoreArgs arguments(
      make_shape(m, n, 0, 1), Sm90Tile{}, make_coord(tile_m, tile_n, 0, 0), mma, EpilogueTile{},
      r2s, coordinates, residue, thread_coordinates, thread_residue, no_source, thread_idx());
  auto& shared = *reinterpret_cast<typename Node::SharedStorage*>(shared_memory());
  Node node(patches, shared);
  auto callbacks = node.template get_consumer_store_callbacks<true>(arguments);

  callbacks.begin();
  if (callbacks.begin_sync_needed()) syncthreads();
  constexpr int kMmaColumns = size<1>(Sm90Tile{}) / decltype(size<2>(fragments))::value;
  constexpr int kEpilogueColumns = size<1>(EpilogueTile{});
  for (int epi_n = 0; epi_n < size<4>(thread_places); epi_n++) {
    for (int epi_m = 0; epi_m < size<3>(thread_places); epi_m++) {
      callbacks.begin_loop(epi_m, epi_n);
      callbacks.previsit(epi_m, epi_n, 0, false);
      const int mma_n = epi_n * kEpilogueColumns / kMmaColumns;
      const int first = epi_n % (kMmaColumns / kEpilogueColumns);
      const auto tokens = callbacks.visit(fragments(first, epi_m, mma_n), 0, epi_m, epi_n);
      const auto token_rows = row_fragments(first, epi_m, mma_n);
      const auto token_columns = column_fragments(first, epi_m, mma_n);
      for (int i = 0; i < kCount; i++) {
        if (token_rows[i] >= m || token_columns[i] >= n) continue;
        const GemmElement token = tokens[i];
        store_bytes(params.out + int64_t{token_rows[i]} * n + token_columns[i],
                    BFloat16{token.storage});
      }
    }
  }
}

const bool kRegistered =
    register_epilogue_test("patch_embed_sm90_epilogue", &patch_embed_sm90_epilogue_kernel);

}  // namespace
}  // namespace keye_ops
