"""The norms' kernels on numpy arrays, launched past the ops' checks, against fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
from patch_embed_probe import BFLOAT16, FLOAT, HALF, SIZE, is_close, load, store
from selftest_kernels import ERROR_WORD, Launch

CHUNKS, MAX_WARPS = 5, 12  # kNormChunks, kNormMaxWarps
GRID, OFFSETS = 4, 5  # codes of the error word
IMAGES = [(1, 4, 6), (2, 2, 4), (3, 6, 2)]


@dataclass(frozen=True)
class Case:
    """Rows of chunks of 16 bytes, or of merged tokens."""

    backward: bool = False
    dtype: int = BFLOAT16
    rows: int = 5
    chunks: int = 9
    blocks: int = 2
    warps: int = 1
    teams: int = 4
    memory: bool = False  # rows do not stay in registers
    added: bool = True  # residual, or dsum
    far: bool = False  # rows of x lie 2**31 values apart
    offset: float = 0.0
    eps: float = 1e-6
    # of merge_norm
    side: int = 2
    block_order: bool = False
    after: bool = False
    hostile: str = ""


def plan_of(case: Case, num_rows: int, chunks: int) -> dict[str, Any]:
    """How the kernel is launched: its numbers, grid, block and shared memory."""
    teams = case.teams if case.warps == 1 and not case.memory else 1
    threads = 32 * teams * case.warps
    shelf = threads * CHUNKS * 16
    scratch = 3 * 2 * MAX_WARPS * 4
    sums = 2 * CHUNKS * (16 // SIZE[case.dtype]) * 32 * 4
    numbers = {
        "num_rows": num_rows, "num_chunks": chunks, "num_warps": case.warps, "num_teams": teams,
        "all_teams": teams * case.blocks, "eps": case.eps, "dtype": case.dtype,
        "in_registers": not case.memory, "backward": case.backward,
    }  # fmt: skip
    shared = sums + 2 * shelf if case.backward else scratch + shelf
    return {"numbers": numbers, "grid": [case.blocks], "block": [threads], "shared_bytes": shared}


def normalise(x: np.ndarray, layer: bool, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Normed rows, and 1 / sqrt(variance + eps)."""
    x = x - x.mean(1, keepdims=True) if layer else x
    rstd = 1 / np.sqrt((x * x).mean(1, keepdims=True) + eps)
    return x * rstd, rstd


def dx_of(weighted: np.ndarray, normed: np.ndarray, rstd: np.ndarray, layer: bool) -> np.ndarray:
    """Gradient of the rows before the norm."""
    centred = weighted - (weighted.mean(1, keepdims=True) if layer else 0)
    return rstd * (centred - normed * (weighted * normed).mean(1, keepdims=True))


def partials_are_right(got: np.ndarray, parts: np.ndarray, case: Case, index: np.ndarray) -> bool:
    """Every block's sum of the rows that its teams take; parts are those of the good rows."""
    all_teams = case.blocks * (case.teams if case.warps == 1 and not case.memory else 1)
    want = np.zeros(got.shape)
    for row, part in zip(index, parts, strict=True):
        want[row % all_teams % case.blocks] += part
    return is_close(got, want, FLOAT, 64 * max(1.0, float(np.abs(want).max(initial=0))))


def added(executor: ModuleType, name: str, case: Case) -> Launch:
    """One launch of add_layer_norm or add_rms_norm."""
    layer, dtype = name == "add_layer_norm", case.dtype
    rng = np.random.default_rng(case.rows + case.chunks)
    width = case.chunks * 16 // SIZE[dtype]
    shape = (case.rows, width)
    x, other, dnormed = (store(rng.standard_normal(shape) * 2 + case.offset, dtype)
                         for _ in range(3))  # fmt: skip
    weight, bias = (store(rng.standard_normal(width), dtype) for _ in range(2))
    arguments = plan_of(case, case.rows, case.chunks)
    stride = 2**31 + 8 if case.far else width
    arguments["numbers"] |= {"x_stride": stride, "total": case.rows, "hidden": width}
    length = ((case.rows - 1) * stride + width) * SIZE[dtype]
    address = executor.allocate("x", length, executor.Role.input)
    for row in range(case.rows):
        executor.poke(address + row * stride * SIZE[dtype], x[row].tobytes())
    arguments["addresses"] = {"x": address}
    wide, scale = load(x, dtype), load(weight, dtype)
    if case.backward:
        dx = np.zeros_like(x)
        partials = {"dweight_partial": np.zeros((case.blocks, width), np.float32)}
        if layer:
            partials["dbias_partial"] = np.zeros((case.blocks, width), np.float32)
        inputs = {"weight": weight, "dnormed": dnormed} | ({"dsum": other} if case.added else {})
        arguments |= {"inputs": inputs, "outputs": {"dx": dx, **partials}}
        normed, rstd = normalise(wide, layer, case.eps)
        grad, index = load(dnormed, dtype), np.arange(case.rows)
        want = dx_of(grad * scale, normed, rstd, layer)
        want += load(other, dtype) if case.added else 0

        def is_right() -> bool:
            sums = partials_are_right(partials["dweight_partial"], grad * normed, case, index)
            if layer:
                sums &= partials_are_right(partials["dbias_partial"], grad, case, index)
            return sums and is_close(dx, want, dtype, 64 * max(1.0, float(rstd.max(initial=1))))

        return Launch(name, arguments, is_right, executor.free_all)

    sums, out = np.zeros_like(x), np.zeros_like(x)
    total = store(wide + load(other, dtype), dtype) if case.added else x
    normed = normalise(load(total, dtype), layer, case.eps)[0]
    want = normed * scale + (load(bias, dtype) if layer else 0)
    inputs = {"weight": weight} | ({"bias": bias} if layer else {})
    inputs |= {"residual": other} if case.added else {}
    outputs = {"normed": out} | ({"sum": sums} if case.added else {})
    arguments |= {"inputs": inputs, "outputs": outputs}

    def is_right() -> bool:
        return (not case.added or np.array_equal(sums, total)) and is_close(out, want, dtype, 16)

    return Launch(name, arguments, is_right, executor.free_all)


# What is changed where to what; which images are bad then; the code and the value reported.
HOSTILE: dict[str, tuple[Any, ...]] = {
    "no rows": ("grid", (1, 1), 0, {1}, GRID, 0),
    "no frames": ("grid", (1, 0), 0, {1}, GRID, 0),
    "no columns": ("grid", (2, 2), 0, {2}, GRID, 0),
    "odd rows": ("grid", (0, 1), 5, {0}, GRID, 5),
    "odd columns": ("grid", (0, 2), 3, {0}, GRID, 3),
    "negative rows": ("grid", (2, 1), -6, {2}, GRID, -6),
    "negative columns": ("grid", (2, 2), -4, {2}, GRID, -4),
    "too many frames": ("grid", (1, 0), 3, {1}, OFFSETS, 40),
    "huge": ("grid", (1, 1), 2**31 - 2, {1}, OFFSETS, 40),
    "far too many": ("grid", slice(1, 2), 2**31 - 2, {1}, OFFSETS, 40),
    "as much again": ("grid", slice(1, 2), (2**29, 2**31 - 2**30, 2**3), {1}, OFFSETS, 40),
    "late start": ("offsets", 0, 4, {0}, OFFSETS, 24),
    "early start": ("offsets", 0, -8, {0}, OFFSETS, 24),
    "negative start": ("grid_and_start", 0, -24, {0}, OFFSETS, 24),
    "early end": ("offsets", 3, 72, {2}, OFFSETS, 72),
    "late end": ("offsets", 3, 80, {2}, OFFSETS, 80),
    "an end as large as its grid": ("grid_and_end", 3, 88, {2}, OFFSETS, 88),
    "not a token's": ("offsets", 1, 26, {0, 1}, OFFSETS, 26),
    "least": ("offsets", slice(None), -(2**31), {0, 1, 2}, OFFSETS, -(2**31)),
    "no image": ("none", 0, 0, {0, 1, 2}, OFFSETS, 0),
}


def merged(executor: ModuleType, name: str, case: Case) -> Launch:
    """One launch of merge_norm; patches and their tokens as loops over the images say."""
    dtype, side, square = case.dtype, case.side, case.side**2
    rng = np.random.default_rng(case.rows + case.chunks)
    images = IMAGES if side == 2 else [(t, h // 2 * side, w // 2 * side) for t, h, w in IMAGES[:2]]
    if case.rows > 10:
        images = [(1, side, side * (1 + i % 2)) for i in range(case.rows)]
    grid = np.array(images, np.int32)
    offsets = np.concatenate([[0], grid.astype(np.int64).prod(1).cumsum()]).astype(np.int32)
    total = int(offsets[-1])
    places, owner = [], []
    for image, (t, h, w) in enumerate(images):
        numbers = np.arange(offsets[image], offsets[image + 1]).reshape(t, h, w)
        shape = (t, h // side, side, w // side, side)
        places.append(numbers.reshape(shape).transpose(0, 1, 3, 2, 4).reshape(-1, square))
        owner += [image] * len(places[-1])
    index = np.concatenate(places)
    tokens = len(index)
    where, place, value, bad_images, code, received = HOSTILE.get(
        case.hostile, ("", 0, 0, set(), 0, 0)
    )
    if where == "grid":
        grid[place] = value
    elif where == "offsets":
        offsets[place] = value
    elif where == "grid_and_start":  # which then agree, but for the patches that there are
        offsets[0], grid[0] = value, (2, 4, 6)
    elif where == "grid_and_end":
        offsets[3], grid[2] = value, (4, 6, 2)
    elif where == "none":
        grid, offsets = grid[:0], offsets[:1]
    bad = np.isin(owner, list(bad_images))
    blocks = np.arange(total).reshape(tokens, square)
    index = blocks if case.block_order else np.where(bad[:, None], blocks, index)

    hidden = case.chunks * 16 // SIZE[dtype]
    normed_width = square * hidden if case.after else hidden
    x = store(rng.standard_normal((total, hidden)) + case.offset, dtype)
    weight, bias = (store(rng.standard_normal(normed_width), dtype) for _ in range(2))
    error = np.zeros(1, ERROR_WORD)
    num_rows = tokens if case.after else total
    arguments = plan_of(case, num_rows, case.chunks * (square if case.after else 1))
    gap = 16 // SIZE[dtype] if case.backward else 0
    arguments["numbers"] |= {
        "x_stride": hidden, "dout_stride": square * hidden + gap, "total": total, "hidden": hidden,
        "num_images": len(grid), "side": side, "block_order": case.block_order,
        "norm_first": not case.after, "patch_chunks": case.chunks,
    }  # fmt: skip
    rows = load(x, dtype)[index].reshape(num_rows, normed_width)
    bad_rows = bad if case.after else bad.repeat(square)
    normed, rstd = normalise(rows, True, case.eps)
    inputs = {"x": x, "weight": weight, "grid": grid, "image_offsets": offsets}
    arguments["inouts"] = {"error_word": error}

    def report_is_right() -> bool:
        word = error[0]
        several = case.hostile in ("late start", "not a token's", "early start")
        return word["code"] == code and (several or word["value"] == received)

    if case.backward:
        dx = np.zeros_like(x)
        partials = [np.zeros((case.blocks, normed_width), np.float32) for _ in range(2)]
        dout = store(rng.standard_normal((tokens, square * hidden + gap)), dtype)
        inputs |= {"dout": dout}
        names = ("dweight_partial", "dbias_partial")
        outputs = {"dx": dx, **dict(zip(names, partials, strict=True))}
        arguments |= {"inputs": inputs, "outputs": outputs}
        grad = load(dout, dtype)[:, : square * hidden].reshape(num_rows, normed_width)
        grads = dx_of(grad * load(weight, dtype), normed, rstd, True)
        grads[bad_rows] = 0
        want = np.zeros((total, hidden))
        want[index.reshape(-1)] = grads.reshape(total, hidden)

        def is_right() -> bool:
            good = np.flatnonzero(~bad_rows)
            sums = ((partials[0], grad * normed), (partials[1], grad))
            return (
                report_is_right()
                and is_close(dx, want, dtype, 64)
                and all(partials_are_right(got, part[good], case, good) for got, part in sums)
            )

        return Launch(name, arguments, is_right, executor.free_all)

    out = np.zeros((tokens, square * hidden), x.dtype)
    want = normed * load(weight, dtype) + load(bias, dtype)
    want[bad_rows] = 0
    arguments |= {"inputs": {**inputs, "bias": bias}, "outputs": {"out": out}}

    def is_right() -> bool:
        return report_is_right() and is_close(out, want.reshape(out.shape), dtype, 16)

    return Launch(name, arguments, is_right, executor.free_all)


BOTH = [
    *(Case(dtype=dtype, rows=9) for dtype in (FLOAT, HALF, BFLOAT16)),
    *(Case(dtype=dtype, rows=3, chunks=40, memory=True) for dtype in (FLOAT, HALF, BFLOAT16)),
    Case(rows=1, chunks=1, blocks=1),
    Case(rows=13, chunks=33, added=False),
    Case(rows=3, chunks=160, blocks=1, teams=2),
    Case(rows=5, chunks=161, warps=2),
    Case(rows=7, chunks=75, warps=3, blocks=1, dtype=FLOAT, added=False),
    Case(rows=3, chunks=390, warps=12, blocks=1),
    Case(rows=4, chunks=400, warps=12, blocks=1, memory=True, added=False),
    Case(rows=5, chunks=70, warps=2, blocks=2, memory=True, dtype=FLOAT),
    Case(rows=2, far=True),
    Case(rows=4, far=True, memory=True),
    Case(rows=6, offset=100.0, dtype=FLOAT, eps=0.5),
    Case(rows=3, blocks=4),
]
MERGED = [
    *(Case(dtype=dtype, after=after, chunks=3) for dtype in (FLOAT, HALF, BFLOAT16)
      for after in (False, True)),
    *(Case(block_order=True, after=after, chunks=2, hostile="") for after in (False, True)),
    *(Case(after=after, chunks=17, memory=True) for after in (False, True)),
    *(Case(after=after, side=3, chunks=1) for after in (False, True)),
    *(Case(after=after, side=1, chunks=2) for after in (False, True)),
    Case(after=True, chunks=41, warps=2),
    Case(rows=40, chunks=1),
    Case(rows=1060, chunks=1, after=True, blocks=8),
    *(Case(hostile=hostile, chunks=1, after=after) for hostile in HOSTILE
      for after in (False, True)),
]  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """All launches of an op."""

    name: str
    make: Any
    cases: list[Case]

    def launches(self, executor: ModuleType) -> list[Any]:
        """Functions that make the launch of each case, forward and backward."""
        cases = [replace(case, backward=way) for case in self.cases for way in (False, True)]
        return [lambda case=case: self.make(executor, self.name, case) for case in cases]


PROBES = {
    "add_layer_norm": Probe("add_layer_norm", added, BOTH),
    "add_rms_norm": Probe("add_rms_norm", added, BOTH),
    "merge_norm": Probe("merge_norm", merged, MERGED),
}
