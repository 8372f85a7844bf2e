"""What a benchmark leaves behind: the facts of its run, a table, JSON, and CSV as Liger's."""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from keye_ops.bench import harness, peers
from keye_ops.bench.harness import Limits, Settings, Skipped, Timing

import keye_ops
from keye_ops.table import print_table

CSV_COLUMNS = (
    "kernel_name",
    "kernel_provider",
    "kernel_operation_mode",
    "metric_name",
    "metric_unit",
    "x_name",
    "x_label",
    "x_value",
    "y_value_50",
    "y_value_20",
    "y_value_80",
    "extra_benchmark_config_str",
    "gpu_name",
    "timestamp",
    "liger_version",
    "torch",
    "commit",
    "cpu",
)
_ROOT = Path(__file__).resolve().parent.parent


# ---- facts ----


def facts(settings: Settings, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything needed to repeat a run and to judge it."""
    return {
        "keye_ops": keye_ops.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "peers": peers.versions(),
        "device": settings.device,
        "gpu": gpu_name(settings.device),
        "cpu": cpu_name(),
        "capability": capability(),
        "threads": torch.get_num_threads(),
        "environment": harness.environment(),
        "command": command(sys.argv, getattr(arguments, "output", None)),
        "seed": settings.seed,
        "quick": settings.quick,
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def command(argv: list[str], output: Path | None = None) -> list[str]:
    """The command line without folders of this machine."""
    return [Path(word).name if word.startswith(os.sep) else word for word in argv]


def commit() -> str:
    """The checkout's commit, with ``-dirty`` if its code differs; "unknown" outside of one."""
    # Installed packages may lie inside of somebody else's repository.
    if not (_ROOT / "setup.py").is_file() or not (_ROOT / "keye_ops" / "_version.py").is_file():
        return "unknown"
    head = _git("rev-parse", "HEAD")
    if not head:
        return "unknown"
    # Results that this run has written, and texts, make no difference to what was timed.
    changed = _git("status", "--porcelain", "--", "csrc", "keye_ops", "bench/*.py", "setup.py")
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def cpu_name() -> str:
    """The CPU's name and core count."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def gpu_name(device: str) -> str | None:
    """The GPU's name, or None for the CPU."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else None


def capability() -> str | None:
    """The instruction set that the CPU kernels use, or None without the native library."""
    library = sys.modules.get("keye_ops._C")
    return None if library is None else library.cpu_capability


# ---- records ----


@dataclass
class Record:
    """The results of one op."""

    op: str
    settings: Settings
    limits: Limits
    facts: dict[str, Any]
    timings: list[Timing] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def add(self, timings: list[Timing], skipped: list[Skipped]) -> None:
        """Add a case."""
        self.timings += timings
        self.skipped += skipped

    @property
    def stem(self) -> str:
        """Name of the files without suffix."""
        return f"{self.settings.device.split(':')[0]}-{self.op}"

    def print(self) -> None:
        """Print the table, and a line for every reason of a provider that was skipped."""
        columns = ["shape", "dtype", "mode", "provider", "ms", "20 %", "80 %", "rate"]
        columns += ["% of limit", "peak MB", "µs / item"]
        print_table(self.op, columns, [_row(timing) for timing in self.timings])
        for line in skip_notes(self.skipped):
            print(f"  {line}")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.facts,
            "op": self.op,
            "limits": {
                "copy_gigabytes_per_second": self.limits.copy,
                "gemm_gigaflops_per_second": self.limits.gemm,
            },
            "timings": [asdict(timing) for timing in self.timings],
            "skipped": [asdict(skipped) for skipped in self.skipped],
        }

    def save_json(self, folder: Path) -> Path:
        """Write everything."""
        path = _path(folder, f"{self.stem}.json")
        text = json.dumps(self.as_dict(), indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
        print(f"saved {path}")
        return path

    def save_csv(self, folder: Path) -> Path:
        """Write the columns that Liger-Kernel's benchmarks have, and torch, commit and cpu."""
        path = _path(folder, f"{self.stem}.csv")
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS)
            writer.writeheader()
            for timing in self.timings:
                writer.writerows(_csv_rows(timing, self.facts))
        print(f"saved {path}")
        return path


def _path(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def skip_notes(skipped: list[Skipped]) -> list[str]:
    """A line for every provider and reason, with the number of cases."""
    counts: dict[tuple[str, str], list[str]] = {}
    for one in skipped:
        counts.setdefault((one.provider, one.reason), []).append(one.shape)
    where = {
        key: shapes[0] if len(shapes) == 1 else f"{len(shapes)} cases"
        for key, shapes in counts.items()
    }
    return [f"skipped {name} on {where[name, reason]}: {reason}" for name, reason in counts]


def rate(timing: Timing) -> tuple[float, str]:
    """The figure that an op is judged by, and its unit."""
    if timing.flops:
        return timing.gigaflops_per_second, "GFLOP/s"
    return timing.gigabytes_per_second, "GB/s"


def _row(timing: Timing) -> list[str]:
    value, unit = rate(timing)
    peak = "-" if timing.peak_bytes is None else f"{timing.peak_bytes / 1e6:.0f}"
    yardstick = timing.role == "yardstick"
    return [
        timing.shape,
        timing.dtype,
        timing.mode,
        timing.provider + (" *" if yardstick else ""),
        *(f"{x:.3f}" for x in (timing.median, timing.low, timing.high)),
        f"{value:.1f} {unit}",
        f"{timing.percent_of_limit:.0f}",
        peak,
        f"{timing.median * 1e3 / timing.size:.3g}",
    ]


def _csv_rows(timing: Timing, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Speed, throughput and, where known, memory."""
    common = {
        "kernel_name": timing.op,
        "kernel_provider": timing.provider,
        "kernel_operation_mode": timing.mode,
        "x_name": "N",
        "x_label": timing.unit,
        "x_value": timing.size,
        "extra_benchmark_config_str": json.dumps(
            {"shape": timing.shape, "dtype": timing.dtype, "rounds": timing.rounds},
            ensure_ascii=False,
        ),
        "gpu_name": facts["gpu"] or "",
        "timestamp": facts["timestamp"],
        "liger_version": "",
        **{key: facts[key] for key in ("torch", "commit", "cpu")},
    }
    value, unit = rate(timing)
    metrics = [
        ("speed", "ms", (timing.median, timing.low, timing.high)),
        # The slow end of the times is the low end of the rates.
        ("throughput", unit, [value * timing.median / x for x in _times(timing)]),
    ]
    if timing.peak_bytes is not None:
        metrics.append(("memory", "MB", [timing.peak_bytes / 1e6] * 3))
    return [
        common
        | {"metric_name": name, "metric_unit": unit}
        | dict(zip(("y_value_50", "y_value_20", "y_value_80"), values, strict=True))
        for name, unit, values in metrics
    ]


def _times(timing: Timing) -> tuple[float, float, float]:
    return timing.median, timing.high, timing.low
