"""The patchify kernel on numpy arrays, launched past the op's checks, against its formula."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from selftest_kernels import Launch


@dataclass(frozen=True)
class Case:
    """One launch; by default of Keye's patches, on a plan that has several of everything."""

    frames: int = 1
    source: tuple[int, int] = (50, 47)
    grid: tuple[int, int] = (1, 3)
    patch_size: int = 14
    bicubic: bool = True
    precision: tuple[int, int] = (22, 22)  # of rows, of columns
    is_float: bool = False
    span: int = 2
    chunk_rows: int = 8
    frames_per_block: int = 1
    padding: int = 0  # bytes between rows
    offset: int = 0  # bytes before the first frame
    far: bool = False  # frames lie 2**31 bytes apart
    edges: bool = False  # black and white only


CASES = [
    Case(),
    Case(is_float=True),
    Case(frames=3, frames_per_block=2, source=(20, 31), grid=(2, 2), padding=5, chunk_rows=4),
    Case(frames=2, frames_per_block=2, source=(20, 31), is_float=True, bicubic=False, padding=1),
    Case(bicubic=False, precision=(15, 14), source=(40, 30), offset=3, chunk_rows=12),
    Case(source=(9, 8), grid=(2, 2), span=1, edges=True),
    Case(source=(9, 8), grid=(1, 2), is_float=True, edges=True),
    Case(source=(1, 1), grid=(1, 1), span=1),
    Case(source=(3, 130), grid=(1, 7), span=6, chunk_rows=12, offset=7),
    Case(source=(14, 84), grid=(1, 6), span=6, chunk_rows=4, edges=True),
    Case(source=(60, 100), grid=(1, 1), span=1, chunk_rows=4, edges=True),
    Case(source=(33, 12), grid=(3, 1), patch_size=4, span=1, chunk_rows=4),
    Case(source=(30, 30), grid=(3, 4), patch_size=2, span=4),
    Case(source=(20, 20), grid=(1, 1), patch_size=34, span=1, bicubic=False, precision=(14, 14)),
    Case(frames=2, source=(16, 20), far=True, span=3),
]  # fmt: skip


class Patchify:
    """Arguments and expected result of a case."""

    def __init__(self, executor: ModuleType, case: Case, seed: int = 0) -> None:
        rng = np.random.default_rng(seed + case.source[0])
        self.executor, self.case = executor, case
        shape = (case.frames, *case.source, 3)
        self.frames = rng.integers(0, 256, shape, np.uint8)
        if case.edges:
            self.frames = (self.frames > 127).astype(np.uint8) * np.uint8(255)
        p = case.patch_size
        self.size = (case.grid[0] * p, case.grid[1] * p)
        self.out = np.zeros((case.frames * case.grid[0] * case.grid[1], 3, p, p), np.uint8)

    def launch(self) -> Launch:
        """One launch of the case."""
        case = self.case
        (height, width), (rows, columns) = case.source, case.grid
        stride_row = width * 3 + case.padding
        stride_frame = 2**31 + 48 if case.far else height * stride_row
        inputs, addresses = {}, {}
        if case.far:
            addresses["frames"] = self._far_frames(stride_frame, stride_row)
        else:
            inputs["frames"] = self._strided_frames(stride_frame, stride_row)
        groups = -(-case.frames // case.frames_per_block)
        blocks = rows * -(-columns // case.span) * groups
        numbers = {
            "stride_frame": stride_frame, "stride_row": stride_row, "num_frames": case.frames,
            "down_source": height, "down_size": self.size[0], "down_precision": case.precision[1],
            "across_source": width, "across_size": self.size[1],
            "across_precision": case.precision[0], "bicubic": case.bicubic,
            "patch_size": case.patch_size, "is_float": case.is_float, "span": case.span,
            "chunk_rows": case.chunk_rows, "frames_per_block": case.frames_per_block,
        }  # fmt: skip
        arguments = {
            "inputs": inputs, "outputs": {"out": self.out}, "addresses": addresses,
            "numbers": numbers,
            "grid": [blocks], "block": [256], "shared_bytes": self._shared_bytes(),
        }  # fmt: skip
        return Launch("patchify", arguments, self.is_right, self.executor.free_all)

    def _shared_bytes(self) -> int:
        """What the kernel's pieces of shared memory take, each a multiple of 64 bytes."""
        case, side = self.case, self.case.patch_size
        columns, size = case.span * side, 4 if case.is_float else 1
        scale = [source / new for source, new in zip(case.source, self.size, strict=True)]
        support = [(2 if case.bicubic else 1) * max(one, 1.0) for one in scale]
        down, across = (2 * math.ceil(one) + 1 for one in support)
        pixels = int((columns - 1) * scale[1]) + across + 1
        pitch = round_up(3 * pixels + 31, 16)
        pieces = (
            *(16 * columns, 16 * side, 8 * (columns + side)),  # windows and sums
            *(4 * round_up(across, 4) * columns, 4 * down * side),  # weights
            case.chunk_rows * pitch,
            case.chunk_rows * 3 * columns * size,
            3 * columns * side,
        )
        return sum(round_up(piece, 64) for piece in pieces)

    def _strided_frames(self, stride_frame: int, stride_row: int) -> np.ndarray:
        """Frames `offset` bytes behind a multiple of 64, of which only the pixels may be read."""
        memory = np.zeros(self.case.offset + self.case.frames * stride_frame + 64, np.uint8)
        first = -memory.ctypes.data % 64 + self.case.offset
        strides = (stride_frame, stride_row, 3, 1)
        view = np.lib.stride_tricks.as_strided(memory[first:], self.frames.shape, strides)
        view[:] = self.frames
        return view

    def _far_frames(self, stride_frame: int, stride_row: int) -> int:
        num_bytes = (len(self.frames) - 1) * stride_frame + self.frames[0].nbytes
        address = self.executor.allocate("frames", num_bytes, self.executor.Role.input)
        for i, frame in enumerate(self.frames):
            for y, row in enumerate(frame):
                self.executor.poke(address + i * stride_frame + y * stride_row, row.tobytes())
        return address

    def is_right(self) -> bool:
        """Whether the patches are the filter's: bit for bit, or as fp32 sums may round."""
        case = self.case
        x = self.frames.astype(np.float64)
        for dim, size, precision in ((2, self.size[1], 0), (1, self.size[0], 1)):
            weights = weights_of(x.shape[dim], size, case.bicubic)
            if not case.is_float:
                # Exact: sums stay far below 2**53.
                scale = 2.0 ** case.precision[precision]
                weights = np.trunc(weights * scale + np.copysign(0.5, weights))
            x = np.moveaxis(np.tensordot(x, weights, ([dim], [1])), -1, dim)
            if not case.is_float:
                x = np.clip(np.floor((x + scale / 2) / scale), 0, 255)
        (rows, columns), p = case.grid, case.patch_size
        cut = np.clip(x, 0, 255).reshape(case.frames, rows, p, columns, p, 3)
        want = cut.transpose(0, 1, 3, 5, 2, 4).reshape(self.out.shape)
        return bool((np.abs(self.out - want) <= (0.5 + 1e-4 if case.is_float else 0)).all())


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def weights_of(source: int, size: int, bicubic: bool) -> np.ndarray:
    """[size, source] fp64, as Pillow computes them."""
    scale = source / size
    stretch = max(scale, 1.0)
    support = (2.0 if bicubic else 1.0) * stretch
    weights = np.zeros((size, source))
    for i in range(size):
        center = (i + 0.5) * scale
        first = max(int(center - support + 0.5), 0)
        for at in range(first, min(int(center + support + 0.5), source)):
            x = abs((at - center + 0.5) * (1.0 / stretch))
            if not bicubic:
                weights[i, at] = max(1.0 - x, 0.0)
            elif x < 1.0:
                weights[i, at] = (1.5 * x - 2.5) * x * x + 1.0
            elif x < 2.0:
                weights[i, at] = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
        weights[i] /= sum(weights[i])
    return weights


def launches(executor: ModuleType) -> list[Any]:
    """Functions that make the launch of each case."""
    return [lambda case=case: Patchify(executor, case).launch() for case in CASES]
