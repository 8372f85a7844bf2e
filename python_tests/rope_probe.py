"""The rope kernel on numpy arrays, launched past the op's checks, against its formula in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from selftest_kernels import ERROR_WORD, Launch, from_bf16, to_bf16

ROTATE, NORM_ROTATE, NORM_BACKWARD = range(3)
FLOAT, HALF, BFLOAT16 = range(3)
EPSILON = {FLOAT: 2.0**-23, HALF: 2.0**-10, BFLOAT16: 2.0**-7}
MAX_POSITION = 2**24 - 1
HOSTILE = ("positions", "frequencies", "axes")


@dataclass(frozen=True)
class Case:
    """One launch; by default of the vision tower's shape."""

    mode: int = ROTATE
    dtype: int = BFLOAT16
    total: int = 5
    heads: tuple[int, int] = (3, 3)
    head_dim: int = 72
    num_axes: int = 2
    interleaved: bool = False
    inverse: bool = False
    int64: bool = True
    norm_eps: float = 1e-6
    rows_per_item: int = 6
    grid: int = 2
    far: bool = False  # tokens of q lie 2**31 elements apart
    largest_position: int = 5000
    hostile: tuple[str, ...] = ()  # of HOSTILE, what the kernel must clamp


CASES = [
    *(Case(dtype=dtype) for dtype in (FLOAT, HALF, BFLOAT16)),
    Case(heads=(5, 2), head_dim=128, num_axes=3, rows_per_item=7, largest_position=MAX_POSITION),
    Case(interleaved=True, inverse=True, int64=False),
    Case(interleaved=True, dtype=FLOAT, head_dim=8, heads=(9, 4), total=3, rows_per_item=13),
    Case(heads=(16, 16), rows_per_item=11, total=3, grid=1),
    Case(heads=(1, 0), rows_per_item=1, total=1, grid=1, num_axes=1),
    Case(dtype=HALF, head_dim=256, heads=(2, 1), rows_per_item=3, num_axes=4),
    Case(far=True, total=2),
    *(Case(hostile=(each,)) for each in HOSTILE),
    Case(hostile=HOSTILE, mode=NORM_ROTATE, interleaved=True, dtype=FLOAT, int64=False),
    *(Case(mode=NORM_ROTATE, dtype=dtype, norm_eps=1e-1) for dtype in (FLOAT, HALF, BFLOAT16)),
    Case(mode=NORM_ROTATE, heads=(5, 2), head_dim=128, num_axes=3, rows_per_item=7, grid=1),
    Case(mode=NORM_ROTATE, interleaved=True, heads=(17, 3), head_dim=64, rows_per_item=9),
    *(Case(mode=NORM_BACKWARD, dtype=dtype, norm_eps=1e-1) for dtype in (FLOAT, HALF, BFLOAT16)),
    Case(mode=NORM_BACKWARD, heads=(5, 2), head_dim=128, num_axes=3, rows_per_item=7),
    Case(mode=NORM_BACKWARD, interleaved=True, dtype=FLOAT, head_dim=64, heads=(9, 2),
         rows_per_item=11, total=11, grid=1),
]  # fmt: skip


class Rope:
    """Arguments and expected results of a case."""

    def __init__(self, executor: ModuleType, case: Case, seed: int = 0) -> None:
        rng = np.random.default_rng(seed + case.head_dim + case.total)
        self.executor, self.case = executor, case
        shapes = [(case.total, heads, case.head_dim) for heads in case.heads]
        self.x = [self.store(rng.standard_normal(shape)) for shape in shapes]
        self.dout = [self.store(rng.standard_normal(shape)) for shape in shapes]
        self.weight = [self.store(1 + rng.standard_normal(case.head_dim) / 4) for _ in range(2)]
        self.out = [np.zeros(shape, self.x[0].dtype) for shape in shapes]
        self.error = np.zeros(1, ERROR_WORD)
        warps = case.grid * 4
        self.dweight = [np.zeros((warps, case.head_dim), np.float32) for _ in range(2)]
        integer = np.int64 if case.int64 else np.int32
        size = (case.num_axes, case.total)
        self.positions = rng.integers(0, case.largest_position, size, endpoint=True).astype(integer)
        self.positions[0, 0] = case.largest_position
        pairs = case.head_dim // 2
        self.inv_freq = (10000.0 ** -np.linspace(0, 0.95, pairs)).astype(np.float32)
        self.axis = rng.integers(0, case.num_axes, pairs).astype(np.int32)
        self.reports = [] if case.hostile else [(0, 0)]
        if "positions" in case.hostile:
            self.positions[0, 0], self.positions[-1, -1] = -5, 2**31 - 1
            self.positions[0, -1] = np.iinfo(integer).min
            self.reports += [(1, -5), (1, 2**31 - 1), (1, np.iinfo(integer).min)]
        if "frequencies" in case.hostile:
            self.inv_freq[1], self.inv_freq[2] = -1, 7
            self.reports += [(2, -1), (2, 7)]
        if "axes" in case.hostile:
            self.axis[0], self.axis[3] = -9, 1000
            self.reports += [(3, -9), (3, 1000)]

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
        inputs = {"position_ids": self.positions, "inv_freq": self.inv_freq, "axis": self.axis}
        inputs |= {} if case.far else {"q": self.x[0]}
        inputs |= {"k": self.x[1]}
        outputs = {"out_q": self.out[0], "out_k": self.out[1]}
        if case.mode != ROTATE:
            inputs |= {"q_norm_weight": self.weight[0], "k_norm_weight": self.weight[1]}
        if case.mode == NORM_BACKWARD:
            inputs |= {"dq": self.dout[0], "dk": self.dout[1]}
            outputs |= {"dq_norm_weight": self.dweight[0], "dk_norm_weight": self.dweight[1]}
        strides = [heads * case.head_dim for heads in case.heads]
        addresses: dict[str, int] = {}
        if case.far:
            strides[0] = 2**31 + 8
            addresses["q"] = self._far_q(strides[0])
        rows = sum(case.heads)
        numbers = {
            "total": case.total, "head_dim": case.head_dim, "num_axes": case.num_axes,
            "q_heads": case.heads[0], "k_heads": case.heads[1],
            "q_stride_token": strides[0], "k_stride_token": strides[1],
            "norm_eps": case.norm_eps, "position_is_int64": case.int64,
            "interleaved": case.interleaved,
            "inverse": case.inverse != (case.mode == NORM_BACKWARD),
            "mode": case.mode, "dtype": case.dtype, "rows_per_item": case.rows_per_item,
            "items_per_token": -(-rows // case.rows_per_item),
        }  # fmt: skip
        arguments = {
            "inputs": inputs, "outputs": outputs, "inouts": {"error_word": self.error},
            "addresses": addresses, "numbers": numbers, "grid": [case.grid], "block": [128],
        }  # fmt: skip
        return Launch("rope", arguments, self.is_right, self.executor.free_all)

    def _far_q(self, stride: int) -> int:
        size, tokens = self.x[0].itemsize, self.case.total
        row = self.x[0][0].nbytes
        role = self.executor.Role.input
        address = self.executor.allocate("q", (tokens - 1) * stride * size + row, role)
        for token in range(tokens):
            self.executor.poke(address + token * stride * size, self.x[0][token].tobytes())
        return address

    def is_right(self) -> bool:
        """Whether the outputs are those of the formula, up to rounding, and the report is right."""
        word = self.error[0]
        reported = (word["code"], word["value"]) in self.reports
        return reported and all(self._tensor_is_right(i) for i in range(2))

    def _tensor_is_right(self, i: int) -> bool:
        case, x, weight = self.case, self.load(self.x[i]), self.load(self.weight[i])
        rstd = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + case.norm_eps)
        if case.mode == NORM_BACKWARD:
            dy = self._rotated(self.load(self.dout[i]), not case.inverse)
            normed, weighted = x * rstd, dy * weight
            want = rstd * (weighted - normed * (weighted * normed).mean(-1, keepdims=True))
            dweight = (dy * normed).sum((0, 1))
            if not np.allclose(self.dweight[i].sum(0), dweight, rtol=1e-4, atol=1e-4):
                return False
        else:
            y = x * rstd * weight if case.mode == NORM_ROTATE else x
            want = self._rotated(y, case.inverse)
        got, epsilon = self.load(self.out[i]), EPSILON[case.dtype]
        return bool(np.allclose(got, want, rtol=epsilon, atol=8e-6 + epsilon / 64))

    def _rotated(self, x: np.ndarray, inverse: bool) -> np.ndarray:
        positions = np.clip(self.positions.astype(np.int64), 0, MAX_POSITION).astype(np.float32)
        frequency = np.clip(self.inv_freq, 0, 1)
        axis = np.clip(self.axis, 0, self.case.num_axes - 1)
        # The angle keeps its fp32 rounding, as in the published models.
        angle = (positions[axis].T * frequency).astype(np.float64)[:, None]
        cos, sin = np.cos(angle), np.sin(angle) * (-1 if inverse else 1)
        out, half = np.empty_like(x), self.case.head_dim // 2
        first = np.s_[..., 0::2] if self.case.interleaved else np.s_[..., :half]
        second = np.s_[..., 1::2] if self.case.interleaved else np.s_[..., half:]
        out[first] = x[first] * cos - x[second] * sin
        out[second] = x[second] * cos + x[first] * sin
        return out


def launches(executor: ModuleType) -> list[Any]:
    """Functions that make the launch of each case."""
    return [lambda case=case: Rope(executor, case).launch() for case in CASES]
