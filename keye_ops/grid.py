"""PackedGrid: what every op needs to know about a batch of images and clips, computed once."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from keye_ops.checks import check, check_shape, describe

_MAX_TOTAL = 2**31 - 1  # cu_seqlens and offsets are int32


@dataclass(frozen=True, eq=False)
class PackedGrid:
    """A packed batch of images and clips of any size, described by its patch grids.

    Build it with :meth:`from_grid_thw` from integers on the host. All index tensors lie in one
    buffer that is copied to the device once, so that neither building nor using it makes the host
    wait for the device.

    Attributes:
        grid_thw: ``(t, h, w)`` of every image or clip: frames, patch rows, columns; host ints.
        segment: what attends jointly: ``"clip"`` (Keye-VL Preview) or ``"frame"`` (Keye-VL-1.5).
        spatial_merge_size: side of the square of patches that the projector merges.
        order: patch order in a frame, ``"raster"`` or ``"block"`` (merge blocks, Qwen-VL style).
        position_ids: int32 [N, 2], (row, column) of every patch in its frame.
        cu_seqlens: int32 [num_segments + 1], offsets of the segments.
        max_seqlen: length of the longest segment, a host int.
        grid: int32 [num_images, 3], ``grid_thw`` on the device.
        image_offsets: int32 [num_images + 1], offsets of the images in the packed patches.
    """

    grid_thw: tuple[tuple[int, int, int], ...]
    segment: str
    spatial_merge_size: int
    order: str
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    grid: torch.Tensor
    image_offsets: torch.Tensor

    @classmethod
    def from_grid_thw(
        cls,
        grid_thw: Sequence[Sequence[int]] | torch.Tensor,
        *,
        segment: str = "clip",
        spatial_merge_size: int = 2,
        order: str = "raster",
        device: torch.device | str | None = None,
    ) -> PackedGrid:
        """Describe a batch.

        Args:
            grid_thw: ``(t, h, w)`` of every image or clip: a sequence, or an integer tensor
                [num_images, 3] on the host.
            segment: ``"clip"`` lets all frames of a clip attend jointly, ``"frame"`` each alone.
            spatial_merge_size: side of the merged square.
            order: ``"raster"`` or ``"block"``.
            device: where the index tensors go; the host by default.

        Raises:
            RuntimeError: a grid that is not three positive integers, a tensor on an accelerator
                (reading it would wait for the device), unknown options, 2**31 patches or more.
        """
        op = "PackedGrid"
        check(segment in ("clip", "frame"), op, 'segment must be "clip" or "frame"', repr(segment))
        check(order in ("raster", "block"), op, 'order must be "raster" or "block"', repr(order))
        good = isinstance(spatial_merge_size, int) and spatial_merge_size >= 1
        check(good, op, "spatial_merge_size must be an integer >= 1", spatial_merge_size)
        sizes = _host_grid(grid_thw)
        merge = spatial_merge_size
        if order == "block":
            for t, h, w in sizes.tolist():
                _check_mergeable(op, t, h, w, merge)

        lengths = sizes.prod(axis=1)
        image_offsets = np.concatenate([[0], np.cumsum(lengths)])
        total = int(image_offsets[-1])
        frames, area = sizes[:, 0], sizes[:, 1] * sizes[:, 2]
        segment_lengths = np.repeat(area, frames) if segment == "frame" else lengths
        cu_seqlens = np.concatenate([[0], np.cumsum(segment_lengths)])
        position_ids = _position_ids(sizes, image_offsets, merge, order)

        # One buffer, one copy: the tensors below are views of it.
        parts = [position_ids.ravel(), cu_seqlens, sizes.ravel(), image_offsets]
        buffer = torch.from_numpy(np.concatenate(parts).astype(np.int32))
        views = buffer.split([part.size for part in parts])
        packed = cls(
            grid_thw=tuple((int(t), int(h), int(w)) for t, h, w in sizes),
            segment=segment,
            spatial_merge_size=merge,
            order=order,
            position_ids=views[0].view(total, 2),
            cu_seqlens=views[1],
            max_seqlen=int(segment_lengths.max(initial=0)),
            grid=views[2].view(-1, 3),
            image_offsets=views[3],
        )
        return packed if device is None else packed.to(device)

    @property
    def total(self) -> int:
        """Number of patches N in the batch."""
        return self.position_ids.shape[0]

    @property
    def num_images(self) -> int:
        """Number of images and clips."""
        return len(self.grid_thw)

    @property
    def num_segments(self) -> int:
        """Number of attention segments."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def image_lengths(self) -> tuple[int, ...]:
        """Patches of every image or clip."""
        return tuple(t * h * w for t, h, w in self.grid_thw)

    @property
    def merged_lengths(self) -> tuple[int, ...]:
        """Tokens of every image or clip after the merge.

        Raises:
            RuntimeError: a grid whose height or width the merge size does not divide.
        """
        self.require_mergeable("PackedGrid")
        return tuple(length // self.spatial_merge_size**2 for length in self.image_lengths)

    def require_mergeable(self, op: str) -> None:
        """Raise RuntimeError, naming ``op``, for a height or width that is not whole squares."""
        for t, h, w in self.grid_thw:
            _check_mergeable(op, t, h, w, self.spatial_merge_size)

    @property
    def total_merged(self) -> int:
        """Number of tokens after the merge."""
        return sum(self.merged_lengths)

    @property
    def device(self) -> torch.device:
        """Where the index tensors are."""
        return self.position_ids.device

    def to(self, device: torch.device | str) -> PackedGrid:
        """The same grid with its tensors on ``device`` (itself if they are there)."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if self.position_ids.device == device:
            return self
        tensors = (self.position_ids, self.cu_seqlens, self.grid, self.image_offsets)
        buffer = torch.cat([x.flatten() for x in tensors])
        if device.type == "cuda" and buffer.device.type == "cpu":
            buffer = buffer.pin_memory()  # else the copy would wait
        buffer = buffer.to(device, non_blocking=True)
        views = buffer.split([x.numel() for x in tensors])
        return replace(
            self,
            position_ids=views[0].view(-1, 2),
            cu_seqlens=views[1],
            grid=views[2].view(-1, 3),
            image_offsets=views[3],
        )


def as_packed_grid(
    grid: PackedGrid | Sequence[Sequence[int]] | torch.Tensor, device: torch.device
) -> PackedGrid:
    """Take a PackedGrid, or host integers, and give a PackedGrid on ``device``."""
    if not isinstance(grid, PackedGrid):
        grid = PackedGrid.from_grid_thw(grid, device=device)
    return grid.to(device)


def check_grid(
    op: str, grid: torch.Tensor, image_offsets: torch.Tensor, total: int, merge: int = 1
) -> None:
    """Require grid tensors that describe ``total`` patches; values are looked at on the host only.

    Args:
        op: named in errors.
        grid: int32 [num_images, 3]; image_offsets: int32 [num_images + 1].
        merge: height and width must be multiples of it.

    Raises:
        RuntimeError: shapes, dtypes, or (for tensors on the host) values that do not fit.
    """
    check_shape(op, "grid", grid, ("num_images", 3))
    check_shape(op, "image_offsets", image_offsets, (grid.shape[0] + 1,))
    for name, tensor in (("grid", grid), ("image_offsets", image_offsets)):
        check(tensor.dtype == torch.int32, op, f"{name} must be int32", tensor.dtype)
    if torch.compiler.is_compiling() or type(grid) is not torch.Tensor or grid.device.type != "cpu":
        return
    sizes = grid.numpy().astype(np.int64)
    good = (sizes >= 1).all(axis=1) & (sizes[:, 1:] % merge == 0).all(axis=1)
    requirement = "grid must hold positive (t, h, w)"
    requirement += f" with h and w multiples of {merge}" if merge > 1 else ""
    check(bool(good.all()), op, requirement, sizes[~good][:1].tolist())
    offsets = np.concatenate([[0], np.cumsum(sizes.prod(axis=1))])
    got = image_offsets.tolist()
    requirement = f"image_offsets must be the sums of t * h * w up to the {total} patches"
    check(got == offsets.tolist() and got[-1] == total, op, requirement, got[-3:])


def merge_index(
    grid: torch.Tensor, image_offsets: torch.Tensor, total: int, merge: int, order: str
) -> torch.Tensor:
    """Patches that each merged token is made of, without reading the grid on the host.

    Args:
        grid: int32 [num_images, 3]; image_offsets: int32 [num_images + 1]; total: N.

    Returns:
        int64 [N / merge**2, merge**2]: patch indices in the order (row offset, column offset).
    """
    device = grid.device
    square = merge * merge
    if order == "block":
        return torch.arange(total, device=device).view(-1, square)
    token = torch.arange(total // square, device=device)
    # Every image holds a multiple of merge**2 patches, so offsets divide exactly.
    image = torch.searchsorted(image_offsets[1:].long() // square, token, right=True)
    image = image.clamp(max=grid.shape[0] - 1)
    _, h, w = grid.long()[image].unbind(1)
    start = image_offsets.long()[image]
    local = token - start // square
    columns = w // merge
    frame, inside = local // (h // merge * columns), local % (h // merge * columns)
    row, column = inside // columns * merge, inside % columns * merge
    corner = start + frame * h * w + row * w + column
    offset = torch.arange(merge, device=device)
    square_offset = offset[None, :, None] * w[:, None, None] + offset[None, None, :]
    return corner[:, None] + square_offset.flatten(1)


def _host_grid(grid_thw: Sequence[Sequence[int]] | torch.Tensor) -> np.ndarray:
    """``grid_thw`` as a checked int64 array [num_images, 3]."""
    requirement = "grid_thw must be [num_images, 3] positive integers (t, h, w) on the host"
    if isinstance(grid_thw, torch.Tensor):
        good = grid_thw.device.type == "cpu" and grid_thw.dim() == 2
        good = good and not grid_thw.is_floating_point()
        check(good, "PackedGrid", requirement, describe(grid_thw))
        grid_thw = grid_thw.tolist()
    rows = list(grid_thw)
    for row in rows:
        check(_is_grid(row), "PackedGrid", requirement, row)
    # Python's integers do not overflow, so a product past int64 is seen here.
    total = sum(operator.index(t) * operator.index(h) * operator.index(w) for t, h, w in rows)
    requirement = "grid_thw must hold fewer than 2**31 patches"
    check(total <= _MAX_TOTAL, "PackedGrid", requirement, total)
    return np.array([list(map(operator.index, row)) for row in rows], np.int64).reshape(-1, 3)


def _is_grid(row: object) -> bool:
    """Whether ``row`` is three positive integers."""
    try:
        return [operator.index(value) >= 1 for value in row] == [True] * 3
    except TypeError:  # not a sequence, or not integers
        return False


def _check_mergeable(op: str, t: int, h: int, w: int, merge: int) -> None:
    good = h % merge == 0 and w % merge == 0
    check(good, op, f"grid height and width must be multiples of {merge} to merge", (t, h, w))


def _position_ids(
    sizes: np.ndarray, image_offsets: np.ndarray, merge: int, order: str
) -> np.ndarray:
    """(row, column) of every patch; frames of a clip share them."""
    image = np.repeat(np.arange(len(sizes)), np.diff(image_offsets))
    height, width = sizes[image, 1], sizes[image, 2]
    local = (np.arange(image_offsets[-1]) - image_offsets[image]) % np.maximum(height * width, 1)
    if order == "raster":
        return np.stack([local // width, local % width], axis=1)
    block, inner = local // merge**2, local % merge**2
    row = block // (width // merge) * merge + inner // merge
    column = block % (width // merge) * merge + inner % merge
    return np.stack([row, column], axis=1)
