"""The executor's own kernels on numpy arrays: shapes, launches, and the right numbers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


def load(folder: Path) -> ModuleType:
    """The executor's module from a build folder."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module("_host_executor")


def to_bf16(x: np.ndarray) -> np.ndarray:
    """The bits of fp32 values rounded to bf16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The values of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


ERROR_WORD = np.dtype([("code", np.uint32), ("unused", np.uint32), ("value", np.float64)])


@dataclass
class Launch:
    """Arguments of a launch by name, and what must come out."""

    kernel: str
    arguments: dict[str, Any]
    is_right: Callable[[], bool]
    cleanup: Callable[[], None] = field(default=lambda: None)

    def run(self, executor: ModuleType, schedule: Any) -> tuple[Any, bool]:
        """The report, and whether the numbers are right."""
        try:
            report = executor.launch(self.kernel, **self.arguments, schedule=schedule)
            return report, self.is_right()
        finally:
            self.cleanup()


def gemm_mma(executor: ModuleType, m: int, n: int, k: int, seed: int = 0) -> Launch:
    """C = A B^T through cp.async, ldmatrix and mma.sync; k a multiple of 8."""
    a, b = _operands(m, n, k, seed)
    c = np.zeros((m, n), np.float32)
    exact = from_bf16(a).astype(np.float64) @ from_bf16(b).T
    arguments = {
        "inputs": {"a": a, "b": b},
        "outputs": {"c": c},
        "numbers": {"m": m, "n": n, "k": k},
        "grid": [-(-m // 64), -(-n // 64)],
        "block": [128],
        "shared_bytes": 3 * 2 * 64 * 64,
    }
    return Launch("gemm_mma", arguments, lambda: bool(np.allclose(c, exact, atol=1e-4 * k**0.5)))


def gemm_wgmma(executor: ModuleType, m: int, n: int, k: int, seed: int = 0) -> Launch:
    """C = A B^T in bf16 through TMA, mbarriers and wgmma; n and k multiples of 8."""
    a, b = _operands(m, n, k, seed)
    c = np.zeros((m, n), np.uint16)
    exact = from_bf16(a).astype(np.float64) @ from_bf16(b).T
    stages, tile = 4, 64 * 128
    arguments = {
        "inputs": {"a": a, "b": b},
        "outputs": {"c": c},
        "numbers": {"m": m, "n": n, "k": k},
        "grid": [-(-m // 64), -(-n // 64)],
        "block": [160],
        "shared_bytes": stages * 2 * tile + tile + 2 * stages * 8,
    }

    def is_right() -> bool:
        return bool(np.allclose(from_bf16(c), exact, rtol=2**-8, atol=1e-4 * k**0.5))

    return Launch("gemm_wgmma", arguments, is_right)


def cluster_sum(
    executor: ModuleType, rows: int, cluster: int, slice_: int, seed: int = 0
) -> Launch:
    """Sums of rows by clusters; slices of a multiple of 4."""
    x = np.random.default_rng(seed).standard_normal((rows, cluster, slice_)).astype(np.float32)
    out = np.zeros(rows, np.float32)
    arguments = {
        "inputs": {"x": x},
        "outputs": {"out": out},
        "numbers": {"slice": slice_},
        "grid": [rows * cluster],
        "block": [128],
        "cluster": [cluster],
        "shared_bytes": 4 * (4096 + 4 + 8) + 16,
    }
    exact = x.astype(np.float64).sum((1, 2))
    return Launch("cluster_sum", arguments, lambda: bool(np.allclose(out, exact, atol=1e-3)))


def row_sums(
    executor: ModuleType, rows: int, columns: int, x_stride: int = 0, seed: int = 0
) -> Launch:
    """Sums of rows, and of all; rows may lie further apart than memory could hold."""
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    sums, total = np.zeros(rows, np.float32), np.zeros(1, np.float32)
    arrived = np.zeros(1, np.uint32)
    stride = x_stride or columns
    bytes_needed = ((rows - 1) * stride + columns) * 4
    x = executor.allocate("x", bytes_needed, executor.Role.input)
    for row in range(rows):
        executor.poke(x + row * stride * 4, values[row].tobytes())
    arguments = {
        "outputs": {"sums": sums, "total": total},
        "inouts": {"arrived": arrived},
        "addresses": {"x": x},
        "numbers": {"x_stride": stride, "columns": columns},
        "grid": [rows],
        "block": [64],
        "shared_bytes": 12,
    }
    exact = values.astype(np.float64).sum(1)

    def is_right() -> bool:
        good = np.allclose(sums, exact, atol=1e-3) and np.allclose(total, exact.sum(), atol=1e-2)
        return bool(good and arrived[0] == 0)

    return Launch("row_sums", arguments, is_right, executor.free_all)


def _operands(m: int, n: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return to_bf16(rng.standard_normal((m, k))), to_bf16(rng.standard_normal((n, k)))
