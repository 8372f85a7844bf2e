"""Stage syncs: neither an op nor the vision tower makes the host wait; the tower fits a graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import gpu_cases
import gpu_device
import torch
import torch.nn.functional as F
from gpu_parity import SEPARATOR
from gpu_repeats import bits
from gpu_runner import Context, Found, NotRun

import keye_ops

LAYERS = 2
_THUMBNAILS = [(1, 16, 16)] * 8
TOWER = ("tower", "tower with gradients", "tower in a graph")
INSTEAD = ", SDPA for attention"


def items(context: Context) -> list[str]:
    """Ops, and the tower: as it is, and with torch's attention in place of ours."""
    ops = [f"{name}{SEPARATOR}bf16" for name in gpu_cases.names()]
    return [*(one for name in TOWER for one in (name, name + INSTEAD)), *ops]


def run(item: str, context: Context) -> Found:
    """One of them."""
    device = gpu_device.type_of(context)
    if not item.startswith("tower"):
        name, dtype = item.split(SEPARATOR)
        gpu_device.need_kernel(gpu_cases.op_of(name), context)
        call = gpu_cases.make(name, dtype, device, context.device == "cuda")
        return {"cases": 2, "problems": waits(call.results, device)}
    instead = item.endswith(INSTEAD)
    if not instead:
        gpu_device.need_kernel("varlen_attention", context)
    with torch_attention() if instead else contextlib.nullcontext():
        return tower(item.removesuffix(INSTEAD), device)


def waits(function: Any, device: str) -> list[str]:
    """What a call after the first one waits for."""
    function()
    try:
        with gpu_device.no_syncs(device):
            function()
    except RuntimeError as error:
        return [str(error).splitlines()[0]]
    return []


def tower(name: str, device: str) -> Found:
    """A few layers of Keye-VL's tower on thumbnails."""
    from keye_ops.model import VisionConfig, VisionTower, init_random

    wide = device == "cuda"
    config = VisionConfig(
        hidden_size=1152 if wide else 72,
        intermediate_size=4304 if wide else 96,
        num_hidden_layers=LAYERS,
        num_heads=16 if wide else 1,
        image_size=384,
        segment="frame",
    )
    model = init_random(VisionTower(config), 0).to(device, torch.bfloat16)
    grid = model.pack(_THUMBNAILS if wide else _THUMBNAILS[:2]).to(device)
    pixels = gpu_cases.random((grid.total, 3, 14, 14), torch.bfloat16, device)
    dout = gpu_cases.random((grid.total, config.hidden_size), torch.bfloat16, device, 1)
    parameters = list(model.parameters())

    def forward() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (model(pixels, grid),)

    def full() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(model(pixels, grid), parameters, dout)

    if name == "tower with gradients":
        return {"cases": 2, "problems": waits(full, device)}
    if name == "tower":
        pack = [] if not wide else waits(lambda: model.pack(_THUMBNAILS).to(device), device)
        problems = waits(forward, device) + [f"packing a grid: {x}" for x in pack]
        return {"cases": 2, "problems": problems}
    outputs, replay = gpu_device.capture(forward, device)
    pixels.copy_(gpu_cases.random(tuple(pixels.shape), pixels.dtype, device, 9))
    replay()
    gpu_device.synchronize(device)
    got = bits(outputs[0]).clone()
    same = torch.equal(got, bits(forward()[0]))
    return {"cases": 1, "problems": [] if same else ["a replay does not give what a call gives"]}


@contextlib.contextmanager
def torch_attention() -> Iterator[None]:
    """torch's SDPA over segments of one length in place of varlen_attention."""

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: Any, **options: Any
    ) -> torch.Tensor:
        if q.shape[0] % options["max_seqlen_q"]:
            raise NotRun("segments must have one length")
        parts = (x.unflatten(0, (-1, options["max_seqlen_q"])).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(0, 1)

    own, keye_ops.varlen_attention = keye_ops.varlen_attention, attend
    try:
        yield
    finally:
        keye_ops.varlen_attention = own
