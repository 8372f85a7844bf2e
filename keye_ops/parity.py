"""``keye-ops parity``: agreement with code of other authors, as a table."""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from keye_ops import dispatch

HELP = "Compare ops, model and processing with transformers and torch in fp32, on the CPU."
_SEED = 1  # other than that of the random weights, whose first tensors would be the input


@dataclass(frozen=True)
class Comparison:
    """One row of the table.

    Attributes:
        op: what of ours is compared.
        oracle: what it is compared with, a class or function of transformers or torch.
        tolerance: greatest error allowed, relative.
        error: computes the error; draws its input from torch's global generator.
        arguments: of ``error``.
    """

    op: str
    oracle: str
    tolerance: float
    error: Callable[..., float]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Result:
    """The errors of one comparison.

    Attributes:
        comparison: what was compared.
        reference_error: with the reference of every op.
        native_error: with native kernels where they are, or None if none of them ran.
        native_ops: the ops whose native kernels ran; the rest of the comparison ran references.
    """

    comparison: Comparison
    reference_error: float
    native_error: float | None
    native_ops: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every error is within the tolerance; NaN is not."""
        errors = [self.reference_error]
        errors += [] if self.native_error is None else [self.native_error]
        return all(error <= self.comparison.tolerance for error in errors)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "op": self.comparison.op,
            "oracle": self.comparison.oracle,
            "tolerance": self.comparison.tolerance,
            "reference_error": self.reference_error,
            "native_error": self.native_error,
            "native_ops": list(self.native_ops),
            "passed": self.passed,
        }


def relative_error(
    got: torch.Tensor | Sequence[torch.Tensor], want: torch.Tensor | Sequence[torch.Tensor]
) -> float:
    """Largest absolute difference over the oracle's largest absolute value, in fp64.

    Of several tensors, the largest; NaN where one holds NaN, infinite where shapes differ.
    """
    if isinstance(got, torch.Tensor):
        got, want = [got], [want]
    errors = []
    for one_got, one_want in zip(got, want, strict=True):
        if one_got.shape != one_want.shape:
            return math.inf
        one_got, one_want = one_got.double(), one_want.double()
        errors.append((one_got - one_want).abs().max() / one_want.abs().max())
    return float(torch.stack(errors).max())


def transformers_module(name: str) -> Any:
    """A module of ``transformers.models``.

    Raises:
        ImportError: transformers is not installed, or a version without it.
    """
    try:
        return importlib.import_module(f"transformers.models.{name}")
    except ImportError as error:
        message = f'parity needs transformers: pip install "keye-ops[test]" ({error})'
        raise ImportError(message) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def compare(comparison: Comparison) -> Result:
    """Run a comparison with references, then with native kernels, on the same input.

    Raises:
        ImportError: transformers or Pillow is not installed.
    """
    reference_error = _error(comparison, "reference")
    before = _last_native()
    native_error = _error(comparison, "auto")
    # The first run left "reference" as the last dispatch of every op that the comparison calls.
    native_ops = tuple(sorted(_last_native() - before))
    return Result(comparison, reference_error, native_error if native_ops else None, native_ops)


def _error(comparison: Comparison, mode: str) -> float:
    with torch.random.fork_rng(devices=[]), torch.no_grad(), dispatch.backend(mode):
        torch.manual_seed(_SEED)
        return comparison.error(*comparison.arguments)


def _last_native() -> set[str]:
    return {last.op for last in dispatch.dispatches() if last.implementation == "native"}


def run(arguments: argparse.Namespace) -> int:
    """Print the table, or JSON; returns 1 if an error exceeds its tolerance.

    Raises:
        ImportError: transformers, Pillow or tqdm is not installed.
    """
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError('parity needs tqdm: pip install "keye-ops[test]"') from error
    from keye_ops import parity_oracles

    transformers_module("paddleocr_vl")  # if it is missing, say so before the bar appears
    rows = tqdm(parity_oracles.COMPARISONS, "parity", leave=False)
    results = [compare(comparison) for comparison in rows]
    passed = sum(result.passed for result in results)
    if arguments.json:
        _print_json(results)
    else:
        _print_table(results)
        print(f"{passed} of {len(results)} comparisons are within their tolerance.")
    return 0 if passed == len(results) else 1


def _print_json(results: list[Result]) -> None:
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    comparisons = [result.as_dict() for result in results]
    print(json.dumps({**versions, "comparisons": comparisons}, indent=2))


def _print_table(results: list[Result]) -> None:
    from keye_ops.table import print_table

    columns = ["op", "oracle", "reference", "native", "kernels", "tolerance", "verdict"]
    rows = [
        [
            result.comparison.op,
            result.comparison.oracle,
            _number(result.reference_error),
            _number(result.native_error),
            " ".join(result.native_ops) or "-",
            _number(result.comparison.tolerance),
            "ok" if result.passed else "FAILED",
        ]
        for result in results
    ]
    print_table("Relative error (largest difference / largest value), fp32", columns, rows)


def _number(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"
