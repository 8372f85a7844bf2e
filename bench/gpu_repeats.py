"""Stage repeats: the same bits a thousand times, on a side stream, beside other work.

On the host executor: under schedules that differ in every order that a GPU leaves open.
"""

from __future__ import annotations

import gpu_cases
import gpu_device
import torch
from gpu_parity import SEPARATOR
from gpu_runner import Context, Found

REPEATS = 1000
_LOOKS = 50  # how often the host looks whether time is over
# Of the reference's kernels some add atomically: only ours are judged.
_SCHEDULES = (
    {"order": "in_order", "completion": "early", "preempt_one_in": 0},
    {"order": "reversed", "completion": "late", "preempt_one_in": 1},
    {"order": "random", "completion": "random", "preempt_one_in": 16},
)


def items(context: Context) -> list[str]:
    """Cases in bf16, then in fp32."""
    names = gpu_cases.names()
    if context.device == "host_cuda":
        names = [name for name in names if gpu_device.has_kernel(gpu_cases.op_of(name), context)]
    dtypes = ("bf16",) if context.device == "host_cuda" else ("bf16", "fp32")
    return [f"{name}{SEPARATOR}{dtype}" for dtype in dtypes for name in names]


def run(item: str, context: Context) -> Found:
    """A case, again and again."""
    name, dtype = item.split(SEPARATOR)
    gpu_device.need_kernel(gpu_cases.op_of(name), context)
    call = gpu_cases.make(name, dtype, gpu_device.type_of(context), context.device == "cuda")
    if context.device == "host_cuda":
        return under_schedules(call, context)
    return repeated(call, context)


def bits(x: torch.Tensor) -> torch.Tensor:
    """As integers: NaNs are equal to themselves."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(integers[x.element_size()])


def repeated(call: gpu_cases.Call, context: Context) -> Found:
    """Results and gradients of many calls, compared on the device."""
    device = gpu_device.type_of(context)
    first = [bits(x).clone() for x in call.results()]
    who = gpu_device.implementation(call.op, context)
    differing = [torch.zeros((), dtype=torch.int64, device=device) for _ in first]
    noise = gpu_device.Noise(device)
    gpu_device.synchronize(device)
    count = 0
    # A case may take twice its share, as others take less.
    end = context.left() - context.share(2)
    with gpu_device.side_stream(device):
        while count < REPEATS:
            noise.make()
            again = call.results()
            for total, one, two in zip(differing, first, again, strict=True):
                total += (one != bits(two)).any()
            count += 1
            if count % _LOOKS == 0:
                gpu_device.synchronize(device)
                if context.left() < end:
                    break
    gpu_device.synchronize(device)
    problems = [
        f"result {i} differs in {int(total)} of {count} repeats"
        for i, total in enumerate(differing)
        if int(total)
    ]
    return {
        "cases": count,
        "problems": problems,
        "facts": {"implementation": who, "repeats": count},
    }


def under_schedules(call: gpu_cases.Call, context: Context) -> Found:
    """Results and gradients under several schedules of the host executor."""
    executor = gpu_device.host_executor(context).executor()
    problems, first = [], None
    for number, one in enumerate(_SCHEDULES):
        schedule = dict(one, seed=context.seed + number)
        schedule["order"] = getattr(executor.Order, one["order"])
        schedule["completion"] = getattr(executor.Completion, one["completion"])
        with gpu_device.kernels(context, **schedule) as reports:
            results = [bits(x).clone() for x in call.results()]
        problems += reports
        first = first or results
        for i, (a, b) in enumerate(zip(first, results, strict=True)):
            if not torch.equal(a, b):
                problems.append(f"result {i} differs under {one['order']}")
    return {"cases": len(_SCHEDULES), "problems": problems}
