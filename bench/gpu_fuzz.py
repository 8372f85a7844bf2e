"""Stage fuzz: random problems of every op on the device, ten thousand where time allows.

The problems are those of ``python_tests/fuzz_cases.py``: built and judged on the host, while the
op gets them on the device, in memory of the same strides, offsets and surroundings.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a worker
    _ROOT = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(_ROOT / "bench"), str(_ROOT), str(_ROOT / "python_tests")]

import gpu_device
import torch
from gpu_runner import Context, Found, NotRun

import keye_ops

PROBLEMS = 10_000
_CHUNK = 200  # problems a seed
_MOST_PROBLEMS = 3  # after so many failures of an op it is left
_WORKERS = 14
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def items(context: Context) -> list[str]:
    """Everything at once on a GPU, where processes work side by side; else an op an item."""
    try:
        import hypothesis  # noqa: F401
    except ImportError as error:
        raise NotRun("hypothesis is not installed") from error
    import fuzz_cases

    if context.device == "cuda":
        return ["all ops"]
    return [op for op in fuzz_cases.OPS if gpu_device.has_kernel(op, context)]


def run(item: str, context: Context) -> Found:
    """Problems of one op, or of all."""
    if item == "all ops":
        return side_by_side(context)
    import fuzz_cases

    count = PROBLEMS // len(fuzz_cases.OPS)
    return fuzz(item, count, context.seed, time.monotonic() + context.share(), context)


# ---- the ops on the device ----


class Move(torch.autograd.Function):
    """A tensor in a copy of its whole memory on a device; the gradient comes back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, device: str, kept: list[Any]) -> torch.Tensor:
        """There."""
        whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        copy = whole.clone() if device == "cpu" else whole.to(device)
        kept.append((whole, copy))
        return copy.as_strided(x.shape, x.stride(), x.storage_offset())

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """And back."""
        return dx.cpu(), None, None


class OnDevice:
    """keye_ops whose functions take tensors of the host, and give such, and compute elsewhere."""

    def __init__(self, device: str, wrong: Callable[[Any], Any] | None = None) -> None:
        self.device, self.wrong = device, wrong

    def __getattr__(self, name: str) -> Any:
        function = getattr(keye_ops, name)
        if not callable(function) or isinstance(function, type):
            return function

        def call(*args: Any, **options: Any) -> Any:
            kept: list[Any] = []

            def move(x: Any) -> Any:
                return Move.apply(x, self.device, kept) if isinstance(x, torch.Tensor) else x

            out = function(*map(move, args), **{k: move(x) for k, x in options.items()})
            several = isinstance(out, tuple)
            outs = tuple(x.cpu() for x in (out if several else (out,)))
            for whole, copy in kept:
                same = torch.equal(bytes_of(whole), bytes_of(copy.detach()).cpu())
                assert same, f"{name} wrote to memory of its inputs"
            if self.wrong is not None:
                outs = self.wrong(outs)
            return outs if several else outs[0]

        return call


def bytes_of(x: torch.Tensor) -> torch.Tensor:
    """Of a one-dimensional tensor."""
    return x.view(torch.uint8)


def favour_kernels(op: str, choices: dict[str, Any]) -> dict[str, Any]:
    """Most problems such that the kernels take them; the others fall back, which is fuzzed too."""
    import fuzz_cases

    if choices["seed"] % 4 == 0:
        return choices
    if op == "varlen_attention":
        return fuzz_cases.kernel_choices(choices)
    new = dict(choices)
    if new["dtype"] == torch.float64:
        new["dtype"] = _DTYPES[new["seed"] % 3]
    for name in ("head_dim", "channels", "inner", "outer"):
        if name in new:
            new[name] = -(-new[name] // 8) * 8
    if new.get("layout") in ("offset", "rows", "columns", "turned"):
        new["layout"] = "heads" if "heads" in new else "contiguous"
    return new


# ---- fuzzing ----


def fuzz(
    op: str,
    count: int,
    seed: int,
    deadline: float,
    context: Context,
    wrong: Callable[[Any], Any] | None = None,
) -> Found:
    """Judge that many problems of an op, or as many as time allows.

    Args:
        op: as fuzz_cases names it.
        count: of problems.
        seed: of the first 200; each 200 have the next.
        deadline: as ``time.monotonic()`` tells it.
        context: of the stage.
        wrong: spoils results, for tests.
    """
    import fuzz_cases
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    strategy, make = fuzz_cases.OPS[op]
    tally, done, native, problems = fuzz_cases.Tally(), 0, 0, []
    last: dict[str, Any] = {}
    options = settings(
        max_examples=_CHUNK,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )

    def body(choices: dict[str, Any]) -> None:
        nonlocal done, native, last
        if time.monotonic() > deadline or done >= count:
            return
        last = favour_kernels(op, choices)
        fuzz_cases.check(make(last), tally)
        done += 1
        native += gpu_device.implementation(op, context) == "native"

    kept = fuzz_cases.keye_ops, fuzz_cases.GUARD
    fuzz_cases.IN_TENSOR_CORES = context.device != "cpu"
    fuzz_cases.keye_ops = OnDevice(gpu_device.type_of(context), wrong)
    fuzz_cases.GUARD = 64  # a multiple of 16 bytes, so that kernels take what lies behind it
    first_seed, threads = seed, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with gpu_device.kernels(context) as reports:
            while done < count and time.monotonic() < deadline and len(problems) < _MOST_PROBLEMS:
                try:
                    seeded(seed)(options(given(strategy)(body)))()
                except Exception as error:
                    text = str(error).strip().splitlines() or [type(error).__name__]
                    problems.append(f"{text[0][:300]}; seed {seed}: {last}")
                    if "CUDA error" in str(error):
                        break
                seed += 1
        problems += reports[:3]
    finally:
        fuzz_cases.keye_ops, fuzz_cases.GUARD = kept
        fuzz_cases.IN_TENSOR_CORES = False
        torch.set_num_threads(threads)
    try:
        tally.verify()
    except AssertionError as error:
        problems.append(str(error))
    seeds = [first_seed, seed - 1]
    facts = {"problems": done, "native": native, "seeds": seeds, "problems a seed": _CHUNK}
    return {"cases": done, "problems": problems, "facts": {op: facts}}


# ---- many processes ----


def side_by_side(context: Context) -> Found:
    """Problems of all ops, in as many processes as there are processors."""
    import fuzz_cases

    ops = list(fuzz_cases.OPS)
    workers = max(1, min(_WORKERS, (os.cpu_count() or 2) - 1))
    parts = max(1, workers // len(ops))
    count = -(-PROBLEMS // (len(ops) * parts))
    seconds = max(context.left() - 4, 1)
    waiting = [(op, context.seed + 1_000_000 * part) for part in range(parts) for op in ops]
    running: dict[tuple[str, int], subprocess.Popen[str]] = {}
    end = time.monotonic() + seconds
    results: dict[tuple[str, int], Found] = {}
    begin_of_worker = [sys.executable, str(Path(__file__).resolve())]
    tasks = len(waiting)
    while waiting or running:
        while waiting and len(running) < workers:
            task = waiting.pop(0)
            # Where there are fewer processors than tasks, each gets a part of the time.
            own = min(end - time.monotonic(), seconds * workers / tasks)
            until = time.monotonic() + max(own, 1)  # the same clock in all processes
            words = [task[0], count, task[1], until, context.device, context.build]
            running[task] = subprocess.Popen(
                [*begin_of_worker, *map(str, words)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        time.sleep(0.1)
        for task, process in list(running.items()):
            late = time.monotonic() > end + 3
            if process.poll() is None and not late:
                continue
            if late:
                process.kill()
            out, error = process.communicate()
            results[task] = _result(task, out, error, process.returncode, late)
            context.note({"finished": len(results), "of": tasks})
            del running[task]
    return merge(results)


def _result(task: tuple[str, int], out: str, error: str, status: int, late: bool) -> Found:
    lines, name = out.strip().splitlines(), f"{task[0]}, seed {task[1]}"
    if status == 0 and lines:
        return json.loads(lines[-1])
    if late:
        return {"cases": 0, "problems": [f"{name}: did not end in time"]}
    return {"cases": 0, "problems": [f"{name}: exit status {status}: {error[-1500:]}"]}


def merge(results: dict[tuple[str, int], Found]) -> Found:
    """One result of those of many processes."""
    facts: dict[str, Any] = {}
    for (op, _), one in results.items():
        own = facts.setdefault(op, {"problems": 0, "native": 0, "seeds": []})
        for part in one.get("facts", {}).values():
            own["problems"] += part["problems"]
            own["native"] += part["native"]
            own["seeds"].append(part["seeds"])
    cases = sum(one["cases"] for one in results.values())
    return {
        "cases": cases,
        "problems": [problem for one in results.values() for problem in one["problems"]],
        "facts": {"ops": facts, "problems a seed": _CHUNK, "wanted": PROBLEMS},
    }


def work(argv: list[str]) -> int:
    """A worker: op, count, seed, deadline, device, folder of the executor; prints JSON."""
    op, count, seed, deadline, device, build = argv
    context = Context("fuzz", device, Path(build))
    if device == "cuda":
        torch.zeros(1, device="cuda")
    found = fuzz(op, int(count), int(seed), float(deadline), context)
    print(json.dumps(found, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(work(sys.argv[1:]))
