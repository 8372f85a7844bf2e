"""The kernels of patch_embed on numpy arrays, launched past the op's checks, against fp64."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
from selftest_kernels import ERROR_WORD, Launch, from_bf16, to_bf16

FLOAT, HALF, BFLOAT16, BYTE = range(4)
EPSILON = {FLOAT: 2.0**-23, HALF: 2.0**-10, BFLOAT16: 2.0**-7}
SIZE = {FLOAT: 4, HALF: 2, BFLOAT16: 2, BYTE: 1}
GRID, OFFSETS, POSITIONS = 6, 7, 8  # codes of the error word
MEAN, STD = (0.5, 0.481, 0.41, 0.3), (0.5, 0.269, 0.28, 0.7)


def store(values: np.ndarray, dtype: int) -> np.ndarray:
    """As the kernel's dtype."""
    if dtype == BFLOAT16:
        return to_bf16(values)
    return values.astype({FLOAT: np.float32, HALF: np.float16, BYTE: np.uint8}[dtype])


def load(stored: np.ndarray, dtype: int) -> np.ndarray:
    """As fp64."""
    return (from_bf16(stored) if dtype == BFLOAT16 else stored).astype(np.float64)


def is_close(stored: np.ndarray, want: np.ndarray, dtype: int, scale: float = 1.0) -> bool:
    """Up to one rounding, and fp32 arithmetic on values of a scale."""
    got = load(stored, dtype)
    atol = scale * 2.0**-22
    return bool(np.allclose(got, want, rtol=EPSILON[dtype] * 0.51, atol=atol, equal_nan=False))


# ---- pixels to rows ----


@dataclass(frozen=True)
class PackCase:
    """Rows of pixels, and of the weight if it has any."""

    pixels: int = FLOAT
    dtype: int = BFLOAT16
    total: int = 11
    inner: int = 12
    gap: int = 0  # values between the rows of pixels
    shift: int = 0  # values before the first
    hidden: int = 0
    channels: int = 3
    far: bool = False  # rows of pixels lie 2**31 values apart


PACK_CASES = [
    *(PackCase(pixels, dtype, hidden=9) for pixels in (FLOAT, BYTE) for dtype in range(3)),
    *(PackCase(dtype, dtype, hidden=9, inner=20) for dtype in (HALF, BFLOAT16)),
    *(PackCase(BYTE, BFLOAT16, inner=inner, shift=shift) for inner in (12, 15, 18, 24, 27)
      for shift in (0, 1, 2, 4, 8)),
    *(PackCase(BYTE, FLOAT, inner=inner, total=3) for inner in (3, 5 * 3, 16 * 3)),
    *(PackCase(BFLOAT16, BFLOAT16, inner=inner, shift=shift, total=9, hidden=3)
      for inner in (8, 10, 12, 13) for shift in (0, 1, 2, 4)),
    *(PackCase(FLOAT, BFLOAT16, inner=inner, shift=shift, hidden=2)
      for inner in (4, 9, 14, 16) for shift in (0, 1, 2)),
    PackCase(FLOAT, FLOAT, inner=11, gap=3, hidden=17),
    PackCase(FLOAT, FLOAT, inner=16, gap=4, shift=4),
    PackCase(BYTE, HALF, inner=588, total=2, gap=4),
    PackCase(BYTE, BFLOAT16, inner=4, channels=4, total=3),
    PackCase(BYTE, FLOAT, inner=16, channels=2, shift=4),
    PackCase(BYTE, BFLOAT16, inner=8, channels=1, total=17),
    PackCase(BFLOAT16, BFLOAT16, inner=588, total=9, hidden=3),
    PackCase(FLOAT, BFLOAT16, inner=588, total=2),
    PackCase(FLOAT, BFLOAT16, total=3, far=True),
    PackCase(BYTE, BFLOAT16, total=2, far=True),
]  # fmt: skip


def word_of(*values: int) -> int:
    """The largest power of two up to 16 that divides all values."""
    return int(np.gcd.reduce([*values, 16]))


def pack(executor: ModuleType, case: PackCase) -> Launch:
    """One launch of the case."""
    rng = np.random.default_rng(case.inner + case.total)
    vector = 16 // SIZE[case.dtype]
    padded = -(-case.inner // vector) * vector
    size, stride = SIZE[case.pixels], case.inner + case.gap
    stride = 2**31 + 8 if case.far else stride
    shape = (case.total, case.inner)
    if case.pixels == BYTE:
        values = rng.integers(0, 256, shape)
        values[0, 0], values[-1, -1] = 0, 255
    else:
        values = rng.standard_normal(shape)
    pixels, weight = (
        store(values, case.pixels),
        store(rng.standard_normal((case.hidden, case.inner)), case.dtype),
    )
    role = executor.Role.input
    length = ((case.total - 1) * stride + case.inner + case.shift) * size
    address = executor.allocate("pixels", length, role) + case.shift * size
    for row in range(case.total):
        executor.poke(address + row * stride * size, pixels[row].tobytes())
    rows = np.zeros((case.total, padded), weight.dtype)
    weight_rows = np.zeros((case.hidden, padded), weight.dtype)
    blocks = [-(-case.total // 8), -(-case.hidden // 8)]
    row_bytes = case.inner * SIZE[case.dtype]
    numbers = {
        "dtype": case.dtype, "pixel_dtype": case.pixels, "pixel_stride": stride,
        "total": case.total, "inner": case.inner, "padded": padded, "hidden": case.hidden,
        "num_pixel_blocks": blocks[0], "area": case.inner // case.channels,
        "pixel_word": word_of(address, stride * size, case.inner * size),
        "weight_word": word_of(row_bytes),
        **{f"mean{i}": x for i, x in enumerate(MEAN)}, **{f"std{i}": x for i, x in enumerate(STD)},
    }  # fmt: skip
    has_weight = case.hidden > 0
    arguments = {
        "inputs": {"weight": weight} if has_weight else {},
        "outputs": {"rows": rows} | ({"weight_rows": weight_rows} if has_weight else {}),
        "addresses": {"pixels": address}, "numbers": numbers,
        "grid": [sum(blocks)], "block": [128],
    }  # fmt: skip

    def is_right() -> bool:
        if rows[:, case.inner :].any() or weight_rows[:, case.inner :].any():
            return False
        if not np.array_equal(weight_rows[:, : case.inner], weight):
            return False
        got = rows[:, : case.inner]
        if case.pixels != BYTE:
            return np.array_equal(got, store(load(pixels, case.pixels), case.dtype))
        mean, std = (
            np.repeat(x[: case.channels], case.inner // case.channels) for x in (MEAN, STD)
        )
        exact = (values / 255 - mean) / std
        ulp = np.abs(exact) * EPSILON[case.dtype] * 0.51 + 2.0**-26
        return bool((np.abs(load(got, case.dtype) - exact) <= ulp).all())

    return Launch("patch_embed_pack", arguments, is_right, executor.free_all)


# ---- places of patches ----


@dataclass(frozen=True)
class PlaceCase:
    """Images, and how their patches are described."""

    images: tuple[tuple[int, int, int], ...] = ((1, 3, 4), (2, 2, 1), (1, 1, 5))
    side: int = 5
    align_corners: bool = False
    wide: bool = False
    transposed: bool = False  # position_ids are [2, total] in memory
    hostile: str = ""
    far: bool = False  # rows of position_ids lie 2**31 values apart
    dtype: int = BFLOAT16
    hidden: int = 24
    bias: bool = True


HOSTILE = {
    "row -1": (POSITIONS, -1), "row 3": (POSITIONS, 3), "column 4": (POSITIONS, 4),
    "column least": (POSITIONS, -(2**31)), "row past int32": (POSITIONS, 2**40),
    "no rows": (GRID, 0), "negative columns": (GRID, -7), "no frames": (GRID, 0),
    "another size": (OFFSETS, 16), "huge size": (OFFSETS, 12), "late start": (OFFSETS, 2),
    "an image too few": (OFFSETS, 16),
    "early end": (OFFSETS, 19), "no images": (OFFSETS, 0), "least offsets": (OFFSETS, -(2**31)),
}  # fmt: skip
PLACE_CASES = [
    *(PlaceCase(dtype=dtype) for dtype in range(3)),
    PlaceCase(align_corners=True, wide=True),
    PlaceCase(transposed=True, side=1, hidden=8),
    PlaceCase(images=((1, 9, 7), (1, 1, 1), (3, 1, 4), (1, 12, 1)), side=3, bias=False),
    PlaceCase(images=((1, 1, 1),), side=4, align_corners=True, dtype=FLOAT, hidden=4),
    PlaceCase(images=((1, 4, 4), (1, 13, 10)), side=4, wide=True, transposed=True, hidden=8),
    PlaceCase(images=((1, 1, 3),), hidden=1032, dtype=HALF),
    PlaceCase(images=((1, 2, 2),), hidden=1152, side=2, bias=False),
    PlaceCase(images=((1, 1, 2),), hidden=520, dtype=FLOAT, far=True),
    PlaceCase(images=((1, 1, 1),) * 37, side=2),
    PlaceCase(images=((1, 4, 8),), side=2, hidden=8),
    *(PlaceCase(hostile=x, wide=x == "row past int32") for x in HOSTILE),
]


class Places:
    """Arrays of a case, and the taps of every patch in fp64: none of patches in bad places."""

    def __init__(self, executor: ModuleType, case: PlaceCase) -> None:
        self.executor, self.case = executor, case
        sizes = [t * h * w for t, h, w in case.images]
        self.total, offsets = sum(sizes), np.cumsum([0, *sizes])
        self.grid = np.array(case.images, np.int32)
        self.offsets = offsets.astype(np.int32)
        places = [
            (row, column)
            for t, h, w in case.images
            for _ in range(t)
            for row in range(h)
            for column in range(w)
        ]
        self.positions = np.array(places, np.int64 if case.wide else np.int32)
        self.good = np.ones(self.total, bool)
        self.images = np.repeat(np.arange(len(sizes)), sizes)
        self.error = np.zeros(1, ERROR_WORD)
        if case.hostile:
            self._spoil(case.hostile)

    def _spoil(self, how: str) -> None:
        received = HOSTILE[how][1]
        if how.startswith(("row", "column")):
            self.positions[3, int(how.startswith("column"))] = received
            self.good[3] = False
        elif how in ("no rows", "negative columns", "no frames"):
            image, axis = {"no frames": (1, 0), "no rows": (1, 1)}.get(how, (2, 2))
            self.grid[image, axis] = received
            self.good[self.images == image] = False
        elif how == "another size":
            self.grid[1] = (1, 2, 1)
            self.good[12:16] = False
        elif how == "huge size":
            self.grid[0] = (2**31 - 1, 2**31 - 1, 2**31 - 1)
            self.good[:12] = False
        elif how == "late start":
            self.offsets[0] = 2
            self.good[:12] = False
        elif how == "early end":
            self.offsets[-1] = 19
            self.good[16:] = False
        elif how == "an image too few":
            self.grid, self.offsets = self.grid[:2], self.offsets[:3]
            self.good[16:] = False
        elif how == "no images":
            self.grid, self.offsets = self.grid[:0], self.offsets[:1]
            self.good[:] = False
        else:
            self.offsets[:] = received
            self.good[:] = False

    def _axis(self, index: int, size: int) -> tuple[int, int, float]:
        """Two neighbours and the share of the second, by exact fractions."""
        side = self.case.side
        if self.case.align_corners:
            place = Fraction(index * (side - 1), max(size - 1, 1))
        else:
            place = max(Fraction((2 * index + 1) * side - size, 2 * size), Fraction(0))
        low = min(int(place), side - 1)
        return low, min(low + 1, side - 1), float(place % 1)

    def taps(self, patch: int) -> list[tuple[int, int, float, float]]:
        """Rows and columns of the table, low and high, and the shares of the high ones."""
        _, h, w = self.case.images[self.images[patch]]
        row, column = (int(x) for x in self.positions[patch])
        return [self._axis(row, h), self._axis(column, w)]

    def arguments(self) -> dict[str, Any]:
        """What all kernels that look for places are given."""
        case = self.case
        strides, addresses = (2, 1), {}
        inputs = {"grid": self.grid, "image_offsets": self.offsets}
        if case.transposed:
            inputs["position_ids"] = np.ascontiguousarray(self.positions.T)
            strides = (1, self.total)
        elif case.far:
            size = self.positions.itemsize
            strides = (2**31 + 2, 1)
            length = ((self.total - 1) * strides[0] + 2) * size
            address = self.executor.allocate("position_ids", length, self.executor.Role.input)
            for patch in range(self.total):
                place = address + patch * strides[0] * size
                self.executor.poke(place, self.positions[patch].tobytes())
            addresses["position_ids"] = address
        else:
            inputs["position_ids"] = self.positions
        numbers = {
            "total": self.total, "side": case.side, "num_images": len(self.grid),
            "position_stride": strides[0], "axis_stride": strides[1],
            "wide_ids": case.wide, "align_corners": case.align_corners, "dtype": case.dtype,
        }  # fmt: skip
        inouts = {"error_word": self.error}
        return {"inputs": inputs, "inouts": inouts, "addresses": addresses, "numbers": numbers}

    def report_is_right(self) -> bool:
        """Whether the error word says what was wrong."""
        code, received = HOSTILE.get(self.case.hostile, (0, 0))
        word = self.error[0]
        if self.case.hostile in ("late start", "early end"):  # and the image has another size
            return word["code"] == code and word["value"] in (received, 12, 19)
        return (word["code"], word["value"]) == (code, received)


def positions(executor: ModuleType, case: PlaceCase) -> Launch:
    """Bias and positions added to random tokens."""
    places = Places(executor, case)
    rng = np.random.default_rng(case.hidden + places.total)
    dtype = case.dtype
    out = store(rng.standard_normal((places.total, case.hidden)), dtype)
    table = store(rng.standard_normal((case.side**2, case.hidden)), dtype)
    bias = store(rng.standard_normal(case.hidden), dtype)
    want = load(out, dtype) + (load(bias, dtype) if case.bias else 0)
    values = load(table, dtype).reshape(case.side, case.side, -1)
    for patch in range(places.total):
        if not places.good[patch]:
            want[patch] = 0
            continue
        (r0, r1, r), (c0, c1, c) = places.taps(patch)
        top = (1 - c) * values[r0, c0] + c * values[r0, c1]
        want[patch] += (1 - r) * top + r * ((1 - c) * values[r1, c0] + c * values[r1, c1])
    arguments = places.arguments()
    arguments["inputs"] |= {"table": table} | ({"bias": bias} if case.bias else {})
    arguments["inouts"] |= {"out": out}
    arguments["numbers"] |= {"hidden": case.hidden}
    arguments |= {"grid": [-(-places.total // 16)], "block": [128], "shared_bytes": 16 * 56}

    def is_right() -> bool:
        zeros = load(out, dtype)[~places.good]
        return places.report_is_right() and not zeros.any() and is_close(out, want, dtype)

    return Launch("patch_embed_positions", arguments, is_right, executor.free_all)


def cells(executor: ModuleType, case: PlaceCase) -> Launch:
    """Cells of the table, and places in them."""
    places = Places(executor, case)
    got = np.zeros(places.total, np.int32)
    fractions = np.zeros((places.total, 2), np.float32)
    arguments = places.arguments()
    arguments["outputs"] = {"cells": got, "fractions": fractions}
    arguments |= {"grid": [-(-places.total // 128)], "block": [128]}

    def is_right() -> bool:
        for patch in range(places.total):
            cell, place = case.side**2, (0.0, 0.0)
            if places.good[patch]:
                (row, _, r), (column, _, c) = places.taps(patch)
                cell, place = row * case.side + column, (r, c)
            if got[patch] != cell or not np.allclose(fractions[patch], place, rtol=2.0**-23):
                return False
        return places.report_is_right()

    return Launch("patch_embed_cells", arguments, is_right, executor.free_all)


# ---- the gradient of the table ----


@dataclass(frozen=True)
class TableCase:
    """Patches in random cells."""

    total: int = 60
    side: int = 3
    hidden: int = 24
    dtype: int = BFLOAT16
    parts: int = 0  # 0 for none: sums go to the gradient itself
    slices: int = 1
    crowded: bool = False  # most patches in one cell


TABLE_CASES = [
    *(TableCase(dtype=dtype) for dtype in range(3)),
    *(TableCase(dtype=dtype, total=30, side=2, parts=3, slices=2) for dtype in range(3)),
    TableCase(total=0),
    TableCase(total=1, side=1, hidden=8),
    TableCase(total=700, side=2, crowded=True),
    TableCase(total=500, side=2, crowded=True, parts=4, dtype=FLOAT, slices=3, hidden=20),
    TableCase(total=12, side=3, hidden=1152),
    TableCase(total=5, side=2, hidden=1152, dtype=FLOAT, slices=2),
    TableCase(total=161, side=1, hidden=8, dtype=HALF),
    TableCase(total=320, side=1, hidden=8, dtype=HALF, parts=2),
]


def dtable(executor: ModuleType, case: TableCase) -> Launch:
    """Sums of the rows of dout that a row of the table belongs to."""
    rng = np.random.default_rng(case.total + case.hidden + case.side)
    count, dtype = case.side**2, case.dtype
    dout = store(rng.standard_normal((case.total, case.hidden)), dtype)
    fractions = rng.random((case.total, 2)).astype(np.float32)
    where = rng.integers(0, count + 1, case.total).astype(np.int32)  # the last are bad patches
    if case.crowded:
        where[rng.random(case.total) < 0.8] = 1
    order = np.argsort(where, kind="stable").astype(np.int64)
    vector = 16 // SIZE[dtype]
    chunks = case.hidden // vector
    arguments: dict[str, Any] = {
        "inputs": {
            "dout": dout, "fractions": fractions, "sorted_cells": where[order], "order": order,
        },
        "numbers": {
            "total": case.total, "side": case.side, "hidden": case.hidden, "dtype": dtype,
            "num_parts": max(case.parts, 1), "num_slices": case.slices,
            "slice_chunks": -(-chunks // case.slices),
        },
        "grid": [case.slices * count * max(case.parts, 1)],
        "block": [160],
        "shared_bytes": 64 + 160 * 16,
    }  # fmt: skip
    out = store(np.zeros((count, case.hidden)), dtype)
    partials = np.zeros((case.parts, count, case.hidden), np.float32)
    arguments["outputs"] = {"partials": partials} if case.parts else {"dtable": out}
    want = np.zeros((case.side, case.side, case.hidden))
    wide, scale = load(dout, dtype), 1.0
    for patch in range(case.total):
        if where[patch] == count:
            continue
        (r, c), (row, column) = fractions[patch].astype(float), divmod(where[patch], case.side)
        for i, down in enumerate((1 - r, r)):
            for j, right in enumerate((1 - c, c)):
                place = min(row + i, case.side - 1), min(column + j, case.side - 1)
                want[place] += down * right * wide[patch]
    scale = max(1.0, float(np.abs(want).max()))

    def is_right() -> bool:
        flat = want.reshape(count, case.hidden)
        if not case.parts:
            return is_close(out, flat, dtype, 8 * scale)
        evenly = case.total < 100 or bool(
            (partials != 0).any((1, 2)).all()
        )  # every part has its share
        return evenly and is_close(partials.sum(0), flat, FLOAT, 8 * scale)

    return Launch("patch_embed_dtable", arguments, is_right, executor.free_all)


def launches(executor: ModuleType) -> list[Any]:
    """Functions that make the launch of each case."""
    makers: list[tuple[Any, Any]] = [
        *((pack, case) for case in PACK_CASES),
        *((positions, case) for case in PLACE_CASES),
        *((cells, case) for case in PLACE_CASES),
        *((dtable, case) for case in TABLE_CASES),
    ]
    return [lambda make=make, case=case: make(executor, case) for make, case in makers]
