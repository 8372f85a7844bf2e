"""The demo's picture: patches over the image, frames with their tokens, time a stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_SLOW, _FAST = "#1f77b4", "#ff7f0e"
_PASS_COLOURS = ("#b0b0b0", "#2ca02c")


def draw(path: Path, image_path: Path, image: Any, clip: Any, passes: Sequence[Any]) -> Path:
    """Save the picture and give its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    frames = _frames(clip)
    columns = max(min(len(frames), 8), 1)
    rows = -(-len(frames) // columns)
    figure = plt.figure(figsize=(14, 6.2 + 1.9 * rows), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(6, 2 * rows))
    left, right = top.subplots(1, 2, width_ratios=(1, 1.25))
    _draw_image(left, image_path, image)
    _draw_times(right, passes)
    axes = np.atleast_1d(bottom.subplots(rows, columns)).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, (pixels, label, fast) in zip(axes, frames, strict=False):
        axis.axis("on")
        axis.imshow(pixels)
        axis.set_title(label, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set(color=_FAST if fast else _SLOW, linewidth=3)
    kinds = "blue: slow frames, orange: fast frames" if any(clip.is_fast) else "frames"
    bottom.suptitle(f"The clip as the model sees it ({kinds})", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _draw_image(axis: Any, path: Path, image: Any) -> None:
    """The image as resized, with the patch grid; thick lines are merged tokens."""
    from keye_ops.processing import unpatchify

    _, h, w = image.grid_thw
    pixels = unpatchify(image.pixel_values, image.grid_thw)[0]
    axis.imshow(_to_rgb(pixels))
    for step, width in ((14, 0.25), (28, 0.8)):
        axis.vlines(range(0, w * 14 + 1, step), 0, h * 14, colors="white", linewidths=width)
        axis.hlines(range(0, h * 14 + 1, step), 0, w * 14, colors="white", linewidths=width)
    axis.set(xlim=(0, w * 14), ylim=(h * 14, 0), xticks=[], yticks=[])
    axis.set_title(f"{path.name}: {h} x {w} patches, {h * w // 4} tokens", fontsize=11)


def _draw_times(axis: Any, passes: Sequence[Any]) -> None:
    """Horizontal bars: a group a stage, a bar a pass."""
    stages = list(passes[0].seconds)
    height = 0.8 / len(passes)
    for number, one in enumerate(passes):
        places = np.arange(len(stages)) + number * height
        values = [one.seconds[stage] for stage in stages]
        total = sum(values)
        bars = axis.barh(
            places, values, height, color=_PASS_COLOURS[number], label=f"{one.label}: {total:.2f} s"
        )
        axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axis.set_yticks(np.arange(len(stages)) + 0.4 - height / 2, stages)
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower right", frameon=False)
    axis.set_title("Time a stage, image and clip in one packed batch", fontsize=11)


def _frames(clip: Any) -> list[tuple[np.ndarray, str, bool]]:
    """(pixels, label, is fast) of every frame."""
    from keye_ops.processing import unpatchify

    frames, start = [], 0
    for t, h, w in clip.grid_thw:
        patches = clip.pixel_values[start : start + t * h * w]
        for pixels in unpatchify(patches, (t, h, w)):
            index = len(frames)
            fast = clip.is_fast[index]
            when = f"{clip.timestamps[index]:.1f} s, " if clip.timestamps else ""
            label = f"{when}{h} x {w}, {h * w // 4} tokens"
            frames.append((_to_rgb(pixels), label, fast))
        start += t * h * w
    return frames


def _to_rgb(frame: Any) -> np.ndarray:
    """uint8 [H, W, 3] from a normalised [3, H, W] frame."""
    array = np.asarray(frame, dtype=np.float32)
    array = array.transpose(1, 2, 0) if array.shape[0] == 3 else array
    return ((array * 0.5 + 0.5) * 255).round().clip(0, 255).astype(np.uint8)
