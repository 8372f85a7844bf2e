"""Faults in the kernels of the executor's self-tests."""

from __future__ import annotations

from planted_fault import faults_of

GEMM_MMA = faults_of(
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

GEMM_WGMMA = faults_of(
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

CLUSTER_SUM = faults_of(
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

ROW_SUMS = faults_of(
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
