"""The pass of linear_gelu on numpy arrays, launched past the op's checks, against fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from selftest_kernels import Launch, from_bf16, to_bf16

FLOAT, HALF, BFLOAT16 = range(3)
EPSILON = {FLOAT: 2.0**-23, HALF: 2.0**-10, BFLOAT16: 2.0**-7}
THREADS, VECTORS = 256, 4
BLOCK = {FLOAT: THREADS * VECTORS * 4, HALF: THREADS * VECTORS * 8, BFLOAT16: THREADS * VECTORS * 8}


@dataclass(frozen=True)
class Case:
    """One launch of a number of values."""

    numel: int
    dtype: int = BFLOAT16
    tanh: bool = False
    backward: bool = False
    in_place: bool = False


FORMS = [(tanh, backward) for tanh in (False, True) for backward in (False, True)]
CASES = [
    *(Case(1213, dtype, *form) for dtype in (FLOAT, HALF, BFLOAT16) for form in FORMS),
    *(Case(BLOCK[dtype] + 4 * THREADS + 3, dtype) for dtype in (FLOAT, HALF)),
    Case(BLOCK[BFLOAT16] + 13, backward=True),
    Case(BLOCK[BFLOAT16], tanh=True, in_place=True),
    Case(2 * BLOCK[FLOAT] + 1, FLOAT, in_place=True),
    *(Case(numel, BFLOAT16, True, True) for numel in (1, 7, 8)),
    *(Case(numel, FLOAT) for numel in (3, 4, 5)),
    Case(15, HALF, backward=True),
]


class LinearGelu:
    """Arguments and expected results of a case."""

    def __init__(self, executor: ModuleType, case: Case) -> None:
        rng = np.random.default_rng(case.numel + case.dtype)
        self.executor, self.case = executor, case
        self.hidden = self.store(3 * rng.standard_normal(case.numel))
        self.dout = self.store(rng.standard_normal(case.numel))
        self.want = self._want()
        self.out = self.hidden if case.in_place else np.zeros_like(self.hidden)

    def store(self, values: np.ndarray) -> np.ndarray:
        """As the kernel's dtype."""
        if self.case.dtype == BFLOAT16:
            return to_bf16(values)
        return values.astype(np.float32 if self.case.dtype == FLOAT else np.float16)

    def load(self, stored: np.ndarray) -> np.ndarray:
        """As fp64."""
        values = from_bf16(stored) if self.case.dtype == BFLOAT16 else stored
        return values.astype(np.float64)

    def launch(self) -> Launch:
        """One launch of the case."""
        case = self.case
        inputs = {} if case.in_place else {"hidden": self.hidden}
        inputs |= {"dout": self.dout} if case.backward else {}
        results = "inouts" if case.in_place else "outputs"
        arguments = {
            "inputs": inputs, results: {"out": self.out},
            "numbers": {"numel": case.numel, "tanh": case.tanh, "dtype": case.dtype},
            "grid": [-(-case.numel // BLOCK[case.dtype])], "block": [THREADS],
        }  # fmt: skip
        return Launch("linear_gelu", arguments, self.is_right, self.executor.free_all)

    def is_right(self) -> bool:
        """Whether the results are those of the formula, up to rounding."""
        rtol = 0.51 * EPSILON[self.case.dtype] + 2e-5
        return bool(np.allclose(self.load(self.out), self.want, rtol=rtol, atol=2.0**-24))

    def _want(self) -> np.ndarray:
        x = self.load(self.hidden)
        if self.case.tanh:
            scale = math.sqrt(2 / math.pi)
            gate = 1 / (1 + np.exp(-2 * scale * (x + 0.044715 * x**3)))
            slope = 2 * scale * (1 + 3 * 0.044715 * x**2) * gate * (1 - gate)
        else:
            gate = np.array([0.5 * math.erfc(-one / math.sqrt(2)) for one in x])
            slope = np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
        return self.load(self.dout) * (gate + x * slope) if self.case.backward else x * gate


def launches(executor: ModuleType) -> list[Any]:
    """Functions that make the launch of each case."""
    return [lambda case=case: LinearGelu(executor, case).launch() for case in CASES]
