"""Stages benchmarks and benchmarks of the rest: the cases of ``bench_<op>.py``, timed on the GPU.

First the headlines and what the targets are about, without what has to be compiled; then those
with torch.compile and flex_attention; then, as a stage of its own, all the others.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import gpu_device
import torch
from gpu_environment import nvidia_smi
from gpu_runner import Context, Found
from gpu_targets import WANTED_SHAPES

from keye_ops import dispatch
from keye_ops.bench_command import bench_module

harness, suite, report = (bench_module(name) for name in ("harness", "suite", "report"))

LIMITS = "limits"
COMPILED = ", compiled peers"
_PARTS = {
    "projector": ("merge_norm", "linear_gelu"),
    "vision_tower": ("patch_embed", "rope_", "varlen_attention", "add_layer_norm", "linear_gelu"),
}
_CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
_CLOCKS += ("clocks_event_reasons.active",)


def settings_of(context: Context, compiled: bool = False) -> Any:
    """How long, how often, on what."""
    device, quick = gpu_device.type_of(context), context.device != "cuda"
    return harness.Settings(
        device=device,
        rounds=3 if quick else 25,
        seconds=0.02 if quick else 0.2,
        layers=1 if quick else 27,
        seed=context.seed,
        compile=compiled,
    )


def label(case: Any) -> str:
    """Of a case."""
    return f"{case.op}: {case.shape}, {case.dtype_name}, {case.mode}"


@functools.cache
def cases(device: str, compiled: bool, settings: Any) -> dict[str, Any]:
    """All cases by label."""
    order = {op: number for number, op in enumerate(report.OPS)}
    ops = sorted(suite.ops(), key=lambda op: order.get(op, len(order)))
    found = [case for op in ops for case in suite.script(op).cases(settings)]
    return {label(case): case for case in found}


def all_cases(context: Context, compiled: bool = False) -> dict[str, Any]:
    """All cases by label, with the settings of a stage."""
    return cases(context.device, compiled, settings_of(context, compiled))


def is_first(case: Any) -> bool:
    """Whether a case is a headline, or what a target is about."""
    wanted = any(shape in case.shape for shape in WANTED_SHAPES.get(case.op, ()))
    return case.headline or (wanted and case.dtype == torch.bfloat16)


def items(context: Context) -> list[str]:
    """The machine's limits, and cases."""
    found = all_cases(context)
    first = [name for name, case in found.items() if is_first(case)]
    first.sort(key=lambda name: not found[name].headline)
    if context.stage == "benchmarks":
        compiled = [name for name in first if found[name].mode == "forward"]
        compiled.sort(key=lambda name: found[name].op == "vision_tower")  # takes minutes
        return [LIMITS, *first, *(name + COMPILED for name in compiled)]
    rest = [name for name in found if name not in first]
    half = [name for name in rest if found[name].dtype == torch.bfloat16]
    half.sort(key=lambda name: found[name].mode != "forward")
    return [*half, *(name for name in rest if name not in half)]


@functools.cache
def limits(settings: Any) -> Any:
    """The rates of a large copy, and of large matrix products."""
    return harness.Limits.measure([torch.bfloat16, torch.float32], settings)


def run(item: str, context: Context) -> Found:
    """Time a case."""
    settings = settings_of(context, item.endswith(COMPILED))
    measured = limits(settings_of(context))
    if item == LIMITS:
        rates = {
            "copy_gigabytes_per_second": measured.copy,
            "gemm_gigaflops_per_second": measured.gemm,
        }
        return {"cases": len(measured.gemm) + 1, "facts": {"limits": rates}}
    name = item.removesuffix(COMPILED)
    case = all_cases(context, settings.compile)[name]
    ran: dict[str, str] = {}
    build = functools.partial(prepared, case, item.endswith(COMPILED), context, ran)
    before = nvidia_smi(*_CLOCKS) if context.device == "cuda" else {}
    timings, skipped = harness.run_case(replace(case, build=build), settings, measured)
    after = nvidia_smi(*_CLOCKS) if context.device == "cuda" else {}
    gc.collect()
    if context.device == "cuda":
        torch.cuda.empty_cache()
    facts = {
        "timings": [asdict(timing) for timing in timings],
        "skipped": [asdict(one) for one in skipped],
        "implementation": ran,
        "clocks": [before, after],
    }
    ours = [one for one in skipped if one.provider.startswith("keye_ops")]
    problems = [
        f"{one.provider}: {one.reason}"
        for one in ours
        if one.reason.startswith("failed") and "KEYE_OPS_GEMM=fused" not in one.provider
    ]
    return {"cases": len(timings), "problems": problems, "facts": facts}


def prepared(case: Any, compiled: bool, context: Context, ran: dict[str, str]) -> Any:
    """The workload of a case; tells which implementation of ours runs."""
    workload = case.build()
    first = next(iter(workload.ours.values()))
    if not isinstance(first, harness.Skip):
        ran |= implementations(case.op, first, context)
    if compiled:
        peers = {k: p for k, p in workload.peers.items() if getattr(p, "compiles", False)}
        return harness.Workload(dict(list(workload.ours.items())[:1]), peers)
    return workload


def implementations(op: str, provider: Callable[[], object], context: Context) -> dict[str, str]:
    """``native``, or ``reference`` and why, of the ops that a call runs."""
    try:
        provider()
    except Exception as error:
        return {op: f"failed: {error}"[:200]}
    last = dispatch.last_dispatch()
    names = _PARTS.get(op) or ((last.op,) if last else ())
    return {name: gpu_device.implementation(name, context) for name in names}
