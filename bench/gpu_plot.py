"""Plots of a run of the GPU suite: a picture an op, as ``keye-ops bench --plot`` draws them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from keye_ops.bench import plot, report_gpu
from keye_ops.bench.harness import Limits, Settings, Timing
from keye_ops.bench.results import Record

Found = dict[str, Any]


def records(result: Found) -> list[Record]:
    """Of every op that was timed; what was timed twice counts once."""
    benchmarks, facts = result["benchmarks"], report_gpu.environment(result)
    rates = benchmarks.get("limits") or {}
    limits = Limits(
        rates.get("copy_gigabytes_per_second", float("nan")),
        rates.get("gemm_gigaflops_per_second", {}),
    )
    names = [field.name for field in fields(Timing)]
    timings: dict[tuple[str, ...], Timing] = {}
    for one in benchmarks.get("timings", []):
        timing = Timing(**{name: one[name] for name in names})
        key = (timing.op, timing.shape, timing.dtype, timing.mode, timing.provider)
        timings.setdefault(key, timing)
    machine = {
        "gpu": result["gpu"],
        "torch": facts.get("software", {}).get("torch", "?"),
        "cpu": facts.get("machine", {}).get("cpu", "?"),
        "threads": facts.get("machine", {}).get("cores", "?"),
        "capability": None,
    }
    found = []
    for op in dict.fromkeys(timing.op for timing in timings.values()):
        own = [timing for timing in timings.values() if timing.op == op]
        found.append(Record(op, Settings(device="cuda"), limits, machine, own))
    return found


def save(result: Found, folder: Path) -> list[Path]:
    """Draw them all."""
    return [plot.save(record, folder) for record in records(result)]
