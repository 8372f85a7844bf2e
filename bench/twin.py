"""The kernel vocabulary on two machines: every twin gets the same bits, and outputs are compared.

The twins are the kernels of ``csrc/host_executor/twin``; a machine is the host executor, a GPU, or
whatever has a ``twins`` list and a method ``run``.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# How far sums of products may be apart, as a part of the sum of their magnitudes. Integers that
# fp32 holds must be exact.
SUM_TOLERANCE = 2.0**-18
# Of the approximations: two roundings of a correctly rounded result may differ by this.
ULPS = {"ulp1": 1, "ulp2": 2}
SPECIAL_FLOATS = np.array(
    # Zeros, infinities, NaNs, the smallest and largest numbers, one, ties of bf16 and of fp16, the
    # borders of fp16: the largest, overflow, the smallest normal and subnormal and half of it.
    [
        *(0x00000000, 0x7F800000, 0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0x00000001, 0x007FFFFF),
        *(0x00800000, 0x7F7FFFFF, 0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF),
        *(0x3F801000, 0x3F803000, 0x3F801001, 0x3F800FFF, 0x477FE000, 0x477FEFFF, 0x477FF000),
        *(0x38800000, 0x387FC000, 0x387FE000, 0x33800000, 0x33000000, 0x33000001, 0x33C00000),
        *(0x7F7F7FFF, 0x7F7F8000, 0x42FE0000, 0x43000000, 0x42FC0000, 0x43160000, 0x00008000),
    ],
    np.uint32,
)


@dataclass(frozen=True)
class Twin:
    """A kernel: what it is fed with, how it is launched, and how alike its outputs must be."""

    name: str
    in_words: int
    out_words: int
    data: str
    rule: str
    num_threads: int
    shared_bytes: int
    cluster_size: int
    grid: tuple[int, ...]
    swizzle: int
    element_size: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    coords: tuple[int, ...]

    @property
    def function(self) -> str:
        """The function of the kernel vocabulary that it is about."""
        return self.name.split()[0]


def parse(text: str) -> list[Twin]:
    """Twins as a library lists them."""

    def value(annotation: str, word: str) -> Any:
        if annotation == "str":
            return word
        return int(word) if annotation == "int" else tuple(map(int, filter(None, word.split(","))))

    kinds = Twin.__annotations__.values()
    lines = [line.split("\t") for line in text.splitlines()]
    return [Twin(*(value(*pair) for pair in zip(kinds, line, strict=True))) for line in lines]


# ---- machines ----


class Machine:
    """The host executor (``host_cuda_twin.so``, beside the executor) or a GPU (``twin_cuda.so``).

    Args:
        path: of the library.
        seed: of the executor's schedule.

    Raises:
        OSError: the library does not load.
        RuntimeError: there is no GPU.
    """

    def __init__(self, path: Path, seed: int = 0) -> None:
        executor = path.with_name("libhost_executor.so")
        # NOTE: the executor first, so that it binds its own copies of inline functions, not those
        # of the kernels, which are instrumented.
        if path.name.startswith("host") and executor.exists():
            ctypes.CDLL(str(executor))
        self.library, self.seed = ctypes.CDLL(str(path)), ctypes.c_uint64(seed)
        self.library.twin_list.restype = self.library.twin_run.restype = ctypes.c_char_p
        text = self.library.twin_list()
        if text is None:
            raise RuntimeError("the twins need a GPU, got none")
        self.twins = parse(text.decode())

    def run(self, twin: Twin, words: np.ndarray) -> np.ndarray:
        """The output of one launch.

        Raises:
            RuntimeError: the executor has findings, or CUDA reports an error.
        """
        out = np.zeros(twin.out_words, np.uint32)
        name = twin.name.encode()
        error = self.library.twin_run(name, address(words), address(out), self.seed)
        if error is not None:
            raise RuntimeError(f"{twin.name}: {error.decode()}")
        return out


def address(array: np.ndarray) -> ctypes.c_void_p:
    """Of the first element, for C."""
    return ctypes.c_void_p(array.ctypes.data)


# ---- inputs ----


def to_bf16(values: np.ndarray) -> np.ndarray:
    """The bits of finite values, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def inputs(twin: Twin, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Labelled inputs, which depend on the seed and the twin alone."""
    rng = np.random.default_rng([seed, *twin.name.encode()])
    count = twin.in_words
    if twin.data in ("bf16", "fp16"):
        for label in ("floats", "integers"):
            if label == "floats":
                values = rng.standard_normal(2 * count, np.float32)
            else:
                values = rng.integers(-8, 9, 2 * count).astype(np.float32)
            half = to_bf16(values) if twin.data == "bf16" else values.astype(np.float16)
            yield label, half.view(np.uint32)
        return
    words = rng.integers(0, 2**32, count, np.uint32)
    if twin.data == "floats":
        special = np.concatenate([SPECIAL_FLOATS, SPECIAL_FLOATS | 0x80000000])
        words[: special.size] = special
        moderate = rng.uniform(-20, 20, count // 2).astype(np.float32)
        words[-moderate.size :] = moderate.view(np.uint32)
    yield twin.data, words


# ---- comparison ----


@dataclass(frozen=True)
class Mismatch:
    """What two machines disagree about."""

    twin: str
    label: str
    count: int
    detail: str


@dataclass
class Comparison:
    """How many cases were compared, by function, and where the machines differ."""

    cases: Counter[str] = field(default_factory=Counter)
    mismatches: list[Mismatch] = field(default_factory=list)


def wrong(
    twin: Twin, a: np.ndarray, b: np.ndarray, magnitude: np.ndarray | None = None
) -> np.ndarray:
    """Where outputs differ by more than the twin's rule allows.

    ``magnitude`` holds the sums of the magnitudes of products; without it sums must be equal.
    """
    if twin.rule == "exact":
        return a != b
    with np.errstate(invalid="ignore"):
        x, y = (words.view(np.float32).astype(np.float64) for words in (a, b))
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        if twin.rule == "sum":
            tolerance = 0.0 if magnitude is None else SUM_TOLERANCE * magnitude.astype(np.float64)
            return ~(same | (np.abs(x - y) <= tolerance))
    # Results near the smallest normal number may have become zeros on one side.
    tiny = np.finfo(np.float32).tiny
    with np.errstate(invalid="ignore"):
        larger = np.maximum(np.maximum(np.abs(x), np.abs(y)), tiny)
        spacing = np.ldexp(1.0, np.frexp(np.where(np.isfinite(larger), larger, 1.0))[1] - 24)
        close = (np.abs(x - y) <= ULPS[twin.rule] * spacing) | (larger <= tiny * (1 + 2.0**-21))
    return ~(same | close)


def compare(first: Any, second: Any, twins: Iterable[Twin], seed: int = 0) -> Comparison:
    """Run twins on two machines, of which the first tells how large sums of products are.

    Args:
        first, second: machines.
        twins: which.
        seed: of the inputs.
    """
    result = Comparison()
    for twin in twins:
        for label, words in inputs(twin, seed):
            result.cases[twin.function] += 1
            try:
                a, b = first.run(twin, words), second.run(twin, words)
                magnitude = None
                if twin.rule == "sum" and label == "floats":
                    # The same products without their signs.
                    magnitude = first.run(twin, words & 0x7FFF7FFF).view(np.float32)
            except RuntimeError as error:
                result.mismatches.append(Mismatch(twin.name, label, 1, str(error)))
                continue
            bad = wrong(twin, a, b, magnitude)
            if bad.any():
                at = int(bad.argmax())
                detail = f"word {at}: {a[at]:#010x} and {b[at]:#010x}"
                result.mismatches.append(Mismatch(twin.name, label, int(bad.sum()), detail))
    return result
