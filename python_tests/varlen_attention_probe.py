"""A choice of problems for varlen_attention's CUDA kernels, for mutants: fails where one is wrong.

Of the libraries in KEYE_OPS_HOST_CUDA_DIR; every architecture's kernels, forward and backward.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import test_varlen_attention_cuda as tests
import torch
from host_cuda import ATTENTION_ARCHS, executor, host_cuda, take_reports

# case, head_dim, causal, scale, factor of q
PROBLEMS: list[tuple[Any, int, bool, float | None, float]] = [
    (([70, 0, 5], [33, 4, 150], 2, 3, (2, 1)), 72, False, None, 1.0),
    (([150, 20], [75, 40], 0, 0, (2, 1)), 64, True, None, 1.0),
    (([75], [200], 0, 0, (1, 1)), 128, True, None, 1.0),
    (([66], [129], 0, 0, (2, 2)), 80, False, -0.1, 1.0),
    (([40], [97], 0, 0, (1, 1)), 96, True, None, 30.0),
    (([300, 290], [130, 300], 0, 0, (2, 1)), 72, True, None, 1.0),
    (([3, 30], [0, 0], 0, 0, (1, 1)), 72, False, 0.0, 1.0),
    (([0, 0], [3, 30], 0, 0, (1, 1)), 72, True, None, 1.0),
    (([], [], 0, 0, (1, 1)), 72, False, None, 1.0),
]


def check(arch: int) -> None:
    """Every problem under two schedules, without findings, and the same bits."""
    order, completion = executor().Order, executor().Completion
    schedules = [(order.in_order, 1, completion.early), (order.random, 4, completion.late)]
    with host_cuda(attention_arch=arch):
        check_rows()
        for number, (case, head_dim, causal, scale, factor) in enumerate(PROBLEMS):
            tensors, cu = tests.make(case, tests.DTYPES[number % 2], head_dim, number)
            tensors[0] *= factor
            for schedule in schedules if number < 3 else schedules[number % 2 :][:1]:
                executor().set_default_schedule(executor().Schedule(number, *schedule))
                tests.compare("cpu", tensors, cu, scale, causal, tally=None)
        tensors, cu = tests.make(([20, 30, 25], [20, 30, 25], 2, 2, (1, 1)), torch.bfloat16, 72)
        want = tests.run("cpu", tensors, cu)
        for tensor in tensors:
            tensor[[25, 76]] = torch.nan
        for actual, right in zip(tests.run("cpu", tensors, cu), want, strict=True):
            rows = [*range(20), *range(50, 75)]
            pair = (x[:, rows] if x.dim() == 2 else x[rows] for x in (actual, right))
            assert torch.equal(*pair), "NaN of one segment reached another"
        assert not any(report.findings for report in take_reports())


def check_rows() -> None:
    """Rows off their multiples of 16 bytes are refused, with their address and strides."""
    ops = torch.ops.keye_ops
    cu = tests.offsets([4])
    good = torch.zeros(4, 2, 72, dtype=torch.bfloat16)
    bad = torch.zeros(1000, dtype=torch.bfloat16).as_strided(good.shape, (204, 100, 1))
    lse = torch.zeros(2, 4)
    plan = ops.varlen_attention_plan(cu, cu, 4, 4, False)
    rest = (cu, cu, None, None, None, False)
    calls = {
        name: lambda *qkv: ops.varlen_attention(*qkv, *rest, True, plan) for name in ("q", "k", "v")
    }
    calls["dout"] = lambda dout: ops.varlen_attention_backward(
        dout, good, good, good, good, lse, *rest, plan
    )
    calls["out"] = lambda out: ops.varlen_attention_backward(
        good, good, good, good, out, lse, *rest, plan
    )
    for name, call in calls.items():
        args = [bad if name == each else good for each in "qkv"] if name in "qkv" else [bad]
        said = f"rows of {name} must start at multiples of 16 bytes on CUDA, "
        said += r"got address and strides \d+, 408, 200"
        with pytest.raises(RuntimeError, match=said):
            call(*args)


def check_plan() -> None:
    """Tiles of good and of bad offsets, and their order."""
    for lengths in (([255, 256, 257, 0], [3, 0, 600, 5]), ([1] * 40, [2] * 40)):
        for causal in (False, True):
            tests.test_tiles_cover_every_row_once(lengths, causal)
    tests.test_the_longest_come_first()
    for bad in (([-7, 5, 9], 0, -7), ([3, 5, 9], 0, 3), ([0, 9, 5], 0, 5), ([0, 5, 10], 0, 10)):
        tests.test_offsets_that_lie(bad[0], [0, 5, 9], *bad[1:])
    tests.test_offsets_that_lie([0, 5, 9], [0, 5, 10], 1, 10)


if __name__ == "__main__":
    try:
        check_plan()
        for each in ATTENTION_ARCHS:
            check(each)
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {str(error)[:2000]}")
