"""Videos as Keye-VL-8B-Preview sees them: every frame at one size, the clip as one block."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch

from keye_ops.processing.clip import Frame, PatchWriter, VideoOptions, VideoPatches
from keye_ops.processing.config import ProcessingConfig
from keye_ops.processing.image import resize_for_processor, resize_for_reading
from keye_ops.processing.resize import processor_resize, smart_resize
from keye_ops.processing.sampling import DEFAULT_FPS, frame_timestamps


def clip_from_frames(
    frames: Iterator[Frame],
    timestamps: list[float],
    fps: float,
    config: ProcessingConfig,
    options: VideoOptions,
    keep_uint8: bool,
) -> VideoPatches:
    """Frames of a file: one size that depends on how many there are."""
    first = next(frames)
    size = frame_size(first.shape[0], first.shape[1], len(timestamps), config, options)
    resized = (resize_bicubic(frame, size) for frame in chain([first], frames))
    return _patches(resized, timestamps, fps, config, keep_uint8)


def clip_from_images(
    pictures: list[Any], config: ProcessingConfig, options: VideoOptions, keep_uint8: bool
) -> VideoPatches:
    """Separate images: each is read like an image, and an odd count repeats the last one."""
    options.forbid(
        ("num_frames", "min_frames", "max_frames", "total_pixels", "video_start", "video_end"),
        "applies to video files, not to a sequence of images",
    )
    limits = config.limits
    frames = [
        np.array(
            resize_for_reading(
                picture,
                config,
                min_pixels=limits.image_min if options.min_pixels is None else options.min_pixels,
                max_pixels=limits.image_max if options.max_pixels is None else options.max_pixels,
                resized_height=options.resized_height,
                resized_width=options.resized_width,
            )
        )
        for picture in pictures
    ]
    frames += frames[-1:] * (len(frames) % 2)
    fps = DEFAULT_FPS if options.fps is None else options.fps
    timestamps = frame_timestamps(list(range(len(frames))), fps)
    return _patches(iter(frames), timestamps, fps, config, keep_uint8)


def frame_size(
    height: int, width: int, num_frames: int, config: ProcessingConfig, options: VideoOptions
) -> tuple[int, int]:
    """Size of the frames of a clip.

    The area is at least ``min_pixels`` (128 tokens). It is at most the lesser of 768 tokens and
    ``2 * total_pixels / num_frames``, but that limit is never below 1.05 times the minimum; a
    ``max_pixels`` option can only lower it.
    """
    limits = config.limits
    if options.resized_height is not None:
        # As for images, an explicit size is checked against the limits of an image.
        return smart_resize(
            options.resized_height,
            options.resized_width,
            factor=config.factor,
            min_pixels=limits.image_min,
            max_pixels=limits.image_max,
        )
    least = limits.frame_min if options.min_pixels is None else options.min_pixels
    total = limits.video_total if options.total_pixels is None else options.total_pixels
    most = max(min(limits.frame_max, total / num_frames * 2), int(least * 1.05))
    if options.max_pixels is not None:
        most = min(options.max_pixels, most)
    return smart_resize(height, width, factor=config.factor, min_pixels=least, max_pixels=most)


def resize_bicubic(frame: Frame, size: tuple[int, int]) -> Frame:
    """Resize uint8 [H, W, 3] to [height, width, 3]: antialiased bicubic, rounded to 8 bits."""
    if frame.shape[:2] == size:
        return frame
    picture = torch.from_numpy(frame).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(
        picture, list(size), mode="bicubic", align_corners=False, antialias=True
    )
    eight_bit = resized.clamp(0, 255).round().to(torch.uint8)
    return eight_bit[0].permute(1, 2, 0).contiguous().numpy()


def _patches(
    frames: Iterator[Frame],
    timestamps: list[float],
    fps: float,
    config: ProcessingConfig,
    keep_uint8: bool,
) -> VideoPatches:
    first = next(frames)
    height, width = processor_resize(
        *first.shape[:2],
        factor=config.factor,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
    )
    t, h, w = len(timestamps), height // config.patch_size, width // config.patch_size
    writer = PatchWriter(t * h * w, config, keep_uint8)
    for frame in chain([first], frames):
        # Every frame takes the size that follows from the first one.
        writer.add(resize_for_processor(frame, config, (height, width)))
    return VideoPatches(writer.patches, ((t, h, w),), tuple(timestamps), (False,) * t, fps)
