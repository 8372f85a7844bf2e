"""``keye-ops bench``: the benchmarks of ``bench/``, which wheels hold as ``keye_ops.bench``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from keye_ops.device import resolve_device

HELP = "Time every op beside eager PyTorch, torch.compile and other libraries on this machine."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("ops", metavar="op", nargs="*", help="which (default: all; see --list)")
    parser.add_argument("--list", action="store_true", help="print the cases of every op and stop")
    parser.add_argument(
        "--quick", action="store_true", help="a shape or two an op; a minute in all"
    )
    parser.add_argument("--mode", choices=("forward", "full", "all"), default="all")
    parser.add_argument("--json", action="store_true", help="save DIR/cpu-<op>.json")
    parser.add_argument("--csv", action="store_true", help="save DIR/cpu-<op>.csv, Liger's columns")
    parser.add_argument("--plot", action="store_true", help="save DIR/cpu-<op>.png")
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path("bench_output"))
    parser.add_argument("--threads", metavar="N", type=int, help="default: torch's own choice")
    parser.add_argument(
        "--layers", metavar="N", type=int, default=3, help="of the vision tower's 27 (default: 3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, help=argparse.SUPPRESS)


def bench_module(name: str) -> Any:
    """A module of ``keye_ops.bench``: of the checkout that this package lies in, or installed.

    Raises:
        ImportError: neither is there.
    """
    folder = Path(__file__).resolve().parent.parent / "bench"
    if "keye_ops.bench" not in sys.modules and (folder / "harness.py").is_file():
        # A checkout that is used without being installed, or beside an installed other one.
        spec = importlib.util.spec_from_file_location("keye_ops.bench", folder / "__init__.py")
        package = importlib.util.module_from_spec(spec)
        sys.modules["keye_ops.bench"] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"keye_ops.bench.{name}")


def run(arguments: argparse.Namespace) -> int:
    """Time, print and save.

    Raises:
        ValueError: an op without a benchmark, or a number that is not positive.
        ImportError: tqdm is not installed, or matplotlib where a plot is wanted.
    """
    for name in ("threads", "layers", "rounds"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    resolve_device(arguments.device)
    if arguments.threads is None:
        return bench_module("suite").run(arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        return bench_module("suite").run(arguments)
    finally:
        torch.set_num_threads(before)
