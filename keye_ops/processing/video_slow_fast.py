"""Videos as Keye-VL-1.5 sees them: slow and fast frames of two sizes, each its own block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from keye_ops.processing.clip import Frame, PatchWriter, VideoOptions, VideoPatches
from keye_ops.processing.config import ProcessingConfig
from keye_ops.processing.decode import Progress, tracked
from keye_ops.processing.image import resize_for_reading
from keye_ops.processing.sampling import DEFAULT_FPS, frame_timestamps
from keye_ops.processing.slow_fast import (
    MIN_FRAME_SIMILARITY,
    classify_frames,
    resize_bilinear,
    slow_fast_sizes,
)

# Frames are needed twice; they are kept up to this size, and decoded again above it.
HELD_BYTES = 512 * 2**20


def clip_from_frames(
    frames: Iterable[Frame],
    timestamps: list[float] | None,
    fps: float,
    config: ProcessingConfig,
    options: VideoOptions,
    keep_uint8: bool,
) -> VideoPatches:
    """Two passes over frames of one size: tell slow from fast, then resize each kind."""
    shape: list[tuple[int, int]] = []
    similarity = options.min_frame_similarity
    is_fast = classify_frames(
        _noting_shape(frames, shape),
        min_frame_similarity=MIN_FRAME_SIMILARITY if similarity is None else similarity,
    )
    sizes = slow_fast_sizes(
        *shape[0],
        num_slow=is_fast.count(False),
        num_fast=is_fast.count(True),
        min_pixels=options.min_pixels,
        max_pixels=options.max_pixels,
        total_pixels=options.total_pixels,
    )
    p = config.patch_size
    chosen = [sizes.fast if fast else sizes.slow for fast in is_fast]
    grid = tuple((1, height // p, width // p) for height, width in chosen)
    writer = PatchWriter(sum(h * w for _, h, w in grid), config, keep_uint8)
    for frame, size in zip(frames, chosen, strict=True):
        writer.add(resize_bilinear(frame, size))
    seconds = None if timestamps is None else tuple(timestamps)
    return VideoPatches(writer.patches, grid, seconds, tuple(is_fast), fps)


def clip_from_images(
    pictures: list[Any],
    config: ProcessingConfig,
    options: VideoOptions,
    keep_uint8: bool,
    progress: Progress,
) -> VideoPatches:
    """Separate images: each is fitted to the limits of a frame, then they are treated as a clip."""
    limits = config.limits
    fps = DEFAULT_FPS if options.fps is None else options.fps
    indices = options.indices(len(pictures), fps, "1.5")
    frames = [
        np.array(
            resize_for_reading(
                pictures[index],
                config,
                min_pixels=limits.frame_min if options.min_pixels is None else options.min_pixels,
                max_pixels=limits.frame_max if options.max_pixels is None else options.max_pixels,
            )
        )
        for index in indices
    ]
    sizes = {frame.shape[:2] for frame in frames}
    if len(sizes) > 1:
        raise ValueError(
            f"process_video: frames must have one size after resizing, got {sorted(sizes)}"
        )
    timestamps = None if options.fps is None else frame_timestamps(indices, fps)
    replay = Replay(lambda: iter(frames), len(frames), progress)
    return clip_from_frames(replay, timestamps, fps, config, options, keep_uint8)


class Replay:
    """Frames that can be walked through more than once, kept in memory where they fit."""

    def __init__(
        self, decode: Callable[[], Iterator[Frame]], count: int, progress: Progress
    ) -> None:
        self._decode, self._count, self._progress = decode, count, progress
        self._held: list[Frame] | None = None

    def __iter__(self) -> Iterator[Frame]:
        if self._held is not None:
            yield from self._held
            return
        progress, self._progress = self._progress, None
        held: list[Frame] = []
        for frame in tracked(self._decode(), self._count, progress):
            if frame.nbytes * self._count <= HELD_BYTES:
                held.append(frame)
            yield frame
        if len(held) == self._count:
            self._held = held


def _noting_shape(frames: Iterable[Frame], shape: list[tuple[int, int]]) -> Iterator[Frame]:
    for frame in frames:
        if not shape:
            shape.append(frame.shape[:2])
        yield frame
