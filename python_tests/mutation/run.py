"""Plants faults in CUDA kernels, one at a time, and counts how many of them the tests see.

``python python_tests/mutation/run.py --sources csrc/rope/rope.cuh --test "COMMAND"`` compiles each
mutant as the host executor's build would, and runs the tests with ``KEYE_OPS_HOST_CUDA_DIR`` set to
a folder with the mutated libraries. A mutant that does not compile, or compiles to the same code,
does not count; one that the tests pass survives, for whatever reason.

A file of ``--equivalent`` mutants argues of some that they cannot change a result. They do not
count either, and the run fails when one of them is killed, for then the argument is wrong, or when
its line is gone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python_tests"))

from mutation.build import Project, Workspace  # noqa: E402
from mutation.operators import Mutation, mutations  # noqa: E402

VARIABLE = "KEYE_OPS_HOST_CUDA_DIR"
BROKEN, SAME, KILLED, SURVIVED = "does not compile", "same code", "killed", "survived"
EQUIVALENT, REFUTED = "argued to be equivalent", "argued to be equivalent, but killed"


@dataclass(frozen=True)
class Test:
    """A command, and the library that it tests; every library if empty."""

    command: tuple[str, ...]
    library: str = ""

    @classmethod
    def parse(cls, text: str) -> Test:
        """Parse [LIBRARY.so:]COMMAND."""
        library, colon, command = text.partition(".so:")
        if not colon:
            return cls(tuple(shlex.split(text)))
        return cls(tuple(shlex.split(command)), library + ".so")

    def run(self, libraries: Path, limit: float | None = None) -> tuple[str, float]:
        """Run the command on a folder of libraries: why it failed, or nothing; seconds."""
        environment = {**os.environ, VARIABLE: str(libraries), "PYTHONDONTWRITEBYTECODE": "1"}
        begin = time.monotonic()
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return f"took more than {limit:.0f} s", time.monotonic() - begin
            seconds = time.monotonic() - begin
            output.seek(max(0, output.seek(0, os.SEEK_END) - 4000))
            lines = output.read().strip().splitlines()
        failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        said = (failures or lines or [""])[-1]
        return (f"exit status {status}: {said[:200]}" if status else ""), seconds


@dataclass(frozen=True)
class Result:
    """What became of a mutant."""

    file: str
    line: int
    operator: str
    diff: str
    outcome: str
    reason: str = ""
    seconds: float = 0.0


class Runner:
    """Tries mutants, in a workspace for each of the workers."""

    def __init__(self, project: Project, sources: Sequence[Path], tests: list[Test]) -> None:
        self.project, self.tests, self.limits = project, tests, {}
        # Objects of no tested library need not be compiled.
        tested = {each for name in self._tested() for each in project.objects(name)}
        self.users = {
            source: [each for each in project.users(source) if each in tested] for source in sources
        }
        self.texts = {source: source.read_text() for source in sources}
        self.digests: dict[Path, str | None] = {}
        self.workspaces: queue.Queue[Workspace] = queue.Queue()
        for source, objects in self.users.items():
            if not objects:
                raise ValueError(f"no tested library in {project.build} depends on {source}")

    def prepare(self, folder: Path, num_workers: int, limit: float | None) -> None:
        """Make workspaces, and see that the tests pass on unmutated libraries made in one.

        Raises:
            ValueError: the tests fail there, or pass without any library.
        """
        for worker in range(num_workers):
            (place := folder / str(worker)).mkdir()
            self.workspaces.put(Workspace(self.project, place))
        workspace = self.workspaces.get()
        objects = sorted(set(itertools.chain(*self.users.values())))
        self.digests = {compiled: workspace.compile(compiled) for compiled in objects}
        for library in self._libraries(objects):
            workspace.link(library, objects)
        (empty := folder / "empty").mkdir()
        for test in self.tests:
            command = shlex.join(test.command)
            failure, seconds = test.run(workspace.libraries)
            if failure:
                raise ValueError(f"{command} must pass without a mutation, got {failure}")
            self.limits[test] = limit or 30 + 4 * seconds
            if not test.run(empty, self.limits[test])[0]:
                raise ValueError(f"{command} must fail when {VARIABLE} has no libraries")
            print(f"without a mutation: {seconds:.1f} s, {command}", flush=True)
        self._restore(workspace, objects)
        self.workspaces.put(workspace)

    def run(self, source: Path, mutation: Mutation) -> Result:
        """Compile a mutant and test it."""
        text, objects = self.texts[source], self.users[source]
        file = str(source.relative_to(self.project.csrc.parent))
        result = Result(file, mutation.line(text), mutation.operator, mutation.diff(text), BROKEN)
        workspace = self.workspaces.get()
        try:
            workspace.write(source, mutation.apply(text))
            digests = [workspace.compile(compiled) for compiled in objects]
            if None in digests:
                return result
            changed = [
                compiled
                for compiled, digest in zip(objects, digests, strict=True)
                if digest != self.digests[compiled]
            ]
            if not changed:
                return replace(result, outcome=SAME)
            for library in self._libraries(changed):
                workspace.link(library, changed)
            return self._test(result, workspace, changed)
        finally:
            workspace.write(source, text)
            self._restore(workspace, objects)
            self.workspaces.put(workspace)

    def _test(self, result: Result, workspace: Workspace, changed: list[Path]) -> Result:
        total, libraries = 0.0, self._libraries(changed)
        for test in self.tests:
            if test.library and test.library not in libraries:
                continue
            failure, seconds = test.run(workspace.libraries, self.limits[test])
            total += seconds
            if failure:
                return replace(result, outcome=KILLED, reason=failure, seconds=total)
        return replace(result, outcome=SURVIVED, seconds=total)

    def _tested(self) -> list[str]:
        named = {test.library for test in self.tests}
        return [name for name in self.project.links if "" in named or name in named]

    def _libraries(self, objects: list[Path]) -> list[str]:
        return [name for name in self._tested() if set(objects) & set(self.project.objects(name))]

    def _restore(self, workspace: Workspace, objects: list[Path]) -> None:
        for library in self._libraries(objects):
            workspace.unlink(library)


def try_mutants(
    runner: Runner,
    candidates: list[tuple[Path, Mutation]],
    sample: int,
    num_workers: int,
    equivalents: Sequence[Equivalent] = (),
) -> list[Result]:
    """Try candidates in their order until enough of them count."""
    results, counted = [], 0
    with (
        ThreadPoolExecutor(num_workers) as pool,
        tqdm(total=min(sample, len(candidates)), unit="mutant", disable=None) as progress,
    ):
        futures = [pool.submit(runner.run, *candidate) for candidate in candidates]
        for future in futures:
            results.append(judge(future.result(), equivalents))
            tqdm.write(f"{results[-1].file}:{results[-1].line} {results[-1].outcome}", sys.stdout)
            if results[-1].outcome in (KILLED, SURVIVED):
                counted += 1
                progress.update()
            if counted == sample:
                pool.shutdown(wait=True, cancel_futures=True)
                break
    return results


@dataclass(frozen=True)
class Equivalent:
    """A mutant that cannot change a result: its line before and after, stripped, and why."""

    file: str
    before: str
    after: str
    reason: str

    def is_of(self, result: Result) -> bool:
        """Whether it is this mutant that was tried."""
        lines = [line[1:].strip() for line in result.diff.splitlines()]
        return result.file == self.file and lines == [self.before, self.after]


def read_equivalents(path: Path | None, root: Path) -> list[Equivalent]:
    """The mutants of a JSON file.

    Raises:
        ValueError: the line of one of them is not in its file.
    """
    equivalents = [Equivalent(**each) for each in json.loads(path.read_text())] if path else []
    for each in equivalents:
        lines = map(str.strip, (root / each.file).read_text().splitlines())
        if each.before not in lines:
            raise ValueError(f"{path}: {each.file} must have the line {each.before!r}")
    return equivalents


def judge(result: Result, equivalents: Sequence[Equivalent]) -> Result:
    """The result, which does not count where it is argued away."""
    argued = next((each for each in equivalents if each.is_of(result)), None)
    if argued is None or result.outcome not in (KILLED, SURVIVED):
        return result
    if result.outcome == KILLED:
        return replace(result, outcome=REFUTED)
    return replace(result, outcome=EQUIVALENT, reason=argued.reason)


def report(results: Sequence[Result]) -> str:
    """Markdown: the share killed, by operator, and every survivor's difference."""
    outcomes = Counter(result.outcome for result in results)
    counted = outcomes[KILLED] + outcomes[SURVIVED]
    lines = [
        f"{outcomes[KILLED]} of {counted} mutants killed ({_share(results):.1%}). Not counted: "
        f"{outcomes[SAME]} with the same code, {outcomes[BROKEN]} that do not compile, "
        f"{outcomes[EQUIVALENT]} argued to be equivalent.",
        "",
        "| file | operator | killed | of |",
        "|---|---|---|---|",
        *(f"| {' | '.join(map(str, row))} |" for row in _by_operator(results)),
        "",
    ]
    for result in results:
        if result.outcome in (SURVIVED, REFUTED):
            lines += [f"`{result.file}:{result.line}`", "```diff", result.diff, "```"]
    return "\n".join(lines) + "\n"


def _by_operator(results: Sequence[Result]) -> list[tuple[str, str, int, int]]:
    keys = sorted({(each.file, each.operator) for each in results})
    rows = []
    for file, operator in keys:
        ours = [each.outcome for each in results if (each.file, each.operator) == (file, operator)]
        counted = ours.count(KILLED) + ours.count(SURVIVED)
        rows.append((file, operator, ours.count(KILLED), counted))
    return [row for row in rows if row[-1]]


def _share(results: Sequence[Result]) -> float:
    outcomes = Counter(result.outcome for result in results)
    return outcomes[KILLED] / max(outcomes[KILLED] + outcomes[SURVIVED], 1)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", nargs="+", type=Path, required=True)
    parser.add_argument(
        "--test",
        action="append",
        required=True,
        metavar="[LIBRARY.so:]COMMAND",
        help="tests of the library, or of all; may be given several times, the fastest first",
    )
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "host_executor")
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc")
    parser.add_argument("--sample", type=int, default=sys.maxsize, help="mutants that count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, help="seconds; default: by the unmutated run")
    parser.add_argument("--require", type=float, default=0.95, help="share that must be killed")
    parser.add_argument("--at-least", type=int, default=1, help="mutants that must count")
    parser.add_argument("--equivalent", type=Path, help="a JSON file of mutants that do not count")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report", type=Path, help="a Markdown file")
    return parser.parse_args()


def main() -> None:
    """Try a sample of the mutants, report, and fail when too many survive."""
    arguments = parse_arguments()
    sources = [source.resolve() for source in arguments.sources]
    project = Project.read(arguments.build.resolve(), arguments.csrc.resolve())
    runner = Runner(project, sources, [Test.parse(text) for text in arguments.test])
    candidates = [(source, each) for source in sources for each in mutations(runner.texts[source])]
    random.Random(arguments.seed).shuffle(candidates)
    equivalents = read_equivalents(arguments.equivalent, project.csrc.parent)
    with tempfile.TemporaryDirectory(prefix="mutation") as folder:
        runner.prepare(Path(folder).resolve(), arguments.workers, arguments.timeout)
        results = try_mutants(runner, candidates, arguments.sample, arguments.workers, equivalents)

    share, text = _share(results), report(results)
    counted = sum(result.outcome in (KILLED, SURVIVED) for result in results)
    if arguments.report:
        arguments.report.write_text(text)
    if arguments.json:
        facts = {"seed": arguments.seed, "candidates": len(candidates), "counted": counted}
        facts |= {"share": share, "mutants": [asdict(result) for result in results]}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    print(text)
    if any(result.outcome == REFUTED for result in results):
        sys.exit("mutation: a mutant that is argued to be equivalent was killed")
    if counted < arguments.at_least or share < arguments.require:
        sys.exit(
            f"mutation: {arguments.require:.0%} of at least {arguments.at_least} mutants must be "
            f"killed, got {share:.1%} of {counted}"
        )


if __name__ == "__main__":
    main()
