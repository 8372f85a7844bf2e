"""Plots of a benchmark: throughput over shapes by size, a panel a group, dtype and mode."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

try:
    import matplotlib
except ImportError as error:
    raise ImportError('a plot needs matplotlib: pip install "keye-ops[cli]"') from error

from keye_ops.bench.harness import Limits, Settings, Timing
from keye_ops.bench.results import Record, rate

_OURS = ("#2ca02c", "#17becf", "#98df8a", "#006d2c")
_PEERS = ("#d62728", "#1f77b4", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2")
_MARKERS = "osD^v<>P"


def save(record: Record, folder: Path) -> Path:
    """Draw a record."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[tuple[str, str, str], list[Timing]] = {}
    for timing in record.timings:
        panels.setdefault((timing.group, timing.mode, timing.dtype), []).append(timing)
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    size = (8 * columns, 4.6 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis, (title, timings) in zip(axes.flat, panels.items(), strict=False):
        _draw(axis, ", ".join(title), timings, record)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    facts = record.facts
    machine = facts["gpu"] or f"{facts['cpu']}, {facts['threads']} threads, {facts['capability']}"
    figure.suptitle(f"{record.op} on {machine}, torch {facts['torch']}", fontsize=12)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record.stem}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"saved {path}")
    return path


def save_all(results: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """Draw saved results, by op."""
    names = [field.name for field in fields(Timing)]
    paths = []
    for op, result in results.items():
        rates = result["limits"]
        limits = Limits(
            rates["copy_gigabytes_per_second"] or float("nan"), rates["gemm_gigaflops_per_second"]
        )
        timings = [Timing(**{name: one[name] for name in names}) for one in result["timings"]]
        settings = Settings(device=result["device"])
        paths.append(save(Record(op, settings, limits, result, timings), folder))
    return paths


def _draw(axis: Any, title: str, timings: list[Timing], record: Record) -> None:
    """A line a provider, bars from the 20th to the 80th percentile, the limit dashed."""
    lines: dict[tuple[str, str], list[Timing]] = {}
    for timing in timings:
        lines.setdefault((timing.role, timing.provider), []).append(timing)
    colours = {"ours": iter(_OURS * 3), "peer": iter(_PEERS * 3), "yardstick": iter(["#888"] * 9)}
    unit = rate(timings[0])[1]
    shapes = {t.shape: t.size for t in sorted(timings, key=lambda timing: timing.size)}
    places = {shape: place for place, shape in enumerate(shapes)}
    for number, ((role, provider), line) in enumerate(lines.items()):
        line = sorted(line, key=lambda timing: places[timing.shape])
        values = [rate(timing)[0] for timing in line]
        spans = [
            [max(v - v * t.median / t.high, 0.0) for v, t in zip(values, line, strict=True)],
            [max(v * t.median / t.low - v, 0.0) for v, t in zip(values, line, strict=True)],
        ]
        axis.errorbar(
            [places[timing.shape] for timing in line],
            values,
            yerr=spans,
            label=provider,
            color=next(colours[role]),
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle=":" if role == "yardstick" else "-",
            linewidth=2 if role == "ours" else 1.2,
            markersize=5,
            capsize=2,
        )
    limit = record.limits.copy if unit == "GB/s" else record.limits.gemm[timings[0].dtype]
    name = "large copy" if unit == "GB/s" else "large matrix product"
    axis.axhline(limit, color="black", linestyle="--", linewidth=1, label=f"{name}, measured")
    axis.set(yscale="log", ylabel=unit, xlim=(-0.3, len(shapes) - 0.7))
    labels = zip(_short(list(shapes)), shapes.values(), strict=True)
    unit_of_size = timings[0].unit
    axis.set_xticks(range(len(shapes)), [f"{name}\n{n} {unit_of_size}" for name, n in labels])
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(alpha=0.3, which="both", linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _short(shapes: list[str]) -> list[str]:
    """Shapes without the words that all of them share."""
    parts = [shape.split(", ") for shape in shapes]
    shared = set.intersection(*map(set, parts)) if len(shapes) > 1 else set()
    return [", ".join(x for x in one if x not in shared) for one in parts]
