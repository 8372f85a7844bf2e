"""Timing for all benchmarks: interleaved rounds, medians with spread, this machine's own limits."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import keye_ops
from keye_ops.table import print_table

Provider = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """One provider on one shape, in milliseconds."""

    shape: str
    provider: str
    median: float
    low: float  # 20th percentile
    high: float  # 80th percentile
    gigabytes_per_second: float
    percent_of_copy: float


def measure(providers: dict[str, Provider], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every provider; one call of each a round, so that drifts hit all alike."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    for provider in providers.values():
        provider()
        provider()
    for _ in range(rounds):
        for name, provider in providers.items():
            begin = time.perf_counter()
            provider()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return times


def copy_of(num_bytes: int, device: str) -> Provider:
    """Read and write as many bytes as an op does that reads and writes ``num_bytes`` in all."""
    source = torch.randint(0, 255, (num_bytes // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def clone_of(num_bytes: int, device: str) -> Provider:
    """The same into fresh memory, as an op that is not in place has to."""
    source = torch.randint(0, 255, (num_bytes // 2,), dtype=torch.uint8, device=device)
    return source.clone


def compare(
    shape: str, providers: dict[str, Provider], num_bytes: int, rounds: int, device: str = "cpu"
) -> list[Timing]:
    """Time all providers beside a copy of the same bytes."""
    copies = {"copy": copy_of(num_bytes, device)}
    copies["copy into fresh memory"] = clone_of(num_bytes, device)
    times = measure(copies | providers, rounds)
    copy = statistics.median(times["copy"])
    timings = []
    for provider, values in times.items():
        ordered = sorted(values)
        median = statistics.median(values)
        timings.append(
            Timing(
                shape,
                provider,
                median,
                ordered[len(ordered) // 5],
                ordered[-1 - len(ordered) // 5],
                num_bytes / median / 1e6,
                100 * copy / median,
            )
        )
    return timings


def report(title: str, timings: Sequence[Timing]) -> None:
    """Print a table."""
    columns = ["shape", "provider", "ms", "20 %", "80 %", "GB/s", "% of copy"]
    rows = [
        [
            t.shape,
            t.provider,
            f"{t.median:.3f}",
            f"{t.low:.3f}",
            f"{t.high:.3f}",
            f"{t.gigabytes_per_second:.1f}",
            f"{t.percent_of_copy:.0f}",
        ]
        for t in timings
    ]
    print_table(title, columns, rows)


def save(path: Path, timings: Sequence[Timing]) -> None:
    """Write the timings with everything needed to repeat them."""
    # In the folder of this file: the benchmark may be run from anywhere.
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).resolve().parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    facts = {
        "keye_ops": keye_ops.__version__,
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "timings": [asdict(t) for t in timings],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=2) + "\n")
    print(f"saved {path}")


def cpu_name() -> str:
    """The CPU's name and core count."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def arguments(description: str) -> argparse.Namespace:
    """Options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also save the timings")
    return parser.parse_args()
