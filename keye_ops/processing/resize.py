"""The sizes that images and frames are resized to."""

from __future__ import annotations

import math

MAX_RATIO = 200


def smart_resize(
    height: int,
    width: int,
    *,
    factor: int = 28,
    min_pixels: int = 4 * 784,
    max_pixels: int = 16384 * 784,
) -> tuple[int, int]:
    """Nearest size with sides that are multiples of ``factor`` and an area within the limits.

    Sides are rounded to the nearest multiple (ties to even) and are never below ``factor``. If the
    area is then outside ``[min_pixels, max_pixels]`` both sides are scaled by one common ratio and
    rounded towards the inside; for extreme aspect ratios the clamp to ``factor`` can still leave
    the area above the limit. The rule that Keye-VL-8B-Preview and Keye-VL-1.5 apply when they read
    media.

    Args:
        height: pixels, at least 1.
        width: pixels, at least 1.
        factor: multiple that both sides must have.
        min_pixels: least area.
        max_pixels: greatest area; may be fractional.

    Returns:
        ``(height, width)`` in pixels.

    Raises:
        ValueError: a side below 1, or a ratio of the sides above 200.
    """
    _check(height, width, "smart_resize")
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = math.floor(height / shrink / factor) * factor
        new_width = math.floor(width / shrink / factor) * factor
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return max(factor, new_height), max(factor, new_width)


def processor_resize(
    height: int,
    width: int,
    *,
    factor: int = 28,
    min_pixels: int = 4 * 784,
    max_pixels: int = 1280 * 784,
) -> tuple[int, int]:
    """The image processor's variant of :func:`smart_resize`.

    It differs in two ways. An image with a side below ``factor`` is first scaled up, keeping its
    ratio, until that side equals ``factor``; and the default limits are the processor's. For sizes
    that :func:`smart_resize` has already produced only the limits matter.
    """
    _check(height, width, "processor_resize", ratio=False)
    if height < factor:
        width = round(width * factor / height)
        height = factor
    if width < factor:
        height = round(height * factor / width)
        width = factor
    return smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)


def _check(height: int, width: int, caller: str, ratio: bool = True) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"{caller}: height and width must be at least 1, got {height}x{width}")
    if ratio and max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(
            f"{caller}: max/min side ratio must be <= {MAX_RATIO}, got {height}x{width}"
        )
