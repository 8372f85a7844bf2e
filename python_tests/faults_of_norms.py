"""Faults in the kernels of the norms."""

from __future__ import annotations

from planted_fault import faults_of

ADD_LAYER_NORM = faults_of(
    "add_layer_norm",
    (
        "missing barrier between the warps",
        "  syncthreads();\n#pragma unroll\n  for (int j = 0; j < kCount; j++) values[j] = scratch",
        "#pragma unroll\n  for (int j = 0; j < kCount; j++) values[j] = scratch",
        "race, uninitialized",
    ),
    ("one scratch for all sums", "offset = scratch_idx * 2 * kNormMaxWarps", "offset = 0", "race"),
    (
        "shuffle that half of the lanes miss",
        "values[j] += shuffle_xor(values[j], mask);",
        "if (team.thread % 2 == 0) values[j] += shuffle_xor(values[j], mask);",
        "deadlock, divergence",
    ),
    ("load past the row", "min(chunk, num_chunks - 1)", "min(chunk, num_chunks)", "out_of_bounds"),
    (
        "store by idle lanes",
        "if (mine) store_bytes(row.out + d, pack<T>(y));",
        "store_bytes(row.out + d, pack<T>(y));",
        "race",
    ),
    (
        "first chunk of the sum not stored",
        "if (mine) store_bytes(row.sum",
        "if (mine && i > 0) store_bytes(row.sum",
        "unwritten",
    ),
    ("residual not waited for", "        residual.wait();\n", "", "unwaited, race, uninitialized"),
    ("gradients not waited for", "    dy.wait();\n", "", "unwaited, race, uninitialized"),
    (
        "one shelf for two tensors",
        "dsum(kNormSumsBytes<T>, 1)",
        "dsum(kNormSumsBytes<T>, 0)",
        "race, wrong numbers",
    ),
    (
        "one row too many",
        "1);\n\n  for (int64_t index = team.first; index < plan.num_rows;",
        "1);\n\n  for (int64_t index = team.first; index <= plan.num_rows;",
        "out_of_bounds",
    ),
    (
        "sums of idle lanes",
        "sums[0] += mine ? products : 0.0f;",
        "sums[0] += products;",
        "wrong numbers",
    ),
    (
        "teams do not wait for each other",
        "    if (turn < num_teams - 1) syncthreads();\n",
        "",
        "race, uninitialized",
    ),
    (
        "every team stores the partial sums",
        "    if (warp_in_block() < plan.num_teams - 1) return;\n",
        "",
        "race",
    ),
    (
        "partial sums of a block too far",
        "const int64_t partial = block_idx() *",
        "const int64_t partial = (block_idx() + 1) *",
        "out_of_bounds, unwritten",
    ),
)

ADD_RMS_NORM = faults_of(
    "add_rms_norm",
    (
        "32-bit offset",
        "static_cast<const T*>(tensor) + index * stride",
        "static_cast<const T*>(tensor) + static_cast<int>(index) * static_cast<int>(stride)",
        "out_of_bounds",
    ),
    (
        "chunk off its alignment",
        "return row.x + int64_t{chunk}",
        "return row.x + 1 + int64_t{chunk}",
        "misaligned",
    ),
    (
        "results in another row",
        "params.normed) + index *",
        "params.normed) + (index + 1) *",
        "out_of_bounds, unwritten",
    ),
)

MERGE_NORM = faults_of(
    "merge_norm",
    ("end not checked", "patch < end && end <= params.total;", "patch < end;", "out_of_bounds"),
    (
        "sizes not checked against offsets",
        "frame <= end && t * frame == end - start;",
        "true;",
        "out_of_bounds",
    ),
    ("image where there is none", "if (params.num_images == 0) {", "if (false) {", "wrong numbers"),
    (
        "search past the last offset",
        "params.image_offsets[first + mine] <= patch",
        "params.image_offsets[first + mine + 2] <= patch",
        "out_of_bounds",
    ),
    (
        "search that some lanes leave",
        "max(reduce_add(starts ? 1 : 0), 1) - 1;",
        "(starts ? max(reduce_add(1), 1) : 1) - 1;",
        "deadlock, divergence",
    ),
    (
        "gradients of bad tokens in one place",
        "MergedSquare square{token * square_size, side};",
        "MergedSquare square{0, side};",
        "race, unwritten",
    ),
    (
        "offsets not checked for squares",
        "if (!good || local % (side * side) != 0) {",
        "if (!good) {",
        "wrong numbers, race, unwritten",
    ),
    (
        "32-bit offset",
        "return patch * stride +",
        "return static_cast<int>(patch) * static_cast<int>(stride) +",
        "out_of_bounds, crash",
    ),
    (
        "frames of one row less",
        "good_h = h >= 1 && rows % side == 0,",
        "good_h = h >= 1,",
        "wrong numbers, out_of_bounds",
    ),
    (
        "neighbours in a column",
        "+ (k - k_row * static_cast<int>(params.side));",
        "- (k - k_row * static_cast<int>(params.side));",
        "out_of_bounds, wrong numbers, race",
    ),
)
