"""add_layer_norm: a residual sum and its LayerNorm in one pass; and layer_norm by itself."""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch.nn.functional as F
from keye_ops.bench import cuda_peers, harness, peers
from keye_ops.bench.harness import Case, Settings, Skip, Workload

import keye_ops
from keye_ops.cli import main

HIDDEN, EPS = 1152, 1e-6


def cases(settings: Settings) -> list[Case]:
    """Two reads and two writes; layer_norm one of each."""
    found = []
    for op, passes in (("add_layer_norm", 4), ("layer_norm", 2)):
        for dtype in (torch.bfloat16, torch.float32):
            for name in harness.UNMERGED:
                total = harness.patches(name)
                big = op == "add_layer_norm" and name == "1-megapixel image"
                case = Case(
                    op="add_layer_norm",
                    group=f"{op}, 1152",
                    shape=f"{op}, {name}",
                    size=total,
                    dtype=dtype,
                    num_bytes=passes * total * HIDDEN * harness.size_of(dtype),
                    flops=0,
                    build=partial(workload, op, total, dtype, settings),
                    quick=big and dtype == torch.bfloat16,
                    headline=big and dtype == torch.bfloat16,
                )
                found.append(case)
    return found


def workload(op: str, total: int, dtype: torch.dtype, settings: Settings) -> Workload:
    """x and residual of [N, 1152]."""
    device, added = settings.device, op == "add_layer_norm"
    x, residual = (harness.random(total, HIDDEN, dtype=dtype, device=device) for _ in range(2))
    weight, bias = (harness.random(HIDDEN, dtype=dtype, device=device) for _ in range(2))

    def eager(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = inputs[0] + inputs[1] if added else inputs[0]
        normed = F.layer_norm(total, (HIDDEN,), weight, bias, EPS)
        return (total, normed) if added else (normed,)

    inputs = (x, residual) if added else (x,)
    args = (*inputs, weight, bias)
    function = getattr(keye_ops, op, None)
    absent = Skip(f"keye_ops has no {op}")
    return Workload(
        ours={"keye_ops": absent if function is None else lambda: function(*args, eps=EPS)},
        peers={
            "eager": lambda: eager(*inputs),
            "torch.compile": peers.compiled(eager, settings, *inputs),
            **({} if added else {"Liger": _liger(args, settings)}),
        },
        yardsticks=harness.copies((4 if added else 2) * harness.bytes_of(x), device),
    )


def _liger(args: tuple[torch.Tensor, ...], settings: Settings) -> harness.Provider | Skip:
    """Its LayerNorm; it has none with an addition before it."""
    return cuda_peers.liger("layer_norm", settings, *args, EPS)


if __name__ == "__main__":
    sys.exit(main(["bench", "add_layer_norm", *sys.argv[1:]]))
