"""The pass of linear_gelu on numpy arrays, past the op's checks, against its formula in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from selftest_kernels import Launch, from_bf16, to_bf16

FLOAT, HALF, BFLOAT16 = range(3)
EPSILON = {FLOAT: 2.0**-20, HALF: 2.0**-10, BFLOAT16: 2.0**-7}
THREADS = 256
erfc = np.vectorize(math.erfc)


@dataclass(frozen=True)
class Case:
    """One launch."""

    dtype: int = BFLOAT16
    numel: int = 61
    tanh: bool = False
    backward: bool = False
    in_place: bool = False

    def num_blocks(self) -> int:
        """Of four vectors a thread."""
        values = (4 if self.dtype == FLOAT else 8) * 4 * THREADS
        return -(-self.numel // values)


CASES = [
    *(Case(dtype, 61, tanh, backward) for dtype in (FLOAT, HALF, BFLOAT16)
      for tanh in (False, True) for backward in (False, True)),
    Case(numel=1),
    Case(numel=8, backward=True),
    Case(FLOAT, 3),
    Case(FLOAT, 4 * 1024 + 2, backward=True),
    Case(numel=8 * 1024, in_place=True),
    Case(HALF, 8 * 1024 + 8 * 300 + 7, in_place=True, tanh=True),
]  # fmt: skip


def gate(x: np.ndarray, tanh: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of gelu(x) = x * value: the value and its derivative."""
    if not tanh:
        return erfc(-x / math.sqrt(2)) / 2, np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    u = 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    value = 1 / (1 + np.exp(-np.clip(u, -700, 700)))
    slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return value, value * (1 - value) * slope


class Pass:
    """Arguments and expected results of a case."""

    def __init__(self, executor: ModuleType, case: Case, seed: int = 0) -> None:
        rng = np.random.default_rng(seed + case.numel)
        self.executor, self.case = executor, case
        values = rng.standard_normal(case.numel) * 2
        values[rng.random(case.numel) < 0.1] *= 20
        self.hidden, self.dout = self.store(values), self.store(rng.standard_normal(case.numel))
        self.out = self.hidden.copy() if case.in_place else np.zeros_like(self.hidden)

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
        numbers = {"numel": case.numel, "tanh": int(case.tanh), "dtype": case.dtype}
        arguments = {
            "inputs": inputs, "outputs": {} if case.in_place else {"out": self.out},
            "inouts": {"out": self.out} if case.in_place else {}, "addresses": {},
            "numbers": numbers, "grid": [case.num_blocks()], "block": [THREADS],
        }  # fmt: skip
        return Launch("linear_gelu", arguments, self.is_right, self.executor.free_all)

    def is_right(self) -> bool:
        """Whether the values are those of the formula, up to rounding."""
        x, got, epsilon = self.load(self.hidden), self.load(self.out), EPSILON[self.case.dtype]
        value, slope = gate(x, self.case.tanh)
        want, size = x * value, 1.0
        if self.case.backward:
            # The derivative is a difference where it is near 0.
            dout = self.load(self.dout)
            want, size = dout * (value + x * slope), np.maximum(1, np.abs(dout))
        return bool(np.all(np.abs(got - want) <= epsilon * (np.abs(want) + size / 8)))


def launches(executor: ModuleType) -> list[Any]:
    """Functions that make the launch of each case."""
    return [lambda case=case: Pass(executor, case).launch() for case in CASES]
