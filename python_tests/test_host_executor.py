"""The host executor on kernels without faults: right numbers, no findings, any schedule."""

from __future__ import annotations

import resource

import host_cuda
import numpy as np
import pytest
import rope_probe
import selftest_kernels as kernels
from fault_probe import schedules

pytestmark = pytest.mark.skipif(
    host_cuda.unavailable() is not None, reason=str(host_cuda.unavailable())
)

SMALL = {
    "gemm_mma": (65, 9, 40),
    "gemm_wgmma": (65, 8, 296),
    "cluster_sum": (2, 2, 36),
    "row_sums": (4, 68),
}
NUM_SEEDS = 100
NUM_ROPE_CASES, NUM_GEMM_CASES = 400, 40  # of each self-test kernel; 560 together, 4 schedules each


@pytest.fixture(scope="module")
def executor():
    module = host_cuda.executor()
    for library in ("selftest", "rope"):
        module.load_library(str(host_cuda.build() / f"host_cuda_{library}.so"))
    return module


def make(executor, kernel, *shape, seed=0):
    return getattr(kernels, kernel)(executor, *shape, seed=seed)


def assert_clean(launch, executor, schedule):
    report, right = launch.run(executor, schedule)
    assert not report.findings, report.text()
    assert right
    return report


# ---- kernels without a fault ----


@pytest.mark.parametrize("kernel", SMALL)
def test_no_findings_whatever_the_seed(executor, kernel):
    for seed in range(NUM_SEEDS):
        schedule = executor.Schedule(seed=seed, preempt_one_in=(0, 3, 16)[seed % 3])
        assert_clean(make(executor, kernel, *SMALL[kernel]), executor, schedule)


def random_shape(kernel, rng):
    if kernel == "row_sums":
        return int(rng.integers(1, 9)), 4 * int(rng.integers(1, 80))
    if kernel == "cluster_sum":
        return int(rng.integers(1, 4)), int(rng.choice([1, 2, 4, 8])), 4 * int(rng.integers(1, 60))
    m, n, k = (int(rng.integers(1, limit)) for limit in (100, 12, 20))
    return m, 8 * n if kernel == "gemm_wgmma" else n, 8 * k


@pytest.mark.parametrize("kernel", SMALL)
def test_random_shapes(executor, kernel):
    rng = np.random.default_rng(7)
    for case in range(NUM_GEMM_CASES):
        shape = random_shape(kernel, rng)
        results = []
        for schedule in schedules(executor):
            launch = make(executor, kernel, *shape, seed=case)
            assert_clean(launch, executor, schedule)
            results.append([x.copy() for x in launch.arguments["outputs"].values()])
        for other in results[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


def random_rope_case(rng):
    dtype = int(rng.choice([rope_probe.FLOAT, rope_probe.HALF, rope_probe.BFLOAT16]))
    vector = 4 if dtype == rope_probe.FLOAT else 8
    heads = (int(rng.integers(1, 20)), int(rng.integers(0, 10)))
    return rope_probe.Case(
        mode=int(rng.integers(3)),
        dtype=dtype,
        total=int(rng.integers(1, 7)),
        heads=heads,
        head_dim=int(rng.choice([vector, 64, 72, 80, 96, 128, vector * int(rng.integers(1, 33))])),
        num_axes=int(rng.integers(1, 5)),
        interleaved=bool(rng.integers(2)),
        inverse=bool(rng.integers(2)),
        int64=bool(rng.integers(2)),
        norm_eps=float(rng.choice([1e-6, 1e-1])),
        rows_per_item=int(rng.integers(1, sum(heads) + 1)),
        grid=int(rng.integers(1, 4)),
        largest_position=int(rng.choice([1, 100, 5000, rope_probe.MAX_POSITION])),
        hostile=tuple(each for each in rope_probe.HOSTILE if rng.integers(16) == 0),
    )


def test_random_rope_launches(executor):
    rng = np.random.default_rng(11)
    for seed in range(NUM_ROPE_CASES):
        case = random_rope_case(rng)
        if case.mode == rope_probe.NORM_BACKWARD:
            # A warp owns whole tokens there.
            case = rope_probe.Case(**{**vars(case), "rows_per_item": sum(case.heads)})
        if case.hostile and case.head_dim < 8:
            continue
        results = []
        for schedule in schedules(executor):
            rope = rope_probe.Rope(executor, case, seed)
            report, right = rope.launch().run(executor, schedule)
            assert not report.findings, f"{case}\n{report.text()}"
            assert right, case
            results.append([*rope.out, *rope.dweight])
        for other in results[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True)), case


# ---- what it counts, and how far it reaches ----


def test_the_gemm_has_no_bank_conflicts(executor):
    counters = executor.Schedule(counters=True)
    report = assert_clean(make(executor, "gemm_mma", 128, 64, 64), executor, counters)
    assert report.counters["shared_requests"] > 0
    assert report.counters["shared_wavefronts"] == report.counters["shared_ideal"]
    report = assert_clean(make(executor, "gemm_wgmma", 64, 64, 64), executor, counters)
    assert report.counters["shared_wavefronts"] == report.counters["shared_ideal"] > 0


def test_rows_are_read_in_whole_sectors(executor):
    schedule = executor.Schedule(counters=True)
    report = assert_clean(make(executor, "row_sums", 3, 256), executor, schedule)
    assert report.counters["global_sectors"] == report.counters["global_ideal"] > 0


def test_bytes_of_global_memory_are_counted(executor):
    rows, columns = 5, 132
    traffic = {}
    report = assert_clean(make(executor, "row_sums", rows, columns), executor, executor.Schedule())
    traffic["x"] = (rows * columns * 4, 0)
    traffic["sums"] = (rows * 4, rows * 4)  # the last block reads them all
    traffic["total"] = (0, 4)
    traffic["arrived"] = (rows * 4, rows * 4 + 4)  # an addition a block, and an exchange
    assert report.traffic == traffic
    assert report.counters["global_bytes_loaded"] == (rows * columns + rows + rows) * 4
    assert report.counters["global_bytes_stored"] == (rows + 1 + rows + 1) * 4


def test_bytes_of_asynchronous_copies_are_counted(executor):
    m, n, k = 70, 72, 104  # two blocks each way, and what is left of a tile is not asked for
    operands = {"a": (2 * m * k * 2, 0), "b": (2 * n * k * 2, 0)}
    for kernel, size in (("gemm_mma", 4), ("gemm_wgmma", 2)):
        report = assert_clean(make(executor, kernel, m, n, k), executor, executor.Schedule())
        assert report.traffic == operands | {"c": (0, m * n * size)}
        assert report.counters["global_bytes_loaded"] == 4 * (m + n) * k
        assert report.counters["global_bytes_stored"] == m * n * size


@pytest.mark.parametrize("kernel", SMALL)
def test_bytes_do_not_depend_on_the_schedule(executor, kernel):
    traffic = []
    for schedule in schedules(executor):
        launch = make(executor, kernel, *SMALL[kernel])
        traffic.append(assert_clean(launch, executor, schedule).traffic)
    assert traffic[0]
    assert traffic == traffic[:1] * len(traffic)


def test_sectors_are_those_of_a_warps_requests(executor):
    rows, columns = 5, 132
    schedule = executor.Schedule(counters=True)
    report = assert_clean(make(executor, "row_sums", rows, columns), executor, schedule)
    # The first warp of a row asks for 16 sectors, the second for the half one behind them; every
    # other row starts in the middle of a sector, so that the first asks for 17.
    assert report.sectors["x"] == (rows * (16 + 1) + rows // 2, 0)
    assert report.sectors["total"] == (0, 1)
    plain = assert_clean(make(executor, "row_sums", rows, columns), executor, executor.Schedule())
    assert plain.sectors == {}
    assert plain.traffic == report.traffic


def test_tensors_past_two_billion_elements_take_little_memory(executor):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stride = 2**31 + 8  # elements: three rows are 16 GiB apart
    assert_clean(make(executor, "row_sums", 3, 64, stride), executor, executor.Schedule())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 64 << 10


def test_memory_goes_back(executor):
    for _ in range(300):  # more tensors than there are places for at a time
        assert_clean(make(executor, "row_sums", 2, 4), executor, executor.Schedule())


# ---- errors of its users ----


def test_an_unknown_kernel(executor):
    with pytest.raises(RuntimeError, match=r"kernel must be one of .*gemm_mma.*, got nothing"):
        executor.launch("nothing", grid=[1], block=[32])


def test_a_missing_argument(executor):
    with pytest.raises(RuntimeError, match="the kernel needs the array 'a', got none"):
        executor.launch("gemm_mma", grid=[1], block=[128])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": [1025]}, "a block must have 1 to 1024 threads, got 1025"),
        ({"grid": [0]}, "a grid must have blocks, got 0"),
        ({"cluster": [17]}, "a cluster must have 1 to 16 blocks, got 17"),
        ({"grid": [3], "cluster": [2]}, "a grid must be a multiple of the cluster, got 3"),
        ({"shared_bytes": 228 << 10}, "shared memory must be at most 227 KiB, got 233472"),
        ({"grid": [1, 65536]}, "a grid must have less than 2\\*\\*16 rows, got 65536"),
        ({"grid": [1, 1, 1, 1]}, "a grid has at most 3 dimensions"),
    ],
)
def test_a_launch_that_no_gpu_would_take(executor, change, message):
    launch = make(executor, "row_sums", 2, 4)
    launch.arguments |= change
    with pytest.raises(RuntimeError, match=message):
        launch.run(executor, executor.Schedule())


def test_an_output_of_another_size_is_noticed(executor):
    launch = make(executor, "row_sums", 4, 8)
    launch.arguments["outputs"]["sums"] = np.zeros(3, np.float32)
    report, _ = launch.run(executor, executor.Schedule())
    assert "out_of_bounds" in report.kinds
    launch = make(executor, "row_sums", 4, 8)
    launch.arguments["outputs"]["sums"] = np.zeros(5, np.float32)
    report, _ = launch.run(executor, executor.Schedule())
    assert report.kinds == ["unwritten"]
    assert "4 of 20 bytes of 'sums' were not written" in report.text()


def test_too_little_shared_memory_is_noticed(executor):
    launch = make(executor, "gemm_mma", 64, 64, 128)
    launch.arguments["shared_bytes"] -= 16
    report, _ = launch.run(executor, executor.Schedule())
    assert set(report.kinds) == {"out_of_bounds"}


def test_gaps_of_a_strided_tensor_are_out_of_bounds(executor):
    wide = np.random.default_rng(0).standard_normal((4, 12)).astype(np.float32)
    launch = make(executor, "row_sums", 4, 8)
    launch.arguments["inputs"] = {"x": wide[:, :8]}
    del launch.arguments["addresses"]
    launch.arguments["numbers"] |= {"x_stride": 12}
    report, _ = launch.run(executor, executor.Schedule())
    assert not report.findings, report.text()
    launch.arguments["numbers"] |= {"columns": 12}
    report, _ = launch.run(executor, executor.Schedule())
    assert set(report.kinds) == {"out_of_bounds"}
