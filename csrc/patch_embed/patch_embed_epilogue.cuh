// What the epilogues of patch_embed's GEMMs do to the values that a thread holds: add the bias and
// the position, whose place in the table is found once a row of a tile.
#pragma once

#include "common/vec.cuh"
#include "patch_embed/patch_embed_place.cuh"

namespace keye_ops {

constexpr int kTableVector = kVectorSize<BFloat16>;  // columns that one load brings

// The rows of the table that a row of the tile mixes, and their shares, in shared memory.
struct alignas(16) RowTaps {
  int32_t rows[4];  // the first is -1 where the token is zeros
  float shares[4];
};

KEYE_DEVICE RowTaps row_taps(const PatchEmbedParams& params, int64_t patch) {
  RowTaps taps = {};
  if (patch >= params.total) return taps;  // a row of the last tile that nobody stores
  const PatchTaps<float> found = checked_taps(params, patch);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    taps.rows[i] = static_cast<int32_t>(found.rows[i]);
    taps.shares[i] = found.shares[i];
  }
  if (!found.good) taps.rows[0] = -1;
  return taps;
}

// Adds bias and position to 8 columns of a row, from a multiple of 8 on.
KEYE_DEVICE void add_positions(const PatchEmbedParams& params, const RowTaps& taps, int64_t column,
                               float (&tokens)[kTableVector]) {
  if (column >= params.hidden || taps.rows[0] < 0) {
#pragma unroll
    for (float& token : tokens) token = 0.0f;
    return;
  }
  float bias[kTableVector] = {}, corners[4][kTableVector];
  if (params.bias != nullptr) load_vector(static_cast<const BFloat16*>(params.bias) + column, bias);
  const BFloat16* table = static_cast<const BFloat16*>(params.table) + column;
#pragma unroll
  for (int k = 0; k < 4; k++) load_vector(table + taps.rows[k] * params.hidden, corners[k]);
#pragma unroll
  for (int i = 0; i < kTableVector; i++) {
    const float mixed[4] = {corners[0][i], corners[1][i], corners[2][i], corners[3][i]};
    tokens[i] = add_position(tokens[i], bias[i], mixed, taps.shares);
  }
}

// Four lanes with 8 of 32 columns each trade, so that each has 2 of every 8: pair i of lane j
// becomes pair j of lane i.
KEYE_DEVICE void trade_in_quad(int lane, float (&values)[kTableVector]) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
      if ((pair & step) != 0) continue;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float& low = values[2 * pair + i];
        float& high = values[2 * (pair | step) + i];
        const float received = shuffle_xor(upper ? low : high, step);
        (upper ? low : high) = received;
      }
    }
  }
}

// The values that a thread of wgmma holds of 32 columns: 2 of every 8, of a row and of the eighth
// row below it.
constexpr int kQuadValues = 16;
KEYE_DEVICE void add_positions_in_quad(const PatchEmbedParams& params, const RowTaps& upper_row,
                                       const RowTaps& lower_row, int lane, int64_t first_column,
                                       float (&tokens)[kQuadValues]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const RowTaps& taps = half == 0 ? upper_row : lower_row;
    float positions[kTableVector] = {};
    add_positions(params, taps, first_column + int64_t{kTableVector} * (lane % 4), positions);
    trade_in_quad(lane, positions);
#pragma unroll
    for (int i = 0; i < kTableVector; i++) {
      float& token = tokens[4 * (i / 2) + 2 * half + i % 2];
      token = taps.rows[0] < 0 ? 0.0f : token + positions[i];
    }
  }
}

}  // namespace keye_ops
