"""Writes README's tables from ``bench/results``; ``--check`` only compares.

    python bench/report.py [--check] [--plot]

A row an op: its headline case, the form of keye_ops that its benchmark lists first, and the fastest
peer of the same run. What a GPU gave is in ``bench/results/<gpu>``; without such a file README says
that none was measured. Nothing in the tables is typed by hand. ``--plot`` draws a picture an op and
machine beside the results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from keye_ops.bench import report_gpu
except ImportError:  # a checkout that is not installed
    import report_gpu

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- bench:cpu begin -->", "<!-- bench:cpu end -->"
GPU_BEGIN, GPU_END = "<!-- bench:gpu begin -->", "<!-- bench:gpu end -->"
# The order of the model.
OPS = (
    "patchify",
    "patch_embed",
    "rope",
    "varlen_attention",
    "add_layer_norm",
    "add_rms_norm",
    "merge_norm",
    "linear_gelu",
    "projector",
    "vision_tower",
)
_COLUMNS = ("op", "shape", "keye_ops ms", "best peer", "its ms", "speed-up", "% of limit")


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Results by op.

    Raises:
        ValueError: a file that is not the results of the op that its name tells.
    """
    found = {}
    for path in sorted(folder.glob("cpu-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("op") != path.stem.removeprefix("cpu-"):
            got = result.get("op")
            raise ValueError(f"{path.name} must hold the results of that op, got {got!r}")
        found[result["op"]] = result
    order = {op: number for number, op in enumerate(OPS)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(OPS))))


def table(results: dict[str, dict[str, Any]]) -> str:
    """The text between the markers: a table a machine and commit."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results.values():
        groups.setdefault(_heading(result), []).append(result)
    return "\n\n".join(_group(heading, group) for heading, group in groups.items())


def _heading(result: dict[str, Any]) -> str:
    parts = [
        f"{result['cpu']}, {result['threads']} threads",
        f"instruction set {result['capability']}" if result["capability"] else "",
        f"torch {result['torch']}",
        f"keye_ops at {_short(result['commit'])}",
        *(f"{name}={value}" for name, value in result["environment"].items()),
        "quick" if result["quick"] else "",
    ]
    return ", ".join(part for part in parts if part)


def _short(commit: str) -> str:
    sha, dash, dirty = commit.partition("-")
    return f"{sha[:9]}{dash}{dirty}"


def _group(heading: str, group: list[dict[str, Any]]) -> str:
    lines = [f"{heading}:", "", _line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
    rows = [row for result in group for row in _rows(result)]
    notes = [*_limits(group), *_memory(group), *_linearity(group), *_absent(group)]
    text = "\n".join([*lines, *map(_line, rows)])
    return f"{text}\n\n{' '.join(notes)}" if notes else text


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rows(result: dict[str, Any]) -> list[list[str]]:
    """The headline case, if keye_ops was timed on it."""
    timings = [timing for timing in result["timings"] if timing["headline"]]
    ours = next((timing for timing in timings if timing["role"] == "ours"), None)
    if ours is None:
        return []
    shape = f"{ours['shape']}, {_DTYPES.get(ours['dtype'], ours['dtype'])}"
    if "in place" in ours["provider"]:
        shape += ", in place"
    row = [f"`{result['op']}`", shape, _number(ours["median"])]
    others = [timing for timing in timings if timing["role"] == "peer"]
    if others:
        best = min(others, key=lambda timing: timing["median"])
        speed_up = best["median"] / ours["median"]
        row += [best["provider"], _number(best["median"]), f"{speed_up:.2f}×"]
    else:
        row += ["–"] * 3
    return [[*row, f"{ours['percent_of_limit']:.0f} of {ours['limit']}"]]


_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def _number(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _limits(group: list[dict[str, Any]]) -> list[str]:
    """A sentence with the limits measured, as a span over the runs."""
    copies = [x for r in group if (x := r["limits"]["copy_gigabytes_per_second"]) is not None]
    gemms = [x for r in group if (x := r["limits"]["gemm_gigaflops_per_second"].get("bfloat16"))]
    known = [(copies, "GB/s copied"), (gemms, "GFLOP/s in bf16 matrix products")]
    parts = [f"{_span(values)} {unit}" for values, unit in known if values]
    return [f"Limits measured in the same runs: {', '.join(parts)}."] if parts else []


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def _tower(group: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timings = [t for r in group if r["op"] == "vision_tower" for t in r["timings"]]
    return [timing for timing in timings if timing["dtype"] == "bfloat16"]


def _memory(group: list[dict[str, Any]]) -> list[str]:
    """A sentence on what the tower needs beyond weights and input, ours and eager."""
    timings = [t for t in _tower(group) if t["headline"] and t["peak_bytes"]]
    peaks = {t["provider"]: t["peak_bytes"] / 1e6 for t in timings}
    if not peaks.keys() >= {"keye_ops", "eager"}:
        return []
    ours, eager = peaks["keye_ops"], peaks["eager"]
    return [
        f"The tower's call needs {ours:.0f} MB at its peak, eager's {eager:.0f} MB "
        f"({ours / eager:.2f}×)."
    ]


def _linearity(group: list[dict[str, Any]]) -> list[str]:
    """A sentence on the time per patch from the fewest to the most thumbnails."""
    timings = [t for t in _tower(group) if t["group"] == "thumbnails" and t["role"] == "ours"]
    if len(timings) < 2:
        return []
    timings.sort(key=lambda timing: timing["size"])
    times = [f"{t['median'] * 1e3 / t['size']:.1f}" for t in timings]
    counts = [t["shape"].split()[0] for t in timings]
    return [
        f"The tower's time per patch with {', '.join(counts)} thumbnails: {', '.join(times)} µs."
    ]


def _absent(group: list[dict[str, Any]]) -> list[str]:
    """A sentence on the peers that were nowhere installed."""
    names = {s["provider"] for r in group for s in r["skipped"] if s["reason"] == "not installed"}
    return [f"Not installed there: {', '.join(sorted(names))}."] if names else []


def replace(readme: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """README with what is between the markers replaced.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    good = readme.count(begin) == readme.count(end) == 1 and readme.index(begin) < readme.index(end)
    if not good:
        raise ValueError(f"README.md must hold {begin} and {end} once each")
    before, after = readme.split(begin)[0], readme.split(end)[1]
    return f"{before}{begin}\n{text}\n{end}{after}"


def draw(folder: Path) -> None:
    """A picture an op: of the CPU in the folder, of every GPU in its own."""
    sys.path.insert(0, str(ROOT))
    from keye_ops.bench_command import bench_module

    bench_module("plot").save_all(load(folder), folder)
    for result in report_gpu.load(folder):
        bench_module("gpu_plot").save(result, folder / "-".join(result["gpu"].lower().split()))


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check; returns 1 if README and results disagree."""
    parser = argparse.ArgumentParser(description="Write README's tables from bench/results.")
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--plot", action="store_true", help="draw pictures beside the results, too")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args(argv)
    try:
        old = options.readme.read_text(encoding="utf-8")
        new = replace(old, table(load(options.results)))
        on_gpus = report_gpu.text(report_gpu.load(options.results))
        new = replace(new, on_gpus, GPU_BEGIN, GPU_END)
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    if options.check:
        if new != old:
            print("README.md and bench/results disagree: python bench/report.py", file=sys.stderr)
        return int(new != old)
    options.readme.write_text(new, encoding="utf-8")
    if options.plot:
        draw(options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
