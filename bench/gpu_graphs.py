"""Stage graphs: ops captured in a CUDA graph and replayed on other values, offsets and grids."""

from __future__ import annotations

import gpu_cases
import gpu_device
import torch
from gpu_parity import SEPARATOR
from gpu_repeats import bits
from gpu_runner import Context, Found

REPLAYS = 3


def items(context: Context) -> list[str]:
    """Every case in bf16."""
    return [f"{name}{SEPARATOR}bf16" for name in gpu_cases.names()]


def run(item: str, context: Context) -> Found:
    """Capture a case with its gradients; replay on what it was captured on, and on others."""
    name, dtype = item.split(SEPARATOR)
    gpu_device.need_kernel(gpu_cases.op_of(name), context)
    device = gpu_device.type_of(context)
    call = gpu_cases.make(name, dtype, device, context.device == "cuda")
    call.results()  # makes the gradients of results, and what is made once
    outputs, replay = gpu_device.capture(call.results, device)
    problems = []
    for number in range(REPLAYS):
        if number:
            change(call, number)
        for x in outputs:
            x.fill_(7)  # what a replay does not write shows
        replay()
        gpu_device.synchronize(device)
        got = [bits(x).clone() for x in outputs]
        want = call.results()
        who = gpu_device.implementation(call.op, context)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            if not torch.equal(a, bits(b)):
                problems.append(f"result {i} of replay {number} is not that of a call")
    return {"cases": REPLAYS, "problems": problems, "facts": {"implementation": who}}


@torch.no_grad()
def change(call: gpu_cases.Call, number: int) -> None:
    """Other values in the same memory; integers are exchanged with the others'."""
    for name, x in call.leaves.items():
        x.copy_(gpu_cases.random(tuple(x.shape), x.dtype, x.device, 50 + number + len(name)))
    for name, x in call.contents.items():
        kept = x.clone()
        x.copy_(call.others[name])
        call.others[name] = kept
