"""The kernel vocabulary on two machines: the same bits into every twin, and what comes out compared.

The twins are the kernels of ``csrc/host_executor/twin``; a machine is the host executor, a GPU, or
whatever has a ``twins`` list and a method ``run``.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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


class Host:
    """The host executor, built in a folder."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        (path,) = folder.glob("_host_executor*.so")
        spec = importlib.util.spec_from_file_location("_host_executor", path)
        self.executor = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.executor)
        library = str(folder / "host_cuda_twin.so")
        self.executor.load_library(library)
        twin_list = ctypes.CDLL(library).twin_list
        twin_list.restype = ctypes.c_char_p
        self.twins = parse(twin_list().decode())
        self.schedule = self.executor.Schedule(seed=seed)

    def run(self, twin: Twin, words: np.ndarray) -> np.ndarray:
        """The output of one launch.

        Raises:
            RuntimeError: the executor has findings.
        """
        out = np.zeros(twin.out_words, np.uint32)
        report = self.executor.launch(
            f"twin {twin.name}",
            inputs={"in": words},
            inouts={"out": out},
            grid=twin.grid,
            block=[twin.num_threads],
            cluster=[twin.cluster_size],
            shared_bytes=twin.shared_bytes,
            schedule=self.schedule,
        )
        if report.findings:
            raise RuntimeError(f"{twin.name} must have no findings, got\n{report.text()}")
        return out


class Gpu:
    """The current GPU, by the library that nvcc made.

    Raises:
        RuntimeError: there is none.
    """

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        for name in ("twin_list", "twin_run", "selftest_run"):
            getattr(self.library, name).restype = ctypes.c_char_p
        text = self.library.twin_list()
        if text is None:
            raise RuntimeError("the twins need a GPU, got none")
        self.twins = parse(text.decode())

    def run(self, twin: Twin, words: np.ndarray) -> np.ndarray:
        """The output of one launch.

        Raises:
            RuntimeError: CUDA reports an error.
        """
        out = np.zeros(twin.out_words, np.uint32)
        error = self.library.twin_run(twin.name.encode(), address(words), address(out))
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


def wrong(twin: Twin, label: str, a: np.ndarray, b: np.ndarray, magnitude: Any) -> np.ndarray:
    """Where outputs differ by more than the twin's rule allows.

    ``magnitude`` gives the sums of the magnitudes of products.
    """
    if twin.rule == "exact":
        return a != b
    x, y = a.view(np.float32).astype(np.float64), b.view(np.float32).astype(np.float64)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    if twin.rule == "sum":
        with np.errstate(invalid="ignore"):
            close = np.abs(x - y) <= SUM_TOLERANCE * magnitude()
        return ~(same if label == "integers" else same | close)
    # Results near the smallest normal number may have become zeros on one side.
    tiny = np.finfo(np.float32).tiny
    with np.errstate(invalid="ignore"):
        larger = np.maximum(np.maximum(np.abs(x), np.abs(y)), tiny)
        spacing = np.ldexp(1.0, np.frexp(np.where(np.isfinite(larger), larger, 1.0))[1] - 24)
        close = (np.abs(x - y) <= ULPS[twin.rule] * spacing) | (larger <= tiny * (1 + 2.0**-21))
    return ~(same | close)


def compare(
    first: Any, second: Any, twins: Iterable[Twin], seed: int = 0, stop: Callable = lambda: False
) -> Comparison:
    """Run twins on two machines.

    Args:
        first, second: machines; ``second.run`` may return None for what it does not know.
        twins: which.
        seed: of the inputs.
        stop: called before every twin; true ends the comparison.
    """
    result = Comparison()
    for twin in twins:
        if stop():
            break
        for label, words in inputs(twin, seed):
            try:
                b = second.run(twin, words)
                if b is None:
                    continue
                a = first.run(twin, words)
            except RuntimeError as error:
                result.mismatches.append(Mismatch(twin.name, label, 1, str(error)))
                continue
            finally:
                result.cases[twin.function] += 1
            # The sum of magnitudes is the output for the same input without signs.
            bad = wrong(
                twin,
                label,
                a,
                b,
                lambda twin=twin, words=words: (
                    first.run(twin, words & 0x7FFF7FFF).view(np.float32).astype(np.float64)
                ),
            )
            if bad.any():
                at = int(bad.argmax())
                detail = f"word {at}: {a[at]:#010x} and {b[at]:#010x}"
                result.mismatches.append(Mismatch(twin.name, label, int(bad.sum()), detail))
    return result
