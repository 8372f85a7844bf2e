"""The command's body: choose cases, time them, print and save op by op."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

from keye_ops.bench import harness, results
from keye_ops.bench.harness import Case, Limits, Settings

from keye_ops.table import print_table

_QUICK_SECONDS, _QUICK_ROUNDS = 0.25, 7


def ops() -> list[str]:
    """Every op that has a script."""
    scripts = Path(__file__).parent.glob("bench_*.py")
    return sorted(path.stem.removeprefix("bench_") for path in scripts)


def script(op: str) -> ModuleType:
    """The script of an op."""
    return importlib.import_module(f"keye_ops.bench.bench_{op}")


def choose(wanted: Sequence[str], mode: str, settings: Settings) -> dict[str, list[Case]]:
    """Cases by op.

    Raises:
        ValueError: an op without a benchmark.
    """
    known = ops()
    for op in wanted:
        if op not in known:
            raise ValueError(f"op must be one of {', '.join(known)}, got {op!r}")
    chosen = {}
    for op in wanted or known:
        found = [case for case in script(op).cases(settings) if mode in ("all", case.mode)]
        chosen[op] = [case for case in found if case.quick or not settings.quick]
    return chosen


def run(arguments: argparse.Namespace) -> int:
    """Time the chosen cases; returns 0."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError('bench needs tqdm: pip install "keye-ops[cli]"') from error
    quick = arguments.quick
    settings = Settings(
        device=arguments.device,
        quick=quick,
        rounds=arguments.rounds or (_QUICK_ROUNDS if quick else Settings.rounds),
        seconds=_QUICK_SECONDS if quick else Settings.seconds,
        layers=arguments.layers,
        seed=arguments.seed,
    )
    chosen = choose(arguments.ops, arguments.mode, settings)
    if not any(chosen.values()):
        raise ValueError(f"no chosen case has --mode {arguments.mode}")
    if arguments.list:
        rows = [
            [case.op, case.shape, case.dtype_name, case.mode, "yes" if case.quick else ""]
            for cases in chosen.values()
            for case in cases
        ]
        print_table("Benchmarks", ["op", "shape", "dtype", "mode", "--quick"], rows)
        return 0
    if arguments.plot:
        from keye_ops.bench import plot  # fails before the work if matplotlib is missing

    cases = [case for cases in chosen.values() for case in cases]
    dtypes = dict.fromkeys(case.dtype for case in cases if case.flops)
    with tqdm(total=len(cases), desc="bench", unit="case", leave=False, disable=None) as bar:
        bar.set_postfix_str("the machine's limits")
        limits = Limits.measure(dtypes, settings)
        show = partial(bar.set_postfix_str, refresh=False)  # else it costs more than a short call
        for op, cases in chosen.items():
            record = results.Record(op, settings, limits, results.facts(settings, arguments))
            for case in cases:
                label = f"{op}: {case.shape}, {case.dtype_name}"
                bar.set_description(label)
                record.add(*harness.run_case(case, settings, limits, show))
                bar.update()
            if not cases:
                continue
            with tqdm.external_write_mode():
                record.print()
                if arguments.json:
                    record.save_json(arguments.output)
                if arguments.csv:
                    record.save_csv(arguments.output)
                if arguments.plot:
                    plot.save(record, arguments.output)
    return 0
