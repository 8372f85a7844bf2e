"""README's text on GPUs, from ``bench/results/<gpu>/<date>.json`` of ``gpu_suite.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Found = dict[str, Any]
NOTHING = "Not yet measured: there is no `bench/results/<gpu>/<date>.json`."
_COLUMNS = ("op", "shape", "keye_ops ms", "best peer", "its ms", "speed-up", "% of limit")
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# What is said of the stages that are no benchmarks, in the order of the suite.
_CHECKS = ("twin", "selftest", "parity", "repeats", "graphs", "fuzz", "malformed", "syncs")
_CHECKS += ("large", "tests", "sanitizer")


def load(folder: Path) -> list[Found]:
    """The newest results of every GPU.

    Raises:
        ValueError: a file that the suite has not written.
    """
    newest: dict[str, Found] = {}
    for path in sorted(folder.glob("*/*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if "gpu" not in result or "stages" not in result:
            raise ValueError(f"{path.name} must hold results of gpu_suite.py, got other keys")
        if result["gpu"]:
            newest[result["gpu"]] = result
    return [newest[gpu] for gpu in sorted(newest)]


def text(results: list[Found]) -> str:
    """What stands between the markers."""
    return "\n\n".join(map(_machine, results)) if results else NOTHING


def environment(result: Found) -> Found:
    """The facts of a run's first stages, by item."""
    stages = {stage["stage"]: stage for stage in result["stages"]}
    items = stages.get("environment", {}).get("items", [])
    return {item["item"]: item.get("facts", {}) for item in items}


def _machine(result: Found) -> str:
    facts = environment(result)
    smi = facts.get("gpu", {}).get("nvidia_smi", {})
    software, sources = facts.get("software", {}), facts.get("sources", {})
    heading = [result["gpu"]]
    heading += [f"driver {smi['driver_version']}"] if "driver_version" in smi else []
    heading += [f"torch {software['torch']}"] if "torch" in software else []
    heading += [f"keye_ops at {sources['commit'][:9]}"] if "commit" in sources else []
    heading += [] if result["finished"] else ["a run that was cut short"]
    parts = [f"{', '.join(heading)}:", _timings(result), _targets(result), _checks(result)]
    return "\n\n".join(part for part in parts if part)


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def headlines(result: Found) -> dict[str, list[Found]]:
    """Timings of the headline case of every op, ours first in each run of it."""
    found: dict[str, list[Found]] = {}
    for timing in result["benchmarks"].get("timings", []):
        if timing["headline"]:
            found.setdefault(timing["op"], []).append(timing)
    return found


def _timings(result: Found) -> str:
    rows = [row for op, timings in headlines(result).items() if (row := _row(op, timings, result))]
    if not rows:
        return ""
    limits = result["benchmarks"]["limits"]
    rates = []
    if limits.get("copy_gigabytes_per_second"):
        rates.append(f"{limits['copy_gigabytes_per_second']:.0f} GB/s copied")
    if gemm := limits.get("gemm_gigaflops_per_second", {}).get("bfloat16"):
        rates.append(f"{gemm / 1e3:.0f} TFLOP/s in bf16 matrix products")
    lines = [_line(_COLUMNS), _line(["---"] * len(_COLUMNS)), *map(_line, rows)]
    note = f"\n\nLimits measured in the same run: {', '.join(rates)}." if rates else ""
    skipped = result["benchmarks"].get("skipped", [])
    absent = sorted({s["provider"] for s in skipped if s["reason"].startswith("not installed")})
    note += f" Not installed there: {', '.join(absent)}." if absent else ""
    return "\n".join(lines) + note


def _row(op: str, timings: list[Found], result: Found) -> list[str]:
    """The fastest peer against what ours took in the same run."""
    runs: dict[str, list[Found]] = {}
    for timing in timings:
        runs.setdefault(timing["item"], []).append(timing)
    pairs = []
    for item, run in runs.items():
        ours = next((t for t in run if t["role"] == "ours"), None)
        peers = [t for t in run if t["role"] == "peer"]
        if ours:
            best = min(peers, key=lambda t: t["median"], default=None)
            pairs.append((item, ours, best))
    if not pairs:
        return []
    pairs.sort(key=lambda p: p[2]["median"] / p[1]["median"] if p[2] else float("inf"))
    item, ours, best = pairs[0]
    how = result["benchmarks"].get("implementations", {}).get(item, {})
    reference = sorted(name for name, one in how.items() if one != "native")
    name = f"`{op}`" + (f" (reference of {', '.join(reference)})" if reference else "")
    shape = f"{ours['shape']}, {_DTYPES.get(ours['dtype'], ours['dtype'])}"
    shape += ", in place" if "in place" in ours["provider"] else ""
    row = [name, shape, _number(ours["median"])]
    if best:
        ratio = f"{best['median'] / ours['median']:.2f}×"
        row += [best["provider"], _number(best["median"]), ratio]
    else:
        row += ["–"] * 3
    return [*row, f"{ours['percent_of_limit']:.0f} of {ours['limit']}"]


def _targets(result: Found) -> str:
    rows = [[f"`{t['op']}`", t["target"], t["measured"] or "–", t["status"]]
            for t in result.get("targets", [])]  # fmt: skip
    columns = ["op", "target", "measured", "status"]
    return "\n".join(map(_line, [columns, ["---"] * 4, *rows])) if rows else ""


def _checks(result: Found) -> str:
    """A sentence a stage."""
    stages = {stage["stage"]: stage for stage in result["stages"]}
    parts = []
    for name in _CHECKS:
        stage = stages.get(name)
        if stage is None or stage["status"] == "not run":
            parts.append(f"{name} not run")
            continue
        judged = stage["planned"] - stage["not_run"]
        part = f"{name} {stage['passed']} of {judged}"
        part += f" ({stage['cases']:,} cases)" if stage["cases"] else ""
        parts.append(part)
    return f"Checked in the same run, passed of what could be judged: {', '.join(parts)}."
