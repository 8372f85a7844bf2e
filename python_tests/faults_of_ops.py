"""Faults in the kernels of rope, patches and linear_gelu."""

from __future__ import annotations

from planted_fault import faults_of

ROPE = faults_of(
    "rope",
    (
        "32-bit offset",
        "static_cast<const T*>(tensor.x) + token * tensor.x_stride_token",
        "static_cast<const T*>(tensor.x) + int(token) * int(tensor.x_stride_token)",
        "out_of_bounds",
    ),
    (
        "load of one row too many",
        "lane.num_groups < last) chunks",
        "lane.num_groups <= last) chunks",
        "out_of_bounds",
    ),
    ("store by idle lanes", "if (active) store_vector", "store_vector", "race, out_of_bounds"),
    ("last row not stored", "active = head < last;", "active = head < last - 1;", "unwritten"),
    (
        "shuffle in a branch",
        "        rotate_chunk<T>(lane, params.interleaved, cos, sin, chunks",
        "        if (active) rotate_chunk<T>(lane, params.interleaved, cos, sin, chunks",
        "deadlock, divergence",
    ),
    (
        "two warps share a partial sum",
        "params.head_dim, warp_idx, q_dweight",
        "params.head_dim, warp_idx / 2, q_dweight",
        "race",
    ),
    ("partial sums stored by every group", "if (lane.group == 0) {", "if (true) {", "race"),
    ("unaligned weight", "tensor.norm_weight) + d,", "tensor.norm_weight) + d + 1,", "misaligned"),
    ("one item too many", "item < num_items", "item <= num_items", "out_of_bounds"),
    (
        "frequency past the table",
        "params.inv_freq[pair]",
        "params.inv_freq[pair + 1]",
        "out_of_bounds",
    ),
    (
        "axis not clamped",
        "min(max(wanted_axis, 0), params.num_axes - 1)",
        "wanted_axis",
        "wrong numbers",
    ),
    (
        "position not clamped",
        "min(max(value, int64_t{0}), kRopeMaxPosition - 1)",
        "value",
        "wrong numbers",
    ),
    (
        "the neighbour's partner",
        "const int low = lane.chunk + lane.num_chunks / 2,",
        "const int low = lane.chunk + lane.num_chunks / 2 - 1,",
        "wrong numbers",
    ),
)

PATCH_EMBED = faults_of(
    "patch_embed",
    (
        "word behind the row",
        "if (at < num_bytes) word",
        "if (at <= num_bytes) word",
        "out_of_bounds",
    ),
    (
        "16 bytes of a row at a multiple of 8",
        "kWords % 4 == 0 && word_bytes == 16",
        "kWords % 4 == 0 && word_bytes >= 8",
        "misaligned, out_of_bounds",
    ),
    (
        "32-bit offset",
        "in + (first_row + row) * in_stride",
        "in + int(first_row + row) * int(in_stride)",
        "out_of_bounds",
    ),
    (
        "one row too many in the last block",
        "min(int64_t{kPackRows}, num_rows - first_row)",
        "min(int64_t{kPackRows}, num_rows - first_row + 1)",
        "out_of_bounds",
    ),
    ("last row not packed", "i < rows * num_chunks", "i < (rows - 1) * num_chunks", "unwritten"),
    (
        "another channel's mean",
        "int channel = first / params.area;",
        "int channel = 0;",
        "wrong numbers",
    ),
    (
        "padding that is not zero",
        "i < num_values ? normalised_byte(byte, by) : 0.0f",
        "normalised_byte(byte, by)",
        "wrong numbers",
    ),
    (
        "runs read before they are there",
        "  syncthreads();\n  int64_t ends",
        "  int64_t ends",
        "race, uninitialized",
    ),
    ("bad place not noticed", "if (taps.good) {", "if (true) {", "wrong numbers"),
    (
        "one chunk for two threads",
        "chunk = thread_idx() % num_chunks;",
        "chunk = (thread_idx() - thread_idx() % 2) % num_chunks;",
        "race, wrong numbers",
    ),
    (
        "token before the block's",
        "(first + row) * params.hidden + column",
        "(first + row - 1) * params.hidden + column",
        "out_of_bounds",
    ),
    (
        "a cell for a patch that does not exist",
        "if (patch >= params.total) return;",
        "if (patch > params.total) return;",
        "out_of_bounds",
    ),
    (
        "search past the last patch",
        "last = params.total;",
        "last = params.total + 1;",
        "out_of_bounds",
    ),
    (
        "entries read before they are there",
        "    syncthreads();\n\n    // ... then all",
        "\n    // ... then all",
        "race, uninitialized",
    ),
    (
        "entries overwritten while they are read",
        "    }\n    syncthreads();\n  }\n\n  if (!active) return;",
        "    }\n  }\n\n  if (!active) return;",
        "race",
    ),
    ("idle threads store", "  if (!active) return;\n", "", "race, out_of_bounds"),
    (
        "parts share their sums",
        "params.partials + part * params.side",
        "params.partials + part / 2 * params.side",
        "race",
    ),
    (
        "a part without its last patch",
        "length * (part + 1) / params.num_parts;",
        "length * (part + 1) / params.num_parts - 1;",
        "wrong numbers",
    ),
)

PATCHIFY = faults_of(
    "patchify",
    ("windows not waited for", "  syncthreads();\n  for (int i", "  for (int i", "race"),
    (
        "rows not waited for",
        "      syncthreads();\n      filter_across",
        "      filter_across",
        "race",
    ),
    (
        "columns not waited for",
        "      syncthreads();\n      filter_down",
        "      filter_down",
        "race",
    ),
    (
        "patches not waited for",
        "    syncthreads();\n    const int patch_bytes",
        "    const int patch_bytes",
        "race, uninitialized",
    ),
    ("16 bytes past a row", "at + kVectorBytes <= end", "at < end", "out_of_bounds"),
    ("16 bytes before a row", "if (at >= begin && ", "if (", "out_of_bounds"),
    (
        "32-bit offset",
        "frame_idx * patchify.stride_frame",
        "int(frame_idx) * int(patchify.stride_frame)",
        "out_of_bounds",
    ),
    (
        "a group not filled up",
        "num_groups * kPatchifyGroup, shared.source",
        "num_rows, shared.source",
        "uninitialized",
    ),
    ("one word not stored", "i < tile.columns / side * patch_bytes;",
     "i < tile.columns / side * patch_bytes - 4;", "unwritten"),
    ("one frame too many", "end_frame = min(first_frame + params.frames_per_block,",
     "end_frame = min(first_frame + params.frames_per_block + 1,", "race"),
    ("one tap too many", "y < min(end, first_row + num_rows)",
     "y <= min(end, first_row + num_rows - 1)", "wrong numbers, uninitialized"),
    ("channels in the wrong order", "column / side * 3 + channel",
     "column / side * 3 + 2 - channel", "wrong numbers"),
)  # fmt: skip

LINEAR_GELU = faults_of(
    "linear_gelu",
    ("load of one vector too many", "(vector >= num_vectors) continue;\n    hidden_chunks",
     "(vector > num_vectors) continue;\n    hidden_chunks", "out_of_bounds"),
    ("store of one vector too many", "(vector >= num_vectors) continue;\n    float",
     "(vector > num_vectors) continue;\n    float", "out_of_bounds, race"),
    ("one value too many", "rest < params.numel", "rest <= params.numel", "out_of_bounds"),
    ("the rest by every block", "block_idx() + 1 == grid_size() && ", "", "race"),
    ("the rest by no block", "block_idx() + 1 ==", "block_idx() ==", "unwritten, wrong numbers"),
    ("threads of a block share vectors", "kLinearGeluVectors + thread_idx();",
     "kLinearGeluVectors + thread_idx() / 2;", "race"),
    ("blocks overlap", "block_idx() * kLinearGeluThreads * kLinearGeluVectors",
     "block_idx() * kLinearGeluThreads", "race, unwritten"),
    ("gradient of a neighbour", "load_bytes<Chunk>(dout + vector * kVec)",
     "load_bytes<Chunk>(dout + vector * kVec + 1)", "misaligned"),
    ("forward instead of the gradient", "kBackward ? gelu_dx", "!kBackward ? gelu_dx",
     "wrong numbers"),
)  # fmt: skip

PATCH_EMBED_EPILOGUE = faults_of(
    "patch_embed_epilogue",
    ("columns behind the last", "column >= params.hidden || taps.rows[0] < 0",
     "taps.rows[0] < 0", "out_of_bounds"),
    ("rows behind the last", "  if (patch >= params.total) return taps;", "", "out_of_bounds"),
    ("trade with another lane", "low : high, step)", "low : high, 3 - step)", "wrong numbers"),
    ("trade of the other half", "upper ? low : high, step", "upper ? high : low, step",
     "wrong numbers"),
    ("taps of the row above", "half == 0 ? upper_row : lower_row", "upper_row", "wrong numbers"),
    ("columns of another lane", "(lane % 4), positions", "(lane % 2), positions",
     "wrong numbers"),
    ("a bad row takes from the table", "if (!found.good) taps.rows[0] = -1;", "", "wrong numbers"),
)  # fmt: skip
