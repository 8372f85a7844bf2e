"""The norms' CUDA kernels on random shapes, strides and grids, under several orders of threads."""

from __future__ import annotations

import random

import pytest
import torch
from host_cuda import executor, host_cuda, take_reports, unavailable

from keye_ops import PackedGrid
from keye_ops.add_layer_norm import add_layer_norm_backward_reference, add_layer_norm_reference
from keye_ops.add_rms_norm import add_rms_norm_backward_reference, add_rms_norm_reference
from keye_ops.merge_norm import merge_norm_backward_reference, merge_norm_reference

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
CONFIGURATIONS = 300
OPS = torch.ops.keye_ops
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def schedules():
    """In step and early, reversed and late, and two at random."""
    order, completion = executor().Order, executor().Completion
    return [
        {"order": order.in_order, "completion": completion.early, "preempt_one_in": 1},
        {"order": order.reversed, "completion": completion.late},
        {"order": order.random, "completion": completion.random, "preempt_one_in": 16},
        {"order": order.random, "seed": 5, "preempt_one_in": 4},
    ]


class Case:
    """Random tensors, whose rows lie apart."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.rng.choice(DTYPES)
        self.vector = 16 // self.dtype.itemsize

    def chunks(self, most):
        """How many of 16 bytes: few, or as many as some lanes, warps or teams hold."""
        edges = [n for n in (32, 33, 160, 161, 320, 640) if n <= most]
        small = self.rng.randint(1, 12)
        if self.rng.random() < 0.03 and most > 600:
            return self.rng.choice([1920, 1921, 2100])  # the most in registers, and too many
        return self.rng.choice([1, small, small, self.rng.randint(1, most), *edges[:2]])

    def rows(self, count, width):
        """Random ones, where a stride is any multiple of 16 bytes."""
        gap, offset = (self.rng.choice([0, 0, 1, 3]) * self.vector for _ in range(2))
        scale = self.rng.choice([1.0, 1.0, 30.0, 0.01])
        shift = self.rng.choice([0.0, 0.0, 2.0])
        wide = torch.randn(count, offset + width + gap, generator=self.generator) * scale + shift
        return wide.to(self.dtype)[:, offset : offset + width]

    def vector_of(self, width):
        return torch.randn(width, generator=self.generator).to(self.dtype)


def added(name, case):
    """Calls of add_layer_norm or add_rms_norm, and the references that tell their results."""
    layer = name == "add_layer_norm"
    forward = add_layer_norm_reference if layer else add_rms_norm_reference
    backward = add_layer_norm_backward_reference if layer else add_rms_norm_backward_reference
    width = case.chunks(700) * case.vector
    count = case.rng.choice([1, 2, 5, 9]) if width < 100 * case.vector else case.rng.randint(1, 3)
    x, residual, dsum, dnormed = (case.rows(count, width) for _ in range(4))
    residual, dsum = (t if case.rng.random() < 0.5 else None for t in (residual, dsum))
    parameters = [case.vector_of(width) for _ in range(2 if layer else 1)]
    eps = case.rng.choice([1e-6, 1e-2])
    yield getattr(OPS, name), forward, (x, residual, *parameters, eps)
    yield getattr(OPS, f"{name}_backward"), backward, (dsum, dnormed, x, parameters[0], eps)


def merged(name, case):
    """Calls of merge_norm, and the references that tell their results."""
    side, order = case.rng.choice([2, 2, 2, 1, 3]), case.rng.choice(["raster", "raster", "block"])
    images = [
        (case.rng.choice([1, 1, 2]), *(side * case.rng.choice([1, 1, 2, 3]) for _ in range(2)))
        for _ in range(case.rng.choice([1, 2, 3]))
    ]
    grid = PackedGrid.from_grid_thw(images, spatial_merge_size=side, order=order)
    first = case.rng.random() < 0.5
    hidden = case.chunks(170 if grid.total <= 16 else 12) * case.vector
    width = side**2 * hidden
    x, dout = case.rows(grid.total, hidden), case.rows(grid.total_merged, width)
    weight, bias = (case.vector_of(hidden if first else width) for _ in range(2))
    eps = case.rng.choice([1e-5, 1e-2])
    options = (grid.grid, grid.image_offsets, side, order == "block", eps)
    yield OPS.merge_norm, merge_norm_reference, (x, weight, bias, *options)
    yield OPS.merge_norm_backward, merge_norm_backward_reference, (dout, x, weight, *options)


def assert_near(results, plain, exact, dtype):
    """A few times as wrong as plain PyTorch at most, in so few elements."""
    for got, other, want in zip(results, plain, exact, strict=True):
        if not want.numel():
            assert got.shape == want.shape
            continue
        scale = want.abs().max().item()
        allowed = 4 * (other.double() - want).abs().max() + 4 * torch.finfo(dtype).eps * scale
        assert (got.double() - want).abs().max() <= allowed


CALLS = {"add_layer_norm": added, "add_rms_norm": added, "merge_norm": merged}


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("name", CALLS)
def test_random_configurations_and_orders_of_cuda_threads(name, part):
    """300 configurations under 4 schedules: no finding, right, and the same bits."""
    for seed in range(part, CONFIGURATIONS, 4):
        case = Case(seed)
        for op, reference, args in CALLS[name](name, case):
            results = []
            for schedule in schedules():
                with host_cuda(**schedule):
                    out = op(*args)
                    assert [len(report.findings) for report in take_reports()] == [0], seed
                results.append(out if isinstance(out, tuple) else (out,))
            for other in results[1:]:
                assert all(map(torch.equal, other, results[0])), seed
            wide = [
                x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                for x in args
            ]
            if reference in (add_layer_norm_reference, add_rms_norm_reference):
                total = wide[0] if wide[1] is None else (args[0] + args[1]).double()
                exact = (results[0][0].double(), reference(total, None, *wide[2:])[1])
                plain = reference(*args)
                if wide[1] is not None:
                    assert torch.equal(results[0][0], args[0] + args[1])
            else:
                exact, plain = reference(*wide), reference(*args)
            exact, plain = (x if isinstance(x, tuple) else (x,) for x in (exact, plain))
            assert_near(results[0], plain, exact, case.dtype)
