"""Random problems for the norms' CUDA kernels on the host executor, under several schedules."""

from __future__ import annotations

import random

import pytest
import torch
from host_cuda import executor, host_cuda, take_reports, unavailable

import keye_ops
from keye_ops import PackedGrid

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NUM_CONFIGURATIONS = 300
SCHEDULES = [("in_order", 1, "early"), ("reversed", 0, "late"), ("random", 4, "random"),
             ("random", 16, "late")]  # fmt: skip
OPS = torch.ops.keye_ops


class Problem:
    """Arguments of a forward and of a backward, chosen at random."""

    def __init__(self, op, seed):
        self.op, self.choices = op, random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.choices.choice(DTYPES)
        vector = 4 if self.dtype == torch.float32 else 8
        # Mostly within a warp, at times over several, at times longer than registers.
        most = self.choices.choice([1, 5, 40, 40, 160, 700, 2100 if seed % 20 == 0 else 200])
        self.hidden = vector * self.choices.randint(1, most)
        self.eps = self.choices.choice([1e-6, 1e-5, 1e-2])
        self.mean = self.choices.choice([0.0, 0.0, 0.5, -30.0])

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def rows(self, count, width):
        """Rows that may lie apart, or all be one."""
        x = (self.mean + self.randn(count, width)).to(self.dtype)
        layout = self.choices.choice(["contiguous", "apart", "one"])
        if layout == "one":
            return x[:1].expand(count, -1)
        wide = torch.cat([x, x], 1) if layout == "apart" else x
        return wide[:, :width]

    def run(self):
        """Outputs and gradients."""
        run = {
            "merge_norm": self._merge_norm,
            "add_layer_norm": self._add,
            "add_rms_norm": self._add,
        }
        self.generator.manual_seed(self.generator.initial_seed())
        state = self.choices.getstate()
        try:
            return run[self.op]()
        finally:
            self.choices.setstate(state)

    def _add(self):
        count, added = self.choices.randint(1, 7), self.choices.random() < 0.6
        parameters = [self.rows(1, self.hidden)[0].contiguous() for _ in range(2)]
        x, residual, dsum, dnormed = (self.rows(count, self.hidden) for _ in range(4))
        if self.op == "add_rms_norm":
            parameters.pop()
        out = getattr(OPS, self.op)(x, residual if added else None, *parameters, self.eps)
        backward = getattr(OPS, f"{self.op}_backward")
        return [
            *out,
            *backward(dsum if added else None, dnormed, x.contiguous(), parameters[0], self.eps),
        ]

    def _merge_norm(self):
        side = self.choices.choice([1, 2, 2, 2, 3])
        images = [
            (self.choices.randint(1, 2), side * self.choices.randint(1, 2),
             side * self.choices.randint(1, 3))
            for _ in range(self.choices.choice([1, 2, 3, 40 if self.hidden < 20 else 4]))
        ]  # fmt: skip
        order = self.choices.choice(["raster", "raster", "block"])
        grid = PackedGrid.from_grid_thw(images, spatial_merge_size=side, order=order)
        hidden = self.hidden if grid.total * self.hidden < 6000 else 24
        width = hidden * self.choices.choice([1, side**2])
        parameters = [self.rows(1, width)[0].contiguous() for _ in range(2)]
        x = self.rows(grid.total, hidden)
        dout = self.rows(grid.total // side**2, side**2 * hidden)
        options = (grid.grid, grid.image_offsets, side, order == "block", self.eps)
        out = OPS.merge_norm(x, *parameters, *options)
        return [out, *OPS.merge_norm_backward(dout, x, parameters[0], *options)]


@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm", "merge_norm"])
def test_random_configurations_and_orders_of_cuda_threads(op):
    """300 configurations under 4 schedules: no finding, the same bits, the CPU kernels' numbers."""
    order, completion = executor().Order, executor().Completion
    launches = 0
    for seed in range(NUM_CONFIGURATIONS):
        problem = Problem(op, seed)
        want = problem.run()
        results = []
        for kind, preempt_one_in, when in SCHEDULES:
            schedule = {"order": getattr(order, kind), "completion": getattr(completion, when)}
            with host_cuda(seed=seed, preempt_one_in=preempt_one_in, **schedule):
                results.append(problem.run())
                reports = take_reports()
                launches += len(reports)
                assert not any(report.findings for report in reports), seed
                keye_ops.check_errors()
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), seed
        eps = torch.finfo(problem.dtype).eps
        for got, one in zip(results[0], want, strict=True):
            scale = one.abs().amax().item() if one.numel() else 0.0
            atol = 4e-5 * (1 + abs(problem.mean)) * max(scale, 1.0)
            torch.testing.assert_close(
                got, one, rtol=2 * eps, atol=atol, msg=lambda m, seed=seed: f"{seed} {m}"
            )
    assert launches == 2 * len(SCHEDULES) * NUM_CONFIGURATIONS
