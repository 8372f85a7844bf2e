"""Turns minutes of a GPU into evidence: what was run, what was right, how fast it was.

    python bench/gpu_suite.py --minutes 9 --output bench/results

from a checkout; ``--device host_cuda`` runs a shortened form on the host executor, without a GPU.
The most valuable stages come first. Each has processes of its own and is saved as it goes, item by
item, so that neither a fault nor an early end loses what others found.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "bench"), str(ROOT), str(ROOT / "python_tests")]

import gpu_runner  # noqa: E402
import gpu_targets  # noqa: E402
from gpu_runner import Context, Found, Stage  # noqa: E402

BUILD = ROOT / "build" / "host_executor"
DEVICES = ("cuda", "host_cuda", "cpu")
# On a GPU their seconds are shares of nine minutes.
STAGES = (
    Stage("build", "gpu_environment", 150, 5, item_seconds=480, host_seconds=1, essential=True),
    Stage("environment", "gpu_environment", 15, host_seconds=6),
    Stage("twin", "gpu_kernels", 35, item_seconds=30, host_seconds=10),
    Stage("selftest", "gpu_kernels", 8, item_seconds=20),
    Stage("parity", "gpu_parity", 70, at_least=10, host_seconds=25),
    Stage("benchmarks", "gpu_bench", 90, at_least=15, item_seconds=120),
    Stage("repeats", "gpu_repeats", 30, at_least=8, host_seconds=12),
    Stage("graphs", "gpu_graphs", 20, at_least=8),
    Stage("fuzz", "gpu_fuzz", 60, at_least=10, item_seconds=600, host_seconds=12),
    Stage("malformed", "gpu_malformed", 20, at_least=8, host_seconds=12),
    Stage("syncs", "gpu_syncs", 20, at_least=8),
    Stage("large", "gpu_large", 30, at_least=8),
    Stage("tests", "gpu_pytest", 45, at_least=20, item_seconds=240),
    Stage("sanitizer", "gpu_sanitizer", 50, at_least=20, item_seconds=120),
    Stage("benchmarks of the rest", "gpu_bench", 60, at_least=15, item_seconds=120),
)


def first_line(*command: str) -> str:
    """What a program prints first, or nothing where it fails or is absent."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return (result.stdout.strip().splitlines() or [""])[0]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="for everything (default: 9)")
    parser.add_argument("--device", choices=DEVICES, default="cuda", help="default: cuda")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", metavar="DIR")
    parser.add_argument("--build", type=Path, default=BUILD, metavar="DIR", help="of the executor")
    parser.add_argument("--only", metavar="STAGES", help="some, with commas between them")
    parser.add_argument("--skip", metavar="STAGES", default="", help="all but these")
    parser.add_argument(
        "--resume", type=Path, metavar="FILE", help="take the stages that passed in an earlier run"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random data (default: 0)")
    parser.add_argument("--plot", action="store_true", help="save plots of the benchmarks, too")
    parser.add_argument(
        "--host-only", action="store_true", help="--device host_cuda --only twin, for short"
    )
    for hidden in ("--stage", "--module", "--journal", "--seconds"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.host_only:
        arguments.device, arguments.only = "host_cuda", "twin"
    if arguments.minutes is None:
        arguments.minutes = 1.2 if arguments.device == "host_cuda" else 9.0
    names = {stage.name for stage in STAGES}
    for name in [*(arguments.only or "").split(","), *arguments.skip.split(",")]:
        if name and name not in names:
            parser.error(f"a stage must be one of {', '.join(sorted(names))}, got {name!r}")
    return arguments


def serve(arguments: argparse.Namespace) -> int:
    """The body of a stage's process."""
    faulthandler.enable()  # what crashes tells where
    context = Context(
        stage=arguments.stage,
        device=arguments.device,
        build=arguments.build,
        seed=arguments.seed,
        deadline=time.monotonic() + float(arguments.seconds),
    )
    module = gpu_runner.load(arguments.module)
    return gpu_runner.serve(module, context, Path(arguments.journal))


class Run:
    """One run of the suite: its stages, and the file that grows with them."""

    def __init__(
        self, arguments: argparse.Namespace, gpu: str, stages: tuple[Stage, ...] | None = None
    ) -> None:
        only = (arguments.only or "").split(",")
        skip = arguments.skip.split(",")
        self.arguments, self.gpu = arguments, gpu
        self.stages = [
            one
            for one in stages or STAGES
            if (not arguments.only or one.name in only) and one.name not in skip
        ]
        self.begin, self.found = time.monotonic(), {}
        names = {"host_cuda": "host", "cpu": "cpu"}
        folder = names.get(arguments.device) or "-".join(gpu.lower().split())
        self.folder = arguments.output / folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.started = datetime.now(timezone.utc)
        self.path = self.folder / f"{self.started:%Y-%m-%dT%H-%M-%S}.json"
        self.earlier = self._earlier()
        self.finished = False
        self.journals = Path(tempfile.mkdtemp(prefix="gpu_suite_"))

    def _earlier(self) -> dict[str, Found]:
        if self.arguments.resume is None:
            return {}
        saved = json.loads(self.arguments.resume.read_text(encoding="utf-8"))
        done = {one["stage"]: one for one in saved["stages"] if one["status"] == "passed"}
        return {k: one for k, one in done.items() if k not in ("build", "environment")}

    def left(self) -> float:
        """Seconds of the whole run."""
        return self.arguments.minutes * 60 - (time.monotonic() - self.begin)

    def run(self) -> None:
        """Every stage, in order."""
        for number, stage in enumerate(self.stages):
            self._keep(self._stage(stage, self.stages[number + 1 :]), print_it=True)
        self.finished = True
        self.save()

    def _stage(self, stage: Stage, rest: list[Stage]) -> Found:
        device, name = self.arguments.device, stage.name
        if name in self.earlier:
            return self.earlier[name] | {"resumed": str(self.arguments.resume.name)}
        if gpu_runner.wanted(stage, device) == 0:
            return gpu_runner.not_run(stage, "needs a GPU")
        rest = [one for one in rest if one.name not in self.earlier]
        seconds = gpu_runner.budget(stage, rest, max(self.left(), 0.0), device)
        least = min(stage.at_least, gpu_runner.wanted(stage, device))
        if seconds < least:
            return gpu_runner.not_run(stage, f"{seconds:.0f} s are too few", seconds)
        journal = self.journals / f"{name.replace(' ', '_')}.jsonl"
        own = self.arguments
        command = [sys.executable, str(Path(__file__).resolve()), "--stage", name]
        command += ["--module", stage.module, "--journal", str(journal), "--device", device]
        command += ["--seconds", str(seconds), "--build", str(own.build), "--seed", str(own.seed)]
        return gpu_runner.run_stage(stage, command, journal, seconds, self._keep)

    def _keep(self, found: Found, print_it: bool = False) -> None:
        before = self.found.get(found["stage"])
        self.found[found["stage"]] = found
        if print_it or before is None or len(before["items"]) != len(found["items"]):
            self.save()
        if print_it:
            reason = f" ({found['reason']})" if found["reason"] else ""
            print(f"{found['status']} {found['stage']}, {found['seconds']:.1f} s{reason}")
            problems = list(gpu_runner.problems(found))
            for problem in problems[:5]:
                print(f"  {problem.splitlines()[0][:300]}")
            if len(problems) > 5:
                print(f"  and {len(problems) - 5} more, in the file")
            sys.stdout.flush()

    def result(self) -> dict[str, Any]:
        """What is saved."""
        stages = list(self.found.values())
        benchmarks = gpu_targets.gather(stages)
        return {
            "format": 2,
            "gpu": self.gpu or None,
            "device": self.arguments.device,
            "started": self.started.isoformat(timespec="seconds"),
            "minutes": self.arguments.minutes,
            "seed": self.arguments.seed,
            "finished": self.finished,
            "stages": stages,
            "benchmarks": benchmarks,
            "targets": gpu_targets.judge(self.gpu, benchmarks, stages),
        }

    def save(self) -> None:
        """Replace the file at once, so that it is whole whenever the run ends."""
        text = json.dumps(self.result(), indent=1, ensure_ascii=False, default=str)
        for place in (str(ROOT), sys.prefix, sys.base_prefix):  # where this machine keeps things
            text = text.replace(f"{place}/", "")
        new = self.path.with_suffix(".new")
        new.write_text(text + "\n", encoding="utf-8")
        os.replace(new, self.path)


def show(run: Run) -> None:
    """A row a stage, and a row a target."""
    from keye_ops.table import print_table

    rows = []
    for one in run.found.values():
        note = next(gpu_runner.problems(one), one["reason"]).strip()
        items = f"{one['passed']} of {one['planned']}" if one["planned"] else ""
        seconds = f"{one['seconds']:.1f} of {one['budget']:.0f}"
        last = (note.splitlines() or [""])[-1][:100]
        rows.append([one["stage"], one["status"], items, one["cases"] or "", seconds, last])
    columns = ["stage", "status", "items passed", "cases", "s", "note"]
    print_table(f"gpu_suite, {run.gpu or run.arguments.device}", columns, rows)
    targets = [] if run.arguments.device != "cuda" else run.result()["targets"]
    if targets:
        rows = [[t["op"], t["target"], t["measured"], t["status"]] for t in targets]
        print_table("Targets", ["op", "target", "measured", "status"], rows)


def main(argv: list[str] | None = None) -> int:
    """Run stages; 0 if nothing failed, 1 if something did, 2 without a GPU."""
    arguments = parse(argv)
    if arguments.stage:
        return serve(arguments)
    gpu = ""
    if arguments.device == "cuda":
        gpu = first_line("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
        if not gpu:
            print("gpu_suite: needs a GPU and its driver, nvidia-smi names none; there is "
                  "--device host_cuda")  # fmt: skip
            return 2
    run = Run(arguments, gpu)

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        run.run()
    except KeyboardInterrupt:
        run.save()
        print(f"gpu_suite: ended early; saved {run.path}")
        return 1
    show(run)
    if arguments.plot:
        from keye_ops.bench_command import bench_module

        bench_module("gpu_plot").save(run.result(), run.folder)
    print(f"saved {run.path}")
    return int(any(one["status"] == "failed" for one in run.found.values()))


if __name__ == "__main__":
    sys.exit(main())
