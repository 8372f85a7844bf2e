"""The planted faults: a replacement in a kernel's source, and how the executor must report it."""

from __future__ import annotations

from dataclasses import dataclass

SELFTEST = "host_executor/selftest/"
SOURCES = {
    "gemm_mma": SELFTEST + "gemm_mma.cuh",
    "gemm_wgmma": SELFTEST + "gemm_wgmma.cuh",
    "cluster_sum": SELFTEST + "cluster_sum.cuh",
    "row_sums": SELFTEST + "row_sums.cuh",
    "linear_gelu": "linear_gelu/linear_gelu.cuh",
    "rope": "rope/rope.cuh",
    "patch_embed": "patch_embed/patch_embed.cuh",
    "patch_embed_epilogue": "patch_embed/patch_embed_epilogue.cuh",
    "patchify": "patchify/patchify.cuh",
    "add_layer_norm": "common/norm_row.cuh",
    "add_rms_norm": "common/added_rows.cuh",
    "merge_norm": "merge_norm/merge_norm.cuh",
}


@dataclass(frozen=True)
class Fault:
    """A text of the source, what to put in its place, and kinds of which one must be reported.

    "wrong numbers" stands for a result that is wrong while nothing is to be reported.
    """

    name: str
    kernel: str
    find: str
    replace: str
    expected: tuple[str, ...]


def _of(kernel: str, *faults: tuple[str, str, str, str]) -> list[Fault]:
    return [
        Fault(name, kernel, find, replace, tuple(expected.split(", ")))
        for name, find, replace, expected in faults
    ]


GEMM_MMA = _of(
    "gemm_mma",
    (
        "missing barrier",
        "    syncthreads();\n    load_stage",
        "    load_stage",
        "race",
    ),
    (
        "barrier before the wait",
        "    ptx::cp_async_wait_group<G::kNumStages - 2>();\n    syncthreads();",
        "    syncthreads();\n    ptx::cp_async_wait_group<G::kNumStages - 2>();",
        "race",
    ),
    (
        "one wait too few",
        "cp_async_wait_group<G::kNumStages - 2>",
        "cp_async_wait_group<G::kNumStages - 1>",
        "race, uninitialized",
    ),
    (
        "refill before the barrier",
        "    syncthreads();\n    load_stage(k_block + G::kNumStages - 1);",
        "    load_stage(k_block + G::kNumStages - 1);\n    syncthreads();",
        "race",
    ),
    ("copies never committed", "    ptx::cp_async_commit_group();\n", "", "race, uninitialized"),
    ("loads past the last block", "if (k_block < num_k_blocks) {", "if (true) {", "unwaited"),
    ("load of one row too many", "x_row < num_rows", "x_row <= num_rows", "out_of_bounds"),
    ("load past the end of K", "x_k < k;", "x_k <= k;", "out_of_bounds"),
    ("store of one row too many", "row < params.m", "row <= params.m", "out_of_bounds"),
    ("store of one column too many", "column < params.n", "column <= params.n", "race"),
    (
        "unaligned source",
        "x + int64_t{x_row} * k + x_k",
        "x + int64_t{x_row} * k + x_k + 1",
        "misaligned",
    ),
    (
        "copy across its destination",
        "tile + gemm_mma_offset(row, chunk), source",
        "tile + gemm_mma_offset(row, chunk) + 8, source",
        "misaligned",
    ),
    (
        "divergent barrier",
        "    syncthreads();\n",
        "    if (lane_idx < 16) syncthreads();\n",
        "deadlock, divergence, race",
    ),
    (
        "divergent product",
        "          ptx::mma_m16n8k16",
        "          if (lane_idx != 31) ptx::mma_m16n8k16",
        "deadlock",
    ),
    (
        "barriers in both branches",
        "    syncthreads();\n",
        "    if (lane_idx % 2 == 0) {\n      syncthreads();\n    } else {\n      syncthreads();\n"
        "    }\n",
        "divergence",
    ),
    (
        "results that are not stored",
        "if (row < params.m &&",
        "if (v != 3 && row < params.m &&",
        "unwritten",
    ),
    (
        "store to the input",
        "params.c[int64_t{row} * params.n + column] =",
        "const_cast<BFloat16*>(params.a)[0].bits = 0, params.c[int64_t{row} * params.n + column] =",
        "read_only",
    ),
    (
        "stage too many",
        "stages + static_cast<uint32_t>(k_block % G::kNumStages) * G::kStageBytes;\n"
        "    const uint32_t tile_b",
        "stages + static_cast<uint32_t>(k_block % G::kNumStages + 1) * G::kStageBytes;\n"
        "    const uint32_t tile_b",
        "out_of_bounds, race, uninitialized",
    ),
    (
        "unswizzled reads of a",
        "tile_a + gemm_mma_offset(row, k_step * 2 + lane_idx / 16)",
        "tile_a + row * G::kRowBytes + (k_step * 2 + lane_idx / 16) * 16",
        "wrong numbers",
    ),
    (
        "swapped fragment",
        "b[j / 2][first], b[j / 2][first + 1]",
        "b[j / 2][first + 1], b[j / 2][first]",
        "wrong numbers",
    ),
)

GEMM_WGMMA = _of(
    "gemm_wgmma",
    (
        "no barrier after the mbarriers' init",
        "    ptx::fence_mbarrier_init();\n  }\n  syncthreads();",
        "    ptx::fence_mbarrier_init();\n  }",
        "race, mbarrier",
    ),
    ("mbarriers' init not fenced", "    ptx::fence_mbarrier_init();\n", "", "proxy_fence"),
    ("consumer does not wait", "    ptx::mbarrier_wait(stage.full, stage.phase);\n", "", "race"),
    (
        "consumer's parity wrong",
        "mbarrier_wait(stage.full, stage.phase)",
        "mbarrier_wait(stage.full, stage.phase ^ 1)",
        "race, uninitialized",
    ),
    (
        "producer does not wait",
        "    ptx::mbarrier_wait(stage.empty, stage.phase ^ 1);\n",
        "",
        "race",
    ),
    (
        "producer's parity wrong",
        "mbarrier_wait(stage.empty, stage.phase ^ 1)",
        "mbarrier_wait(stage.empty, stage.phase)",
        "deadlock",
    ),
    (
        "bytes of one copy expected",
        "mbarrier_arrive_expect_tx(stage.full, G::kStageBytes)",
        "mbarrier_arrive_expect_tx(stage.full, G::kTileBytesA)",
        "race, uninitialized, deadlock",
    ),
    (
        "more bytes expected than come",
        "mbarrier_arrive_expect_tx(stage.full, G::kStageBytes)",
        "mbarrier_arrive_expect_tx(stage.full, G::kStageBytes + 16)",
        "deadlock",
    ),
    (
        "slot released before it is read",
        "    ptx::wgmma_wait_group<0>();\n    ptx::mbarrier_arrive(stage.empty);",
        "    ptx::mbarrier_arrive(stage.empty);\n    ptx::wgmma_wait_group<0>();",
        "race",
    ),
    ("slot never released", "    ptx::mbarrier_arrive(stage.empty);\n", "", "deadlock"),
    (
        "slot released twice",
        "    ptx::mbarrier_arrive(stage.empty);\n",
        "    ptx::mbarrier_arrive(stage.empty);\n    ptx::mbarrier_arrive(stage.empty);\n",
        "deadlock, mbarrier, race",
    ),
    ("missing wgmma.fence", "    ptx::wgmma_fence();\n", "", "wgmma"),
    ("products not committed", "    ptx::wgmma_commit_group();\n", "", "wgmma, unwaited, race"),
    (
        "accumulators read too early",
        "    ptx::wgmma_wait_group<0>();\n",
        "",
        "wgmma, unwaited, race",
    ),
    ("missing proxy fence", "  ptx::fence_proxy_async();\n", "", "proxy_fence"),
    ("missing barrier before the store", "  ptx::bar_sync(1, G::kNumConsumers);\n", "", "race"),
    (
        "named barrier counts the producer",
        "bar_sync(1, G::kNumConsumers)",
        "bar_sync(1, G::kNumThreads)",
        "deadlock",
    ),
    (
        "named barrier of a warp less",
        "bar_sync(1, G::kNumConsumers)",
        "bar_sync(1, G::kNumConsumers - 32)",
        "race, deadlock",
    ),
    (
        "named barrier of half warps",
        "  ptx::bar_sync(1, G::kNumConsumers);\n",
        "  if (lane_idx < 16) ptx::bar_sync(1, 64);\n",
        "divergence",
    ),
    (
        "named barriers disagree",
        "bar_sync(1, G::kNumConsumers)",
        "bar_sync(1, warp_idx == 0 ? G::kNumConsumers : G::kNumThreads)",
        "divergence, deadlock",
    ),
    ("store not waited for", "    ptx::cp_async_bulk_wait_group_read<0>();\n", "", "unwaited"),
    ("store not committed", "    ptx::cp_async_bulk_commit_group();\n", "", "unwaited"),
    (
        "store to another tile",
        "params.c, {first_n, first_m}",
        "params.c, {first_m, first_n}",
        "wrong numbers",
    ),
    (
        "every lane produces",
        "if (ptx::elect_sync()) gemm_wgmma_produce",
        "gemm_wgmma_produce",
        "mbarrier, race, deadlock",
    ),
    (
        "the wrong swizzle",
        "8 * GemmWgmma::kRowBytes, 0, GemmWgmma::kSwizzle",
        "8 * GemmWgmma::kRowBytes, 0, Swizzle::k64",
        "wrong numbers",
    ),
    (
        "strides of half the rows",
        "{address, 0, 8 * GemmWgmma::kRowBytes",
        "{address, 0, 4 * GemmWgmma::kRowBytes",
        "wrong numbers",
    ),
    (
        "operand past its stage",
        "gemm_wgmma_operand(stage.tile_b + k_step * 32)",
        "gemm_wgmma_operand(stage.tile_b + k_step * 4096)",
        "race, uninitialized, out_of_bounds, proxy_fence",
    ),
    ("accumulates on nothing", "k_block + k_step > 0);", "true);", "wrong numbers"),
    (
        "tile off its alignment",
        "const uint32_t tile_a = shared + idx * G::kStageBytes;",
        "const uint32_t tile_a = shared + idx * G::kStageBytes + 16;",
        "misaligned",
    ),
)

CLUSTER_SUM = _of(
    "cluster_sum",
    (
        "cluster not synchronised at first",
        "  ptx::barrier_cluster_arrive_release();\n  ptx::barrier_cluster_wait_acquire();\n",
        "  syncthreads();\n",
        "race, mbarrier",
    ),
    (
        "wait for the cluster without an arrival",
        "  ptx::barrier_cluster_arrive_release();\n",
        "",
        "divergence",
    ),
    ("mbarriers' init not fenced", "    ptx::fence_mbarrier_init();\n", "", "proxy_fence"),
    (
        "peer exits early",
        "  ptx::mbarrier_wait<ptx::Scope::kCluster>(gathered, 0);\n",
        "",
        "cluster_exit, race",
    ),
    (
        "arrival before the store",
        "  ptx::st_shared_cluster(ptx::mapa(my_sum, 0), sum);\n"
        "  ptx::mbarrier_arrive_cluster(ptx::mapa(gathered, 0));",
        "  ptx::mbarrier_arrive_cluster(ptx::mapa(gathered, 0));\n"
        "  ptx::st_shared_cluster(ptx::mapa(my_sum, 0), sum);",
        "race, cluster_exit",
    ),
    (
        "missing arrival",
        "  ptx::mbarrier_arrive_cluster(ptx::mapa(gathered, 0));\n",
        "",
        "deadlock",
    ),
    (
        "one arrival too few",
        "ptx::mbarrier_init(gathered, cluster_size);",
        "ptx::mbarrier_init(gathered, cluster_size - 1);",
        "race, mbarrier, invalid",
    ),
    (
        "sum sent to a block that is not there",
        "ptx::mapa(my_sum, 0), sum",
        "ptx::mapa(my_sum, cluster_size), sum",
        "invalid, out_of_bounds",
    ),
    (
        "missing barrier between the warps",
        "  syncthreads();\n  sum = 0.0f;",
        "  sum = 0.0f;",
        "race",
    ),
    ("slice read without waiting", "  ptx::mbarrier_wait(loaded, 0);\n", "", "race"),
    ("one value past the slice", "i < slice;", "i <= slice;", "uninitialized"),
    (
        "one warp too many",
        "i < S::kNumWarps; i++) sum",
        "i <= S::kNumWarps; i++) sum",
        "crash, uninitialized, race",
    ),
    (
        "bytes of half the slice expected",
        "ptx::mbarrier_arrive_expect_tx(loaded, bytes);",
        "ptx::mbarrier_arrive_expect_tx(loaded, bytes / 2);",
        "deadlock, uninitialized, unwaited",
    ),
    (
        "unaligned bulk copy",
        "params.x + block_idx() * params.slice,",
        "params.x + 1 + block_idx() * params.slice,",
        "misaligned",
    ),
    (
        "divergent shuffle",
        "sum += shuffle_xor(sum, mask);\n  if",
        "if (thread_idx() % 2 == 0) sum += shuffle_xor(sum, mask);\n  if",
        "deadlock, divergence",
    ),
)

ROW_SUMS = _of(
    "row_sums",
    (
        "32-bit offset",
        "block_idx() * params.x_stride;",
        "static_cast<int>(block_idx()) * static_cast<int>(params.x_stride);",
        "out_of_bounds, crash",
    ),
    ("no fence before the count", "    thread_fence();\n    const auto", "    const auto", "race"),
    ("no fence after the count", "num_blocks - 1;\n    thread_fence();", "num_blocks - 1;", "race"),
    (
        "an earlier block takes itself for the last",
        "num_blocks - 1;\n    thread_fence",
        "num_blocks - 2;\n    thread_fence",
        "race, uninitialized, unwritten",
    ),
    (
        "count that is not atomic",
        "atomic_add(params.arrived, 1u) == num_blocks - 1",
        "(*params.arrived)++ == num_blocks - 1",
        "race",
    ),
    (
        "missing barrier",
        "shared.warp_sums[warp_idx] = sum;\n  syncthreads();",
        "shared.warp_sums[warp_idx] = sum;",
        "race",
    ),
    (
        "flag read before it is there",
        "    thread_fence();\n  }\n  syncthreads();",
        "    thread_fence();\n  }",
        "race, uninitialized",
    ),
    ("every lane stores", "if (lane_idx == 0) shared.warp_sums", "shared.warp_sums", "race"),
    (
        "vector load off its alignment",
        "load_bytes<RowSumsChunk>(row + i)",
        "load_bytes<RowSumsChunk>(row + i + 1)",
        "misaligned",
    ),
    ("load past the row", "i < params.columns;", "i <= params.columns;", "out_of_bounds"),
    (
        "wild pointer",
        "const float* row = params.x +",
        "const float* row = reinterpret_cast<const float*>(uintptr_t{16}) +",
        "out_of_bounds",
    ),
    (
        "wild store",
        "*params.total = total;",
        "*reinterpret_cast<float*>(uintptr_t{16}) = total;",
        "crash",
    ),
    (
        "barrier that half the block passes by",
        "  syncthreads();\n  if (shared.is_last == 0) return;",
        "  if (thread_idx() < 32) syncthreads();\n  if (shared.is_last == 0) return;",
        "deadlock, race",
    ),
    (
        "lanes meet in different shuffles",
        "sum += shuffle_xor(sum, mask);",
        "sum += lane_idx < 16 ? shuffle_xor(sum, mask) : shuffle_down(sum, mask);",
        "divergence",
    ),
    (
        "shuffle from a lane outside the mask",
        "sum += shuffle_xor(sum, mask);",
        "sum += shuffle_xor(sum, mask, lane_idx < 16 ? 0xffffu : 0xffff0000u);",
        "divergence",
    ),
)

ROPE = _of(
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
        "min(max(params.axis[pair], 0), params.num_axes - 1)",
        "params.axis[pair]",
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

PATCH_EMBED = _of(
    "patch_embed",
    (
        "word behind the row",
        "if (4 * i < num_bytes) word",
        "if (4 * i <= num_bytes) word",
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

PATCHIFY = _of(
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

LINEAR_GELU = _of(
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

PATCH_EMBED_EPILOGUE = _of(
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

ADD_LAYER_NORM = _of(
    "add_layer_norm",
    (
        "missing barrier between the warps",
        "  syncthreads();\n#pragma unroll\n  for (int j = 0; j < kCount; j++) values[j] = scratch",
        "#pragma unroll\n  for (int j = 0; j < kCount; j++) values[j] = scratch",
        "race, uninitialized",
    ),
    ("one scratch for all sums", " + scratch_idx * 2 * kNormMaxWarps;", ";", "race"),
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

ADD_RMS_NORM = _of(
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

MERGE_NORM = _of(
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

FAULTS = [
    *GEMM_MMA,
    *GEMM_WGMMA,
    *CLUSTER_SUM,
    *ROW_SUMS,
    *ROPE,
    *PATCH_EMBED,
    *PATCHIFY,
    *ADD_LAYER_NORM,
    *ADD_RMS_NORM,
    *MERGE_NORM,
    *LINEAR_GELU,
    *PATCH_EMBED_EPILOGUE,
]
