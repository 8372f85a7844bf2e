// The parts of a plan's tiles, for kernels whose blocks take fewer rows.
#pragma once

#include "common/memory.cuh"
#include "varlen_attention/varlen_attention.h"

namespace keye_ops {

// Rows of part idx, of which every tile has kAttentionTileRows / kRows; rows_left is not positive
// where the tile has none of them.
template <int kRows>
KEYE_DEVICE AttentionTile attention_part(const AttentionTile* tiles, int64_t idx) {
  static_assert(kAttentionTileRows % kRows == 0, "a tile is whole parts");
  constexpr int kParts = kAttentionTileRows / kRows;
  AttentionTile part = load_bytes<AttentionTile>(&tiles[idx / kParts]);
  const int before = static_cast<int>(idx % kParts) * kRows;
  part.row += before;
  part.rows_left -= before;
  return part;
}

}  // namespace keye_ops
