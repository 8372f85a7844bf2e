"""Stage malformed: values on the device that no host saw; kernels must report them and live on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # a process of its own, with KEYE_OPS_VALIDATE=1
    _ROOT = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(_ROOT / "bench"), str(_ROOT), str(_ROOT / "python_tests")]

import gpu_cases
import gpu_device
import torch
from gpu_repeats import bits
from gpu_runner import Context, Found, NotRun

import keye_ops

VALIDATED = "KEYE_OPS_VALIDATE=1 raises at the call"


def _fill(value: int) -> Callable[[torch.Tensor], None]:
    return lambda x: x.view(-1)[:1].fill_(value)


def _last(value: int) -> Callable[[torch.Tensor], None]:
    return lambda x: x.view(-1)[-1:].fill_(value)


def _garbage(x: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(6)
    values = torch.randint(-(2**31), 2**31 - 1, x.shape, generator=generator)
    x.copy_(values.to(x.dtype))


def _reversed(x: torch.Tensor) -> None:
    x.copy_(x.flip(0).clone())


@dataclass(frozen=True)
class Fault:
    """What is done to a tensor that a case reads on the device."""

    case: str
    name: str
    what: str
    spoil: Callable[[torch.Tensor], None]

    @property
    def label(self) -> str:
        """For tables."""
        return f"{self.case}, {self.name} {self.what}"


RAISES_ON_THE_HOST = ("varlen_attention",)  # whatever kernels are to run
_FAR = 2**24
FAULTS = (
    Fault("rope_2d", "positions", "negative", _fill(-5)),
    Fault("rope_2d", "positions", "too far", _last(_FAR)),
    Fault("rope_2d", "positions", "garbage", _garbage),
    Fault("rope_2d in place", "positions", "negative", _fill(-(2**31))),
    Fault("rope_3d with norm", "positions", "too far", _fill(2**62)),
    Fault("merge_norm", "grid", "zero", _fill(0)),
    Fault("merge_norm", "grid", "negative", _last(-2)),
    Fault("merge_norm", "grid", "odd", _last(3)),
    Fault("merge_norm", "grid", "garbage", _garbage),
    Fault("merge_norm", "image_offsets", "negative", _fill(-4)),
    Fault("merge_norm", "image_offsets", "falling", _reversed),
    Fault("merge_norm before", "image_offsets", "garbage", _garbage),
    Fault("patch_embed", "grid", "negative", _fill(-1)),
    Fault("patch_embed", "grid", "garbage", _garbage),
    Fault("patch_embed", "image_offsets", "falling", _reversed),
    Fault("patch_embed", "image_offsets", "past the end", _last(2**31 - 1)),
    Fault("patch_embed", "position_ids", "negative", _fill(-1)),
    Fault("patch_embed", "position_ids", "outside", _last(2**20)),
    Fault("patch_embed uint8", "position_ids", "garbage", _garbage),
    Fault("varlen_attention", "cu_seqlens", "negative", _fill(-7)),
    Fault("varlen_attention", "cu_seqlens", "past the end", _last(2**31 - 1)),
    Fault("varlen_attention", "cu_seqlens", "falling", _reversed),
    Fault("varlen_attention text", "cu_seqlens", "garbage", _garbage),
)


def items(context: Context) -> list[str]:
    """Faults, then the variable of the environment."""
    return [*(fault.label for fault in FAULTS), VALIDATED]


def run(item: str, context: Context) -> Found:
    """One of them."""
    if not hasattr(keye_ops, "check_errors"):
        raise NotRun("keye_ops has no check_errors")
    if item == VALIDATED:
        return validated(context)
    return reported(next(fault for fault in FAULTS if fault.label == item), context)


def reported(fault: Fault, context: Context) -> Found:
    """The kernels come back, ``check_errors`` raises once, and good values work as before."""
    gpu_device.need_kernel(gpu_cases.op_of(fault.case), context)
    device = gpu_device.type_of(context)
    call = gpu_cases.make(fault.case, "bf16", device, context.device == "cuda")
    problems = []
    # The reference of a backward pass would index by hostile values, and lose the whole device.
    backward = f"{call.op.rstrip('_')}_backward"
    own = context.device != "cuda" or gpu_device.has_kernel(backward, context)
    compute = call.results if own else call.outputs
    with gpu_device.kernels(context) as reports:
        good = [bits(x).clone() for x in compute()]
        problems += [f"good values: {error}" for error in raised(keye_ops.check_errors)]
        whole = call.contents[fault.name]
        kept = whole.clone()
        fault.spoil(whole)
        errors = raised(compute)
        # Where the host sees values, the call raises by itself.
        if context.device == "cpu" or (device == "cpu" and call.op in RAISES_ON_THE_HOST):
            errors, at_call = [], errors
        else:
            at_call = raised(keye_ops.check_errors)
        problems += [f"the call raised: {error}" for error in errors]
        problems += complaints(at_call, call.op)
        problems += [f"is reported twice: {x}" for x in raised(keye_ops.check_errors)]
        whole.copy_(kept)
        again = [bits(x) for x in compute()]
        same = all(torch.equal(a, b) for a, b in zip(good, again, strict=True))
        problems += [] if same else ["good values do not give what they gave before"]
        problems += [f"good values after: {x}" for x in raised(keye_ops.check_errors)]
    return {"cases": 1, "problems": problems + reports, "facts": {"error": at_call[:1]}}


def raised(function: Callable[[], object]) -> list[str]:
    """The message of the RuntimeError that a call raises, if it does."""
    try:
        function()
    except RuntimeError as error:
        return [str(error).splitlines()[0]]
    return []


def complaints(errors: list[str], op: str) -> list[str]:
    """What is wrong with an error that must come."""
    if not errors:
        return ["nothing was reported"]
    good = errors[0].startswith(f"{op.rstrip('_')}: ") and ", got " in errors[0]
    return [] if good else [f"not an error of {op}: {errors[0]}"]


def validated(context: Context) -> Found:
    """A process whose launches are all checked."""
    if context.device == "cpu":
        raise NotRun("the CPU's kernels need no such variable")
    ran, problems = 0, []
    for fault in FAULTS:
        if not gpu_device.has_kernel(gpu_cases.op_of(fault.case), context):
            continue
        if fault.what != "negative":
            continue
        command = [sys.executable, str(Path(__file__).resolve()), fault.label, context.device]
        try:
            result = subprocess.run(
                [*command, str(context.build)],
                capture_output=True,
                text=True,
                check=False,
                timeout=max(context.left() + 3, 5),
                env={**os.environ, "KEYE_OPS_VALIDATE": "1"},
            )
        except subprocess.TimeoutExpired:
            break
        ran += 1
        wrong = result.stdout.strip() or result.stderr.strip()
        if result.returncode != 0 or wrong:
            problems.append(f"{fault.label}: {wrong[-400:]}")
        if context.left() < 6:
            break
    if not ran:
        raise NotRun("no op has a kernel, or there was no time")
    return {"cases": ran, "problems": problems}


def main(argv: list[str]) -> int:
    """A fault under KEYE_OPS_VALIDATE=1: prints what is wrong with the error, if anything is."""
    label, device, build = argv
    context = Context("malformed", device, Path(build))
    fault = next(fault for fault in FAULTS if fault.label == label)
    call = gpu_cases.make(fault.case, "bf16", gpu_device.type_of(context), big=False)
    with gpu_device.kernels(context):
        call.outputs()
        fault.spoil(call.contents[fault.name])
        for problem in complaints(raised(call.outputs), call.op):
            print(problem)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
