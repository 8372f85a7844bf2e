"""Faults of the kinds that kernels have, planted one by one: the executor must report each.

``python python_tests/planted_faults.py`` compiles every faulty kernel, runs it under several
schedules and prints what was found; ``--report FILE`` writes the table. ``test_planted_faults.py``
does the same in CI.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import host_cuda
from fault_list import FAULTS, SOURCES
from fault_probe import library_of
from mutation.build import Project, Workspace
from planted_fault import Fault
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"


@dataclass(frozen=True)
class Outcome:
    """What running a faulty kernel showed.

    Attributes:
        found: kinds of findings, and how many of the runs (shapes and schedules) reported them.
        runs: how many there were.
        right: in how many of them the numbers came out right.
        hidden: in how many of those there was a finding.
        places: source lines of the first finding of an expected kind.
        error: why there is no outcome.
        traffic: bytes loaded and stored in every run, by the name of the memory.
    """

    found: dict[str, int]
    runs: int
    right: int
    hidden: int
    places: tuple[str, ...]
    error: str = ""
    traffic: tuple[dict[str, list[int]], ...] = ()

    def catches(self, fault: Fault) -> bool:
        """Whether a finding of an expected kind, or wrong numbers where only they can tell."""
        wrong = "wrong numbers" in fault.expected and self.right < self.runs
        return not self.error and (wrong or any(kind in self.found for kind in fault.expected))

    def is_clean(self) -> bool:
        """No finding and right numbers."""
        return not self.error and not self.found and self.right == self.runs > 0


def try_fault(fault: Fault, project: Project, workspaces: queue.Queue[Workspace]) -> Outcome:
    """Compile a copy with the fault, and run it in a process of its own."""
    source = CSRC / SOURCES[fault.kernel]
    text = source.read_text()
    if text.count(fault.find) != 1:
        count = text.count(fault.find)
        return _failed(f"{source.name} must have one {fault.find!r}, got {count}")
    workspace = workspaces.get()
    library = library_of(fault.kernel)
    users = project.users(source)
    objects = [each for each in project.objects(library) if each in users]
    try:
        workspace.write(source, text.replace(fault.find, fault.replace))
        if None in [workspace.compile(compiled) for compiled in objects]:
            return _failed("it does not compile")
        workspace.link(library, objects)
        return observe(fault, workspace.libraries)
    finally:
        workspace.write(source, text)
        workspace.unlink(library)
        workspaces.put(workspace)


def observe(fault: Fault, libraries: Path) -> Outcome:
    """Run the fault's kernel from a folder of libraries."""
    command = [sys.executable, str(Path(__file__).with_name("fault_probe.py")), fault.kernel]
    environment = {**os.environ, "KEYE_OPS_HOST_CUDA_DIR": str(libraries)}
    try:
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
    except subprocess.TimeoutExpired:
        return _failed("it ran for more than 120 s")
    if result.returncode != 0:
        return _failed(f"its process ended with {result.returncode}: {result.stderr[-500:]}")
    runs = json.loads(result.stdout.splitlines()[-1])
    traffic = tuple(run["traffic"] for run in runs)
    found: dict[str, int] = {}
    for run in runs:
        for kind in dict.fromkeys(finding["kind"] for finding in run["findings"]):
            found[kind] = found.get(kind, 0) + 1
    places = next(
        (
            tuple(place for place in finding["places"] if place)
            for run in runs
            for finding in run["findings"]
            if finding["kind"] in fault.expected
        ),
        (),
    )
    right = [run for run in runs if run["right"]]
    hidden = sum(bool(run["findings"]) for run in right)
    return Outcome(found, len(runs), len(right), hidden, places, traffic=traffic)


def _failed(reason: str) -> Outcome:
    return Outcome({}, 0, 0, 0, (), reason)


def try_all(faults: Sequence[Fault], num_workers: int = 2) -> list[Outcome]:
    """The outcome of every fault, and that the unmutated kernels have no findings.

    Raises:
        RuntimeError: a kernel without a fault is reported, or comes out wrong.
    """
    build = host_cuda.build()
    for kernel in dict.fromkeys(fault.kernel for fault in faults):
        clean = observe(Fault("none", kernel, "", "", ()), build)
        if not clean.is_clean():
            raise RuntimeError(f"{kernel} without a fault must have no findings, got {clean}")
    project = Project.read(build, CSRC)
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        workspaces: queue.Queue[Workspace] = queue.Queue()
        for worker in range(num_workers):
            (place := Path(folder).resolve() / str(worker)).mkdir()
            workspaces.put(Workspace(project, place))
        with ThreadPoolExecutor(num_workers) as pool:
            outcomes = pool.map(lambda fault: try_fault(fault, project, workspaces), faults)
            return list(tqdm(outcomes, total=len(faults), unit="fault", disable=None))


def report(faults: Sequence[Fault], outcomes: Sequence[Outcome]) -> str:
    """A Markdown table."""
    caught = sum(outcome.catches(fault) for fault, outcome in zip(faults, outcomes, strict=True))
    hidden = sum(outcome.hidden > 0 for outcome in outcomes)
    lines = [
        f"{caught} of {len(faults)} planted faults caught, {hidden} of them in a run whose numbers "
        "came out right. Written by `python_tests/planted_faults.py`.",
        "",
        "| kernel | fault | reported as (runs) | right numbers | first report at |",
        "|---|---|---|---|---|",
    ]
    for fault, outcome in zip(faults, outcomes, strict=True):
        kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(outcome.found.items()))
        numbers = f"{outcome.right} of {outcome.runs}"
        where = outcome.error or " and ".join(outcome.places)
        mark = "" if outcome.catches(fault) else "**MISSED** "
        lines.append(
            f"| {fault.kernel} | {fault.name} | {mark}{kinds or '-'} | {numbers} | {where} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try the faults; exit with an error when one is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", help="only this kernel's")
    parser.add_argument("--report", type=Path, help="a Markdown file")
    arguments = parser.parse_args()
    faults = [each for each in FAULTS if arguments.kernel in (None, each.kernel)]
    outcomes = try_all(faults)
    text = report(faults, outcomes)
    print(text)
    if arguments.report:
        arguments.report.write_text(text)
    if not all(outcome.catches(fault) for fault, outcome in zip(faults, outcomes, strict=True)):
        sys.exit("a planted fault was missed")


if __name__ == "__main__":
    main()
