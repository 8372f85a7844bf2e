"""add_rms_norm: a residual sum and its RMSNorm in one pass; and rms_norm by itself."""

from __future__ import annotations

import importlib
import sys
from functools import partial

import torch
import torch.nn.functional as F
from keye_ops.bench import harness, peers
from keye_ops.bench.harness import Case, Provider, Settings, Skip, Workload

import keye_ops
from keye_ops.cli import main

HIDDEN, EPS = 4096, 1e-6
TEXT = (8192, 1024, 32768)  # the first is the headline


def cases(settings: Settings) -> list[Case]:
    """Two reads and two writes; rms_norm one of each."""
    found = []
    for op, passes in (("add_rms_norm", 4), ("rms_norm", 2)):
        for dtype in (torch.bfloat16, torch.float32):
            for total in TEXT:
                chosen = op == "add_rms_norm" and total == TEXT[0] and dtype == torch.bfloat16
                case = Case(
                    op="add_rms_norm",
                    group=f"{op}, {HIDDEN}",
                    shape=f"{op}, text {total // 1024}k",
                    size=total,
                    unit="tokens",
                    dtype=dtype,
                    num_bytes=passes * total * HIDDEN * harness.size_of(dtype),
                    flops=0,
                    build=partial(workload, op, total, dtype, settings),
                    quick=chosen,
                    headline=chosen,
                )
                found.append(case)
    return found


def workload(op: str, total: int, dtype: torch.dtype, settings: Settings) -> Workload:
    """x and residual of [N, 4096]."""
    device, added = settings.device, op == "add_rms_norm"
    x, residual = (harness.random(total, HIDDEN, dtype=dtype, device=device) for _ in range(2))
    weight = harness.random(HIDDEN, dtype=dtype, device=device)

    def of_steps(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As the published model does it: fp32 in between, and a rounding before the weight."""
        total = inputs[0] + inputs[1] if added else inputs[0]
        wide = total.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        normed = weight * (wide * scale).to(dtype)
        return (total, normed) if added else (normed,)

    def of_torch(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = inputs[0] + inputs[1] if added else inputs[0]
        normed = F.rms_norm(total, (HIDDEN,), weight, EPS)
        return (total, normed) if added else (normed,)

    inputs = (x, residual) if added else (x,)
    function = getattr(keye_ops, op)
    return Workload(
        ours={"keye_ops": lambda: function(*inputs, weight, eps=EPS)},
        peers={
            "eager": lambda: of_steps(*inputs),
            "F.rms_norm": lambda: of_torch(*inputs),
            "torch.compile": peers.compiled(of_steps, settings, *inputs),
            "Liger": _liger(inputs, weight, settings),
        },
        yardsticks=harness.copies((4 if added else 2) * harness.bytes_of(x), device),
    )


def _liger(
    inputs: tuple[torch.Tensor, ...], weight: torch.Tensor, settings: Settings
) -> Provider | Skip:
    """Its Triton kernels, with the rounding of Llama and Qwen3."""
    if not settings.device.startswith("cuda"):
        return Skip("needs a GPU")
    added = len(inputs) == 2
    try:
        module = importlib.import_module("liger_kernel.transformers")
        kind = module.LigerFusedAddRMSNorm if added else module.LigerRMSNorm
    except (ImportError, AttributeError) as error:
        return Skip(f"not installed: {error}")
    norm = kind(HIDDEN, eps=EPS, in_place=False).to(weight.device, weight.dtype)
    norm.load_state_dict({"weight": weight})
    # Its fused form gives the norm first.
    return lambda: norm(*inputs)[::-1] if added else norm(*inputs)


if __name__ == "__main__":
    sys.exit(main(["bench", "add_rms_norm", *sys.argv[1:]]))
