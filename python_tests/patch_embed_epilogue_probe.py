"""The epilogues of patch_embed's fused GEMMs on products in memory, against the formula in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from selftest_kernels import ERROR_WORD, Launch, from_bf16, to_bf16

TILE = 128  # rows and columns
POSITIONS = 8  # the code of the error


@dataclass(frozen=True)
class Case:
    """One launch; by default of two tiles a side, the last ones not full."""

    kind: str = "sm90"
    sizes: tuple[tuple[int, int], ...] = ((9, 7), (1, 1), (10, 8))
    hidden: int = 152
    side: int = 5
    has_bias: bool = True
    align_corners: bool = False
    hostile: bool = False


CASES = [
    Case(kind, **options)
    for kind in ("sm80", "sm90")
    for options in (
        {},
        {"hidden": 128, "sizes": ((8, 16),), "align_corners": True},
        {"hidden": 8, "sizes": ((1, 3),), "side": 1, "has_bias": False},
        {"hostile": True},
    )
]


class Epilogue:
    """Arguments and expected results of a case."""

    def __init__(self, executor: ModuleType, case: Case, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.executor, self.case = executor, case
        grid = [(1, h, w) for h, w in case.sizes]
        self.grid = np.array(grid, np.int32)
        self.offsets = np.cumsum([0, *(h * w for _, h, w in grid)]).astype(np.int32)
        places = [np.mgrid[:h, :w].reshape(2, -1).T for _, h, w in grid]
        self.positions = np.ascontiguousarray(np.concatenate(places).astype(np.int32))
        self.total = len(self.positions)
        self.products = rng.standard_normal((self.total, case.hidden)).astype(np.float32)
        self.bias = to_bf16(rng.standard_normal(case.hidden))
        self.table = to_bf16(rng.standard_normal((case.side**2, case.hidden)))
        self.out = np.zeros((self.total, case.hidden), np.uint16)
        self.error = np.zeros(1, ERROR_WORD)
        self.bad: set[int] = set()
        if case.hostile:
            for patch, place in ((0, (-1, 0)), (63, (0, 7)), (70, (2**31 - 1, 0))):
                self.positions[patch] = place
                self.bad.add(patch)

    def launch(self) -> Launch:
        """One launch of the case."""
        case = self.case
        inputs = {
            "products": self.products, "table": self.table, "grid": self.grid,
            "image_offsets": self.offsets, "position_ids": self.positions,
        }  # fmt: skip
        inputs |= {"bias": self.bias} if case.has_bias else {}
        numbers = {
            "total": self.total, "hidden": case.hidden, "num_images": len(self.grid),
            "side": case.side, "align_corners": int(case.align_corners),
        }  # fmt: skip
        tiles = -(-self.total // TILE) * -(-case.hidden // TILE)
        arguments: dict[str, Any] = {
            "inputs": inputs, "outputs": {"out": self.out}, "inouts": {"error_word": self.error},
            "addresses": {}, "numbers": numbers, "grid": [tiles], "block": [128],
            "shared_bytes": 32 * TILE,
        }  # fmt: skip
        return Launch(
            f"patch_embed_{case.kind}_epilogue", arguments, self.is_right, self.executor.free_all
        )

    def is_right(self) -> bool:
        """Whether the tokens are those of the formula, up to rounding, and the report is right."""
        case, word = self.case, self.error[0]
        if (word["code"] == POSITIONS) != case.hostile or (word["code"] != 0) != case.hostile:
            return False
        want = self.products.astype(np.float64)
        want += from_bf16(self.bias) if case.has_bias else 0
        table = from_bf16(self.table).astype(np.float64).reshape(case.side, case.side, -1)
        for patch in range(self.total):
            if patch in self.bad:
                want[patch] = 0
                continue
            image = np.searchsorted(self.offsets, patch, side="right") - 1
            (r0, r1, r), (c0, c1, c) = (self.taps(image, patch, axis) for axis in (0, 1))
            low = (1 - c) * table[r0, c0] + c * table[r0, c1]
            want[patch] += (1 - r) * low + r * ((1 - c) * table[r1, c0] + c * table[r1, c1])
        return bool(np.allclose(from_bf16(self.out), want, rtol=2.0**-8 * 1.01, atol=2e-6))

    def taps(self, image: int, patch: int, axis: int) -> tuple[int, int, float]:
        """Two neighbours along an axis of the table and the share of the second."""
        index, size = int(self.positions[patch, axis]), int(self.grid[image, 1 + axis])
        last = self.case.side - 1
        if self.case.align_corners:
            place = index * last / max(size - 1, 1)
        else:
            place = max((index + 0.5) * self.case.side / size - 0.5, 0)
        low = min(int(place), last)
        return low, min(low + 1, last), place - low


def launches(executor: ModuleType) -> list[Any]:
    """Functions that make the launch of each case."""
    return [lambda case=case: Epilogue(executor, case).launch() for case in CASES]
