"""The norms' kernels on numpy arrays, launched past the ops' checks, against formulas in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from selftest_kernels import ERROR_WORD, Launch, from_bf16, to_bf16

FLOAT, HALF, BFLOAT16 = range(3)
EPSILON = {FLOAT: 2.0**-23, HALF: 2.0**-10, BFLOAT16: 2.0**-7}
CHUNKS = 5  # of a lane, in registers
SCRATCH_BYTES = 288
GRID, OFFSETS = 4, 5  # codes of the error word

Grid = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Case:
    """One launch. The rows of merge_norm are those of its grid."""

    dtype: int = BFLOAT16
    backward: bool = False
    rows: int = 9
    hidden: int = 1152
    warps: int = 1  # of a team
    grid: int = 2
    in_registers: bool = True
    adds: bool = True  # a residual; in the backward dsum
    gap: int = 0  # elements between rows of x
    eps: float = 1e-6
    mean: float = 0.0
    million: bool = False  # the last rows of a million, 2**31 elements and more behind the first
    # Of merge_norm:
    images: Grid = ((1, 4, 6), (2, 2, 4))
    side: int = 2
    block_order: bool = False
    norm_first: bool = True
    offsets: tuple[int, ...] | None = None  # instead of those of the grid
    errors: tuple[tuple[int, float], ...] = ((0, 0.0),)  # code and value; one of them is reported


ADDED = [
    *(Case(dtype=dtype, warps=warps) for dtype, warps in ((FLOAT, 2), (HALF, 1), (BFLOAT16, 1))),
    Case(adds=False, hidden=72, rows=5, gap=8, mean=3.0),
    Case(dtype=FLOAT, adds=False, hidden=132, grid=1, eps=0.3),
    # Where the first sum of a LayerNorm is not exact enough.
    Case(dtype=FLOAT, adds=False, rows=3, warps=2, mean=4096.0),
    Case(rows=3, hidden=2008, warps=2, mean=0.4, gap=16),
    Case(dtype=HALF, rows=4, hidden=800, warps=3, grid=3, adds=False, mean=-20.0),
    Case(dtype=FLOAT, rows=3, hidden=680, warps=2, grid=1, in_registers=False, gap=4),
    Case(rows=2, hidden=1032, warps=1, in_registers=False, adds=False, mean=2.0),
    Case(rows=1, hidden=8, grid=1, eps=1e-2),
    Case(hidden=16, rows=16, million=True),
    *(
        Case(backward=True, dtype=dtype, warps=warps)
        for dtype, warps in ((FLOAT, 2), (HALF, 1), (BFLOAT16, 1))
    ),
    Case(backward=True, adds=False, hidden=72, rows=21, gap=8, mean=3.0),
    Case(backward=True, dtype=FLOAT, hidden=132, grid=1, adds=False, eps=0.3),
    Case(backward=True, dtype=FLOAT, adds=False, rows=3, warps=2, mean=4096.0),
    Case(backward=True, rows=5, hidden=2008, warps=2, mean=0.4, gap=16),
    Case(backward=True, dtype=HALF, rows=5, hidden=800, warps=3, adds=False, mean=-20.0),
    Case(backward=True, dtype=FLOAT, rows=5, hidden=680, warps=2, in_registers=False, gap=4),
    Case(backward=True, rows=5, hidden=1032, warps=1, in_registers=False, adds=False, mean=2.0),
    Case(backward=True, rows=1, hidden=8, grid=2, eps=1e-2),
    Case(backward=True, hidden=16, rows=16, million=True),
]
MANY = tuple((1, 2, 2 + 2 * (i % 3 == 1)) for i in range(70))
MERGED = [
    *(Case(hidden=24, norm_first=first) for first in (True, False)),
    *(Case(hidden=1152, norm_first=first, warps=1 if first else 4) for first in (True, False)),
    Case(dtype=FLOAT, hidden=12, norm_first=False, block_order=True, gap=4),
    Case(dtype=HALF, hidden=40, block_order=True),
    Case(hidden=8, images=((1, 3, 6), (1, 6, 3), (2, 3, 3)), side=3, norm_first=False, gap=8),
    Case(hidden=8, images=((1, 3, 9), (3, 3, 3)), side=3, mean=2.0),
    Case(hidden=16, images=((2, 1, 3), (1, 2, 1)), side=1, norm_first=False),
    Case(hidden=904, warps=3, norm_first=False, images=((2, 4, 4),)),
    Case(hidden=400, warps=2, in_registers=False, norm_first=False, gap=16),
    Case(hidden=24, in_registers=False, dtype=FLOAT),
    *(Case(hidden=16, images=((1, 2, 4),), gap=2**29, norm_first=first, backward=backward)
      for first in (True, False) for backward in (False, True)),
    Case(hidden=8, images=MANY, grid=3),
    Case(hidden=8, images=MANY, grid=3, norm_first=False),
    *(Case(backward=True, hidden=24, norm_first=first) for first in (True, False)),
    *(Case(backward=True, hidden=1152, norm_first=first, warps=1 if first else 4)
      for first in (True, False)),
    Case(backward=True, dtype=FLOAT, hidden=12, norm_first=False, block_order=True, gap=4),
    Case(backward=True, dtype=HALF, hidden=40, block_order=True),
    Case(backward=True, hidden=8, images=((1, 3, 6), (1, 6, 3), (2, 3, 3)), side=3,
         norm_first=False, gap=8),
    Case(backward=True, hidden=904, warps=3, norm_first=False, images=((2, 4, 4),)),
    Case(backward=True, hidden=400, warps=2, in_registers=False, norm_first=False, gap=16),
    Case(backward=True, hidden=24, in_registers=False, dtype=FLOAT),
    Case(backward=True, hidden=8, images=MANY, grid=3, norm_first=False),
    # What only the device sees. Tokens of images that lie are zeros, and so are their gradients.
    *(Case(hidden=16, images=((1, 2, 2), image, (1, 2, 4)), offsets=(0, 4, 20, 28), errors=(error,),
           norm_first=first, backward=backward)
      for first in (True, False) for backward in (False, True)
      for image, error in (
          ((0, 4, 4), (GRID, 0.0)),
          ((-1, -4, 4), (GRID, -1.0)),
          ((1, -4, -4), (GRID, -4.0)),
          ((1, 4, 0), (GRID, 0.0)),
          ((1, 3, 4), (GRID, 3.0)),
          ((1, 4, 5), (GRID, 5.0)),
          ((1, 4, 8), (OFFSETS, 20.0)),
          ((2**31 - 1, 2**31 - 2, 2**31 - 2), (OFFSETS, 20.0)),
          ((1, 2**16, 2**16), (OFFSETS, 20.0)),
          ((2**30, 2, 2), (OFFSETS, 20.0)),
      )),
    *(Case(hidden=16, images=images, offsets=offsets, errors=errors, backward=backward,
           norm_first=False)
      for backward in (False, True)
      for images, offsets, errors in (
          ((), (0,), ((OFFSETS, 0.0),)),  # no image
          # It begins behind the first patch, ends before the last one, and behind that.
          (((1, 2, 2), (1, 4, 4)), (4, 8, 24), ((OFFSETS, 8.0),)),
          (((1, 4, 4), (1, 2, 2)), (0, 16, 20), ((OFFSETS, 20.0),)),
          (((1, 4, 4), (1, 2, 16)), (0, 16, 48), ((OFFSETS, 48.0),)),
          (((1, 4, 4), (1, 2, 4)), (-16, 0, 8), ((OFFSETS, 8.0),)),
          (((1, 2, 3), (1, 2, 8)), (0, 6, 22), ((GRID, 3.0), (OFFSETS, 22.0))),
          (((1, 4, 4), (1, 2, 4)), (2**31 - 1, -(2**31), 24), ((OFFSETS, -(2.0**31)),
                                                               (OFFSETS, 24.0))),
      )),
]  # fmt: skip
HOSTILE_TOTAL = {None: 24, (0, 4, 20, 28): 28}


class Norm:
    """Arguments and expected results of a case."""

    def __init__(self, executor: ModuleType, kernel: str, case: Case, seed: int = 0) -> None:
        self.executor, self.kernel, self.case = executor, kernel, case
        self.rng = np.random.default_rng(seed + case.hidden + case.rows)
        self.merges = kernel == "merge_norm"
        self.error = np.zeros(1, ERROR_WORD)
        if self.merges:
            self._lay_out_merge()
        else:
            self.index = np.arange(case.rows)[:, None]
            self.good = np.ones(case.rows, bool)
        patches, width = self.index.size, self.index.shape[1] * case.hidden
        self.x = self.store(case.mean + self.rng.standard_normal((patches, case.hidden)))
        self.added = self.store(self.rng.standard_normal((patches, case.hidden)))
        self.dout = self.store(self.rng.standard_normal((len(self.index), width)))
        self.weight = self.store(1 + self.rng.standard_normal(width) / 4)
        self.bias = self.store(self.rng.standard_normal(width))
        self.out = self.fill(self.x if case.backward or not self.merges else self.dout)
        self.sum = self.fill(self.x)
        self.partials = [np.zeros((case.grid, width), np.float32) for _ in range(2)]

    def _lay_out_merge(self) -> None:
        """The patches of every row, and which rows are good."""
        case, square = self.case, self.case.side**2
        sums = np.cumsum([0, *(t * h * w for t, h, w in case.images)])
        hostile = case.errors[0][0] != 0
        self.total = HOSTILE_TOTAL.get(case.offsets, 24) if hostile else int(sums[-1])
        self.offsets = np.array(sums if case.offsets is None else case.offsets, np.int32)
        self.sizes = np.array(case.images or [(0, 0, 0)], np.int32)
        self.num_images = len(case.images)
        # In block order, unless an image says something else.
        index = np.arange(self.total).reshape(-1, square)
        good = np.full(len(index), case.block_order)
        for i, (t, h, w) in enumerate(case.images if not case.block_order else ()):
            start, end = (int(x) for x in self.offsets[i : i + 2])
            fits = min(t, h, w) >= 1 and h % case.side == 0 == w % case.side
            fits = fits and 0 <= start <= end <= self.total and start % square == 0
            if not fits or end - start != t * h * w:
                continue
            patches = np.arange(start, end).reshape(t, h // case.side, case.side, -1, case.side)
            tokens = slice(start // square, end // square)
            index[tokens] = patches.transpose(0, 1, 3, 2, 4).reshape(-1, square)
            good[tokens] = True
        self.index, self.good = index, good
        if case.norm_first:
            self.index, self.good = index.reshape(-1, 1), np.repeat(good, square)

    def store(self, values: np.ndarray) -> np.ndarray:
        """As the kernel's dtype."""
        if self.case.dtype == BFLOAT16:
            return to_bf16(values)
        return values.astype(np.float32 if self.case.dtype == FLOAT else np.float16)

    def load(self, stored: np.ndarray) -> np.ndarray:
        """As fp64."""
        values = from_bf16(stored) if self.case.dtype == BFLOAT16 else stored
        return values.astype(np.float64)

    @staticmethod
    def fill(like: np.ndarray) -> np.ndarray:
        """An output of the shape and dtype of an array."""
        return np.full_like(like, 7)

    def launch(self) -> Launch:
        """One launch of the case."""
        case, width = self.case, len(self.weight)
        vector = 4 if case.dtype == FLOAT else 8
        teams = 4 if case.warps == 1 and case.in_registers else 1
        num_threads = teams * case.warps * 32
        stride = case.hidden + case.gap
        num_rows, all_teams = len(self.index), teams * case.grid
        if case.million:
            # Every team goes on with a row of the million's end.
            num_rows, stride, all_teams = 1_000_000, 2**31 // 999_990 // 8 * 8 + 8, 999_991
        addresses = {"x": self._rows("x", self.x, stride, all_teams, self.executor.Role.input)}
        inputs = {"weight": self.weight}
        inouts = {"error_word": self.error} if self.merges else {}
        outputs = {}
        if self.kernel != "add_rms_norm" and not case.backward:
            inputs["bias"] = self.bias
        tensors = {}
        if case.backward:
            tensors["dout" if self.merges else "dnormed"] = self.dout
            outputs |= {"dweight_partial": self.partials[0]}
            if self.kernel != "add_rms_norm":
                outputs |= {"dbias_partial": self.partials[1]}
        if case.adds and not self.merges:
            tensors["dsum" if case.backward else "residual"] = self.added
        result = "dx" if case.backward else "out" if self.merges else "normed"
        results = {result: self.out}
        if case.adds and not case.backward and not self.merges:
            results["sum"] = self.sum
        if case.million:
            for name, rows in tensors.items():
                role = self.executor.Role.input
                addresses[name] = self._rows(name, rows, case.hidden, all_teams, role)
            for name, rows in results.items():
                role = self.executor.Role.inout
                addresses[name] = self._rows(name, rows, case.hidden, all_teams, role)
        else:
            inputs |= tensors
            outputs |= results
        shelf_bytes = num_threads * CHUNKS * 16
        sums_bytes = 2 * CHUNKS * vector * 32 * 4
        shared = sums_bytes + 2 * shelf_bytes if case.backward else SCRATCH_BYTES + shelf_bytes
        numbers = {
            "dtype": case.dtype, "backward": case.backward, "in_registers": case.in_registers,
            "x_stride": stride, "total": num_rows, "hidden": case.hidden, "num_rows": num_rows,
            "num_chunks": width // vector, "num_warps": case.warps, "num_teams": teams,
            "all_teams": all_teams, "eps": case.eps,
        }  # fmt: skip
        if self.merges:
            inputs |= {"grid": self.sizes, "image_offsets": self.offsets}
            numbers |= {
                "total": self.total, "num_images": self.num_images, "side": case.side,
                "block_order": case.block_order, "norm_first": case.norm_first,
                "dout_stride": case.side**2 * case.hidden, "patch_chunks": case.hidden // vector,
            }  # fmt: skip
        arguments = {
            "inputs": inputs, "outputs": outputs, "inouts": inouts, "addresses": addresses,
            "numbers": numbers, "grid": [case.grid], "block": [num_threads],
            "shared_bytes": shared,
        }  # fmt: skip
        self.addresses, self.all_teams = addresses, all_teams

        def is_right() -> bool:
            for name, rows in results.items() if case.million else ():
                self._read(name, rows)
            return self.is_right()

        return Launch(self.kernel, arguments, is_right, self.executor.free_all)

    def _place(self, row: int) -> int:
        """Which of a million rows this is: half of them come after a step of all teams."""
        half = self.case.rows - self.case.rows // 2
        return row if not self.case.million or row < half else self.all_teams + row - half

    def _rows(self, name: str, rows: np.ndarray, stride: int, all_teams: int, role: Any) -> int:
        """Rows in guarded memory; of gaps between them nothing is known."""
        self.all_teams = all_teams
        size, last = rows.itemsize, self._place(len(rows) - 1)
        address = self.executor.allocate(name, last * stride * size + rows[0].nbytes, role)
        for i, row in enumerate(rows):
            self.executor.poke(address + self._place(i) * stride * size, row.tobytes())
        return address

    def _read(self, name: str, rows: np.ndarray) -> None:
        for i, row in enumerate(rows):
            at = self.addresses[name] + self._place(i) * row.nbytes
            row[:] = np.frombuffer(self.executor.peek(at, row.nbytes), row.dtype)

    def is_right(self) -> bool:
        """Whether the outputs are those of the formula, up to rounding, and the report is right."""
        case = self.case
        word = self.error[0]
        if self.merges and (word["code"], word["value"]) not in case.errors:
            return False
        x, w = self.load(self.x), self.load(self.weight)
        if case.adds and not case.backward and not self.merges:
            total = self.store((x + self.load(self.added)).astype(np.float32))
            if not np.array_equal(total, self.sum):
                return False
            x = self.load(total)
        x = x[self.index].reshape(len(self.index), -1)
        centred = x - x.mean(-1, keepdims=True) if self.kernel != "add_rms_norm" else x
        rstd = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + case.eps)
        normed = centred * rstd
        if case.backward:
            return self._gradients_are_right(normed, rstd, w)
        bias = self.load(self.bias) if self.kernel != "add_rms_norm" else 0.0
        want = np.where(self.good[:, None], normed * w + bias, 0.0)
        return self._is_near(self.out.reshape(want.shape), want)

    def _gradients_are_right(self, normed: np.ndarray, rstd: np.ndarray, w: np.ndarray) -> bool:
        case, good = self.case, self.good[:, None]
        dy = self.load(self.dout).reshape(normed.shape)
        weighted = dy * w
        mean = weighted.mean(-1, keepdims=True) if self.kernel != "add_rms_norm" else 0.0
        dx = rstd * (weighted - mean - normed * (weighted * normed).mean(-1, keepdims=True))
        dx = np.where(good, dx, 0.0)
        if case.adds and not self.merges:
            dx = dx + self.load(self.added)
        got = self.out[self.index].reshape(dx.shape)
        # Rows go to blocks by turns.
        places = np.array([self._place(i) for i in range(len(dx))])
        if case.million:
            places = places % self.all_teams
        shares = [good * dy * normed, good * dy][: 1 if self.kernel == "add_rms_norm" else 2]
        for share, partial in zip(shares, self.partials, strict=False):
            for block in range(case.grid):
                want = share[places % case.grid == block].sum(0)
                if not np.allclose(partial[block], want, rtol=1e-4, atol=1e-4):
                    return False
        return self._is_near(got, dx)

    def _is_near(self, got: np.ndarray, want: np.ndarray) -> bool:
        epsilon = EPSILON[self.case.dtype]
        atol = 1e-5 + epsilon / 64
        return bool(np.allclose(self.load(got), want, rtol=epsilon, atol=atol))


@dataclass(frozen=True)
class Probe:
    """The cases of a kernel."""

    kernel: str
    cases: list[Case]

    def launches(self, executor: ModuleType) -> list[Callable[[], Launch]]:
        """Functions that make the launch of each case."""
        return [lambda case=case: Norm(executor, self.kernel, case).launch() for case in self.cases]


PROBES = {
    "add_layer_norm": Probe("add_layer_norm", ADDED),
    "add_rms_norm": Probe("add_rms_norm", ADDED),
    "merge_norm": Probe("merge_norm", MERGED),
}
