"""Keye-VL-1.5's slow and fast frames: which is which, and how many pixels each kind may have."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from keye_ops.processing.config import LIMITS, PIXELS_PER_TOKEN
from keye_ops.processing.resize import smart_resize

FAST_TOKEN_RATIO = 0.3
MIN_FRAME_SIMILARITY = 0.9

_PATCH = 28
_PATCH_THRESHOLD = 0.7
_DARK_NORM = 0.01
_COMPARE_MAX_PIXELS = 256 * PIXELS_PER_TOKEN


class SlowFastSizes(NamedTuple):
    """(height, width) in pixels of slow and of fast frames."""

    slow: tuple[int, int]
    fast: tuple[int, int]


def classify_frames(
    frames: Iterable[np.ndarray], *, min_frame_similarity: float = MIN_FRAME_SIMILARITY
) -> list[bool]:
    """Tell fast frames (True) from slow ones (False).

    The first frame is slow. A later frame is slow, and becomes the one to compare with, when it is
    less than ``min_frame_similarity`` similar to the last slow frame; otherwise it is fast. Frames
    are compared at 256 tokens at most; only two of them are held at a time.

    Args:
        frames: uint8 [H, W, 3] each, RGB, all of one size.
        min_frame_similarity: in [0, 1]; 0 makes every frame after the first fast.
    """
    flags: list[bool] = []
    key: Tensor | None = None
    for frame in frames:
        patches = hsv_patches(_shrink(frame))
        fast = key is not None and frame_similarity(key, patches) >= min_frame_similarity
        if not fast:
            key = patches
        flags.append(fast)
    return flags


def frame_similarity(first: Tensor, second: Tensor) -> float:
    """Share of the patches of two frames whose cosine similarity is above 0.7.

    Patches that are dark (norm below 0.01) in both frames do not count; two frames with no other
    patches are equal, similarity 1.

    Args:
        first: [P, 2352] float32 from :func:`hsv_patches`.
        second: the same shape.
    """
    norm_1 = first.norm(dim=-1, keepdim=True) + 1e-8
    norm_2 = second.norm(dim=-1, keepdim=True) + 1e-8
    cosine = (first / norm_1 * (second / norm_2)).sum(dim=-1)
    lit = ((norm_1 >= _DARK_NORM) | (norm_2 >= _DARK_NORM)).squeeze(-1)
    if not lit.any():
        return 1.0
    return (cosine[lit] > _PATCH_THRESHOLD).float().mean().item()


def hsv_patches(frame: Tensor) -> Tensor:
    """Cut uint8 RGB [3, H, W] into 28x28 patches of HSV values: float32 [H/28*W/28, 2352]."""
    hsv = rgb_to_hsv(frame)
    _, height, width = hsv.shape
    h, w = height // _PATCH, width // _PATCH
    cut = hsv.reshape(3, h, _PATCH, w, _PATCH).permute(1, 3, 0, 2, 4)
    return cut.reshape(h * w, 3 * _PATCH * _PATCH).float()


def rgb_to_hsv(rgb: Tensor) -> Tensor:
    """8-bit HSV of 8-bit RGB, uint8 [3, ...] to uint8 [3, ...]; hue is in [0, 180).

    Divisions go through OpenCV's 12-bit fixed-point tables, so that every one of the 2^24 colours
    gives the integers that OpenCV gives.
    """
    if rgb.dtype != torch.uint8 or rgb.ndim < 1 or rgb.shape[0] != 3:
        raise ValueError(
            f"rgb_to_hsv: need uint8 of shape [3, ...], got {rgb.dtype} {tuple(rgb.shape)}"
        )
    saturation_table, hue_table = _division_tables()
    red, green, blue = rgb.int()
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    saturation = (spread * saturation_table[value] + 2048) >> 12
    sector = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
    )
    hue = (sector * hue_table[spread] + 2048) >> 12
    hue = torch.where(hue < 0, hue + 180, hue)
    return torch.stack((hue, saturation, value)).to(torch.uint8)


def slow_fast_sizes(
    height: int,
    width: int,
    *,
    num_slow: int,
    num_fast: int,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    total_pixels: float | None = None,
) -> SlowFastSizes:
    """Sizes of slow and fast frames that fit the budget of the whole video.

    With a slow frame limited to x tokens, the video takes ``num_slow * x + num_fast * f`` tokens,
    ``f = max(int(0.3 * x), least)``. A binary search returns the first x that exceeds the budget,
    or the upper bound, so the budget can be overshot by a little, as in the released model. Fast
    frames then get 0.3 of the tokens that a slow frame really has, and at least 48.

    Args:
        height: of the frames, pixels.
        width: of the frames, pixels.
        num_slow: number of slow frames.
        num_fast: number of fast frames.
        min_pixels: least area of a frame; default, and least possible, 48 tokens.
        max_pixels: greatest area of a slow frame; default 768 tokens.
        total_pixels: budget of the video; default 65,536 tokens.
    """
    limits = LIMITS["1.5"]
    least = max(int(limits.frame_min if min_pixels is None else min_pixels), limits.frame_min)
    most = limits.frame_max if max_pixels is None else max_pixels
    budget = limits.video_total if total_pixels is None else total_pixels
    low, high = least / PIXELS_PER_TOKEN, most / PIXELS_PER_TOKEN
    while low < high:
        middle = int(low + high) // 2
        fast_tokens = max(int(FAST_TOKEN_RATIO * middle), least // PIXELS_PER_TOKEN)
        if (num_slow * middle + num_fast * fast_tokens) * PIXELS_PER_TOKEN > budget:
            high = middle
        else:
            low = middle + 1
    slow = smart_resize(height, width, min_pixels=least, max_pixels=low * PIXELS_PER_TOKEN)
    fast_tokens = int(slow[0] * slow[1] / PIXELS_PER_TOKEN * FAST_TOKEN_RATIO)
    fast_max = max(fast_tokens * PIXELS_PER_TOKEN, limits.frame_min)
    return SlowFastSizes(slow, smart_resize(height, width, min_pixels=least, max_pixels=fast_max))


def resize_bilinear(frame: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Resize uint8 [H, W, 3] to uint8 [3, height, width]: antialiased bilinear in 8 bits."""
    picture = torch.from_numpy(frame).permute(2, 0, 1)
    if tuple(picture.shape[1:]) == tuple(size):
        return picture
    resized = torch.nn.functional.interpolate(
        picture[None], list(size), mode="bilinear", antialias=True
    )
    return resized[0]


def _shrink(frame: np.ndarray) -> Tensor:
    """The size at which frames are compared."""
    size = smart_resize(
        *frame.shape[:2], min_pixels=LIMITS["1.5"].frame_min, max_pixels=_COMPARE_MAX_PIXELS
    )
    return resize_bilinear(frame, size)


@lru_cache(maxsize=1)
def _division_tables() -> tuple[Tensor, Tensor]:
    """round(255 * 2^12 / i) and round(180 * 2^12 / (6 i)) for i in 0..255, with 0 for i = 0."""
    divisor = torch.arange(1, 256, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.int32)
    return tuple(
        torch.cat((zero, (scale * 4096 / divisor).round().int())) for scale in (255.0, 180.0 / 6)
    )
