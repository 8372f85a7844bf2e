"""patchify: decoded frames to the patches that patch_embed takes, resized on the way."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from keye_ops import dispatch
from keye_ops.checks import check, check_shape
from keye_ops.extension import define

ARITHMETIC = ("pillow", "uint8", "float32")
MODES = ("bilinear", "bicubic")

_OP = "patchify"
_MAX_SIDE = 2**15
_MAX_PATCH = 64
_PILLOW_PRECISION = 22  # bits behind the point of Pillow's weights


class Filter(NamedTuple):
    """How one axis is resampled."""

    first: torch.Tensor  # int64 [size], the first source pixel of every output
    weights: torch.Tensor  # [size, taps], int32 or fp64
    precision: int  # bits behind the point, -1 for fp64


# ---- reference ----


def patchify_reference(
    frames: torch.Tensor,
    height: int,
    width: int,
    patch_size: int = 14,
    bicubic: bool = True,
    arithmetic: int = 0,
    vertical_first: bool = False,
) -> torch.Tensor:
    """The definition, in plain PyTorch; ``arithmetic`` is an index of ``ARITHMETIC``."""
    _check_patchify(frames, height, width, patch_size, arithmetic, vertical_first)
    x, passes = frames, ((2, width), (1, height))
    for dim, size in reversed(passes) if vertical_first else passes:
        x = _resample(x, dim, resample_filter(x.shape[dim], size, bicubic, arithmetic))
    x = x.round().clamp(0, 255).to(torch.uint8) if x.is_floating_point() else x
    p = patch_size
    cut = x.reshape(len(x), height // p, p, width // p, p, 3).permute(0, 1, 3, 5, 2, 4)
    return cut.reshape(-1, 3, p, p)


def resample_filter(source: int, size: int, bicubic: bool, arithmetic: int) -> Filter:
    """Weights of the filter, stretched where the axis shrinks so that it sees every pixel.

    fp64 as in Pillow and in torch; integers are rounded to nearest, halves away from zero.
    """
    scale = source / size
    stretch = max(scale, 1.0)
    support = (2.0 if bicubic else 1.0) * stretch
    center = (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    first = (center - support + 0.5).long().clamp(min=0)
    count = (center + support + 0.5).long().clamp(max=source) - first
    step = 1.0 / stretch
    taps = [(t + first - center + 0.5) * step for t in range(int(count.max()))]
    taps = [_kernel(x.abs(), bicubic) * (t < count) for t, x in enumerate(taps)]
    # The sum is one after another, so that it has the same bits everywhere.
    weights = torch.stack(taps, 1) / sum(taps)[:, None]
    if ARITHMETIC[arithmetic] == "float32":
        return Filter(first, weights, -1)
    precision = _PILLOW_PRECISION
    if ARITHMETIC[arithmetic] == "uint8":
        precision = _precision_of_16_bits(float(weights.max()))
    scaled = weights * 2.0**precision
    return Filter(first, (scaled + 0.5 * scaled.sign()).trunc().int(), precision)


def _kernel(x: torch.Tensor, bicubic: bool) -> torch.Tensor:
    """Triangle, or Keys' cubic with a = -0.5; of distances."""
    if not bicubic:
        return (1.0 - x).clamp(min=0.0)
    a = -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))


def _precision_of_16_bits(largest: float) -> int:
    """The most bits behind the point with which the largest weight is an int16, as in torch."""
    precision = 0
    while precision < 22 and int(0.5 + largest * 2.0 ** (precision + 1)) < 2**15:
        precision += 1
    return precision


def _resample(x: torch.Tensor, dim: int, axis: Filter) -> torch.Tensor:
    """A weighted sum of neighbours along one dimension."""
    exact = axis.precision < 0
    shape = (-1,) + (1,) * (x.dim() - 1 - dim)
    weights, first = axis.weights.to(x.device), axis.first.to(x.device)
    total: torch.Tensor | float = 0.0 if exact else 2 ** (axis.precision - 1)
    for t in range(weights.shape[1]):
        pixels = x.index_select(dim, (first + t).clamp(max=x.shape[dim] - 1))
        total = total + weights[:, t].reshape(shape) * pixels
    assert isinstance(total, torch.Tensor)
    return total if exact else (total >> axis.precision).clamp(0, 255).to(torch.uint8)


def _check_patchify(
    frames: torch.Tensor,
    height: int,
    width: int,
    patch_size: int,
    arithmetic: int,
    vertical_first: bool,
) -> None:
    check(frames.dtype == torch.uint8, _OP, "frames must be uint8", frames.dtype)
    check_shape(_OP, "frames", frames, ("T", "H", "W", 3))
    sides = list(frames.shape[1:3])
    good = all(1 <= side <= _MAX_SIDE for side in sides)
    check(good, _OP, f"frames must have sides from 1 to {_MAX_SIDE}", sides)
    good = 1 <= patch_size <= _MAX_PATCH
    check(good, _OP, f"patch_size must be from 1 to {_MAX_PATCH}", patch_size)
    for name, side in (("height", height), ("width", width)):
        good = 1 <= side <= _MAX_SIDE and side % patch_size == 0
        check(good, _OP, f"{name} must be a multiple of {patch_size} up to {_MAX_SIDE}", side)
    good = 0 <= arithmetic < len(ARITHMETIC)
    check(good, _OP, "arithmetic must be 0 (pillow), 1 (uint8) or 2 (float32)", arithmetic)
    good = arithmetic == 0 or not vertical_first
    check(good, _OP, "vertical_first must be False but for pillow", vertical_first)


# ---- schema, fake ----

define(
    "patchify",
    "(Tensor frames, SymInt height, SymInt width, int patch_size=14, bool bicubic=True, "
    "int arithmetic=0, bool vertical_first=False) -> Tensor",
    patchify_reference,
)


@torch.library.register_fake("keye_ops::patchify")
def _(
    frames: torch.Tensor, height: int, width: int, patch_size: int = 14, *args: Any
) -> torch.Tensor:
    rows = frames.shape[0] * (height // patch_size) * (width // patch_size)
    return frames.new_empty(rows, 3, patch_size, patch_size)


# ---- public ----


def patchify(
    frames: torch.Tensor,
    size: tuple[int, int] | None = None,
    *,
    grid: tuple[int, int] | None = None,
    patch_size: int = 14,
    mode: str = "bicubic",
    arithmetic: str = "pillow",
    vertical_first: bool = False,
) -> torch.Tensor:
    """Resize frames with antialiasing and cut them into the patches that patch_embed takes.

    The filter is separable: rows first, then columns. ``arithmetic`` says how it rounds, so that
    the result is what a processor on the CPU gives:

    - ``"pillow"``: ``PIL.Image.resize``. Weights have 22 bits behind the point, each pass rounds
      to 8 bits. Images of both Keye-VL versions (bicubic). Equal bit for bit.
    - ``"uint8"``: ``interpolate(antialias=True)`` of uint8. Weights are int16, each pass rounds to
      8 bits. Frames of Keye-VL-1.5 videos (bilinear). Equal bit for bit.
    - ``"float32"``: ``interpolate(antialias=True)`` of fp32, then ``clamp(0, 255).round()``.
      Frames of Keye-VL-8B-Preview videos (bicubic). The one rounding to 8 bits is of fp32 sums:
      values within 1e-3 of a half may come out one level apart.

    There is no gradient.

    Args:
        frames: uint8 [T, H, W, 3], sides up to 32768; pixels packed (strides 3 and 1), rows and
            frames of any stride.
        size: (height, width) in pixels to resize to, multiples of ``patch_size``; None with no
            ``grid`` keeps the size.
        grid: (h, w) in patches, instead of ``size``.
        patch_size: side of a patch, up to 64.
        mode: ``"bicubic"`` (Keys, a = -0.5) or ``"bilinear"``.
        arithmetic: see above.
        vertical_first: columns first, for ``"pillow"``: Pillow 13 does so where
            ``H - height > max(0, 2 * (W - width))``, earlier ones never.

    Returns:
        uint8 [T * h * w, 3, patch_size, patch_size], patches of a frame in raster order, frames one
        after another, as :class:`PackedGrid` of ``(T, h, w)`` numbers them.

    Raises:
        RuntimeError: shapes, dtypes or sizes that do not fit.
    """
    check(frames.dim() == 4, _OP, "frames must be [T, H, W, 3]", list(frames.shape))
    check(size is None or grid is None, _OP, "size or grid must be None", (size, grid))
    if grid is not None:
        size = (grid[0] * patch_size, grid[1] * patch_size)
    height, width = frames.shape[1:3] if size is None else size
    check(mode in MODES, _OP, f"mode must be one of {', '.join(MODES)}", mode)
    known = arithmetic in ARITHMETIC
    check(known, _OP, f"arithmetic must be one of {', '.join(ARITHMETIC)}", arithmetic)
    options = (patch_size, mode == "bicubic", ARITHMETIC.index(arithmetic), vertical_first)
    args = (frames, height, width, *options)
    if torch.compiler.is_compiling() and not _is_packed(frames):
        args = (frames.clone(memory_format=torch.contiguous_format), *args[1:])
    if dispatch.use_native("patchify", frames, _unsupported(*args)):
        return dispatch.call(torch.ops.keye_ops.patchify.default, args)
    return patchify_reference(*args)


# What a block of the CUDA kernel holds; see csrc/patchify/patchify_launch.cuh.
_CUDA_MAX_SHRINK = 96
_CUDA_MAX_PATCH = 34


def _unsupported(
    frames: torch.Tensor, height: int, width: int, patch_size: int, *options: Any
) -> str | None:
    """Why the native kernel does not take the arguments, or None if it does."""
    if not _is_packed(frames):
        return "it needs packed pixels (strides 3 and 1)"
    if dispatch.kernel_device(frames) != "cuda":
        return None
    if options[-1]:
        return "it has no vertical_first on cuda"
    if patch_size % 2 or patch_size > _CUDA_MAX_PATCH:
        return f"it has no patch_size {patch_size} on cuda"
    shrink = max(frames.shape[1] / max(height, 1), frames.shape[2] / max(width, 1))
    if shrink > _CUDA_MAX_SHRINK:
        return f"it shrinks {_CUDA_MAX_SHRINK} times at most on cuda"
    return None


def _is_packed(frames: torch.Tensor) -> bool:
    width, channels = frames.stride()[2:]
    return channels == 1 and (width == 3 or frames.shape[2] <= 1)
