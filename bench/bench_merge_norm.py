"""merge_norm: LayerNorm and the 2 x 2 merge, in both orders; every value read and written once."""

from __future__ import annotations

import sys
from functools import partial

import torch
from keye_ops.bench import harness, peers
from keye_ops.bench.harness import Case, Settings, Workload

import keye_ops
from keye_ops.cli import main

HIDDEN = 1152


def cases(settings: Settings) -> list[Case]:
    """Before the merge (Preview) and after it (1.5), forward, and with gradients."""
    # In fp32 the form of 1.5 alone: the other moves the same bytes.
    forms = [
        (mode, dtype, before)
        for mode in ("forward", "full")
        for dtype in (torch.bfloat16, torch.float32)
        for before in (False, True)
        if dtype == torch.bfloat16 or (mode == "forward" and not before)
    ]
    found = []
    for mode, dtype, before in forms:
        for name in harness.MERGED:
            total, half = harness.patches(name), dtype == torch.bfloat16
            big = name == "1-megapixel image" and half and not before
            # Backward reads x and dout, and writes dx.
            passes = 2 if mode == "forward" else 5
            order = "norm then merge" if before else "merge then norm"
            case = Case(
                op="merge_norm",
                group=f"merge_norm, {order}",
                shape=f"{order}, {name}",
                size=total,
                dtype=dtype,
                num_bytes=passes * total * HIDDEN * harness.size_of(dtype),
                flops=0,
                build=partial(workload, name, before, dtype, mode, settings),
                mode=mode,
                quick=big,
                headline=big and mode == "forward",
            )
            found.append(case)
    return found


def workload(
    name: str, before: bool, dtype: torch.dtype, mode: str, settings: Settings
) -> Workload:
    """x of [N, 1152]."""
    device = settings.device
    grid = keye_ops.PackedGrid.from_grid_thw(harness.SHAPES[name], device=device)
    x = harness.random(grid.total, HIDDEN, dtype=dtype, device=device)
    norm = HIDDEN if before else 4 * HIDDEN
    weight, bias = (harness.random(norm, dtype=dtype, device=device) for _ in range(2))

    def ours(*args: torch.Tensor) -> torch.Tensor:
        return keye_ops.merge_norm(*args, grid)

    eager = harness.reference(ours)
    inputs = (x, weight, bias)
    copies = harness.copies(harness.bytes_of(x) * (2 if mode == "forward" else 5), device)
    compiled = peers.compiled(ours, settings, *inputs, mode=mode)
    return Workload(
        ours={"keye_ops": harness.in_mode(mode, ours, inputs)},
        peers={"eager": harness.in_mode(mode, eager, inputs), "torch.compile": compiled},
        yardsticks=copies,
    )


if __name__ == "__main__":
    sys.exit(main(["bench", "merge_norm", *sys.argv[1:]]))
