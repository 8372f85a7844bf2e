"""linear_gelu: the projector's first layer, 4608 x 4608 with exact GELU."""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch.nn.functional as F
from keye_ops.bench import cuda_peers, harness, peers
from keye_ops.bench.harness import Case, Settings, Skip, Workload

import keye_ops
from keye_ops.cli import main

MERGED = 4608
# 1000 frames through it are 48,000 rows: the same rate as 60 frames, at ten times the time.
SHAPES = [name for name in harness.MERGED if name != "1000-frame clip"]


def cases(settings: Settings) -> list[Case]:
    """Forward, and with gradients."""
    found = []
    for mode in ("forward", "full"):
        for dtype in (torch.bfloat16, torch.float32):
            for name in SHAPES:
                rows, half = harness.patches(name) // 4, dtype == torch.bfloat16
                values = rows * 2 * MERGED + MERGED * (MERGED + 1)
                passes = 1 if mode == "forward" else 3
                big = name == "1-megapixel image" and half
                case = Case(
                    op="linear_gelu",
                    group="linear_gelu, 4608 to 4608",
                    shape=name,
                    size=rows,
                    unit="merged tokens",
                    dtype=dtype,
                    num_bytes=passes * values * harness.size_of(dtype),
                    flops=harness.linear_flops(rows, MERGED, MERGED, mode),
                    build=partial(workload, rows, dtype, mode, settings),
                    mode=mode,
                    quick=(big and mode == "forward") or (name == "image 392²" and half),
                    headline=big and mode == "forward",
                )
                found.append(case)
    return found


def workload(rows: int, dtype: torch.dtype, mode: str, settings: Settings) -> Workload:
    """x of [rows, 4608]."""
    device = settings.device
    x = harness.random(rows, MERGED, dtype=dtype, device=device)
    weight = harness.random(MERGED, MERGED, dtype=dtype, device=device, scale=MERGED**-0.5)
    bias = harness.random(MERGED, dtype=dtype, device=device)
    eager = harness.reference(keye_ops.linear_gelu)
    inputs = (x, weight, bias)
    ours = harness.in_mode(mode, keye_ops.linear_gelu, inputs)
    return Workload(
        ours={"keye_ops": ours, **cuda_peers.both_products(settings, "keye_ops", ours)},
        peers={
            "eager": harness.in_mode(mode, eager, inputs),
            "torch.compile": peers.compiled(keye_ops.linear_gelu, settings, *inputs, mode=mode),
            "zentorch": _zentorch(inputs, mode, settings),
        },
        yardsticks={"F.linear alone": harness.in_mode(mode, F.linear, inputs)},
    )


def _zentorch(
    inputs: tuple[torch.Tensor, ...], mode: str, settings: Settings
) -> harness.Provider | Skip:
    """Its linear layer with the activation fused."""
    module = peers.zentorch(settings)
    if isinstance(module, Skip):
        return module
    if mode == "full":
        return Skip("has no gradients")
    op = torch.ops.zentorch.zentorch_linear_unary
    return lambda: op(*inputs, post_op="gelu_erf")


if __name__ == "__main__":
    sys.exit(main(["bench", "linear_gelu", *sys.argv[1:]]))
