"""Videos: from a file or a sequence of images to patches."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from keye_ops.processing import video_preview, video_slow_fast
from keye_ops.processing.clip import VideoOptions, VideoPatches
from keye_ops.processing.config import ProcessingConfig
from keye_ops.processing.decode import (
    Progress,
    ShortVideoError,
    VideoInfo,
    decode_frames,
    probe_video,
    tracked,
)
from keye_ops.processing.image import load_image
from keye_ops.processing.sampling import frame_range, frame_timestamps


def process_video(
    video: str | Path | bytes | Sequence[Any],
    config: ProcessingConfig | None = None,
    options: VideoOptions | None = None,
    *,
    keep_uint8: bool = False,
    progress: Progress = None,
) -> VideoPatches:
    """Turn one video into patches, as Keye-VL-8B-Preview or Keye-VL-1.5 do.

    Preview resizes every frame to one size (antialiased bicubic in float32, rounded to 8 bits).
    1.5 tells slow from fast frames and gives each kind its size (antialiased bilinear in 8-bit
    arithmetic). Both are torch's interpolation, as there. Files are decoded frame by frame; what
    is held is the result and, for 1.5, the chosen frames where they fit 512 MiB (above that they
    are decoded twice).

    Args:
        video: a path, the bytes of a file, or a sequence of images (see :func:`load_image`) that
            are ``options.fps`` to the second.
        config: settings; None means Keye-VL-1.5 as released.
        options: what differs from the defaults.
        keep_uint8: return the patches before rescaling and normalising.
        progress: a callback ``(frames done, frames in all)``, or True for a tqdm bar; it follows
            the first pass over the frames.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, no video stream, no frames, or options that do not fit.
        ImportError: PyAV or Pillow is missing.
    """
    config = config or ProcessingConfig()
    options = options or VideoOptions()
    options.check(config.version)
    if isinstance(video, (str, Path, bytes)):
        return _process_file(video, config, options, keep_uint8, progress)
    pictures = [load_image(image, version=config.version) for image in video]
    if not pictures:
        raise ValueError("process_video: the sequence of frames is empty")
    if config.version == "preview":
        return video_preview.clip_from_images(pictures, config, options, keep_uint8)
    return video_slow_fast.clip_from_images(pictures, config, options, keep_uint8, progress)


def _process_file(
    video: str | Path | bytes,
    config: ProcessingConfig,
    options: VideoOptions,
    keep_uint8: bool,
    progress: Progress,
) -> VideoPatches:
    info = probe_video(video)
    try:
        return _process_known(video, info, config, options, keep_uint8, progress)
    except ShortVideoError as short:
        if short.decoded == 0:
            raise
        # A damaged tail, or packets before the first key frame: choose among what does decode.
        warnings.warn(f"{short}; frames are chosen among those", stacklevel=3)
        info = replace(info, num_frames=short.decoded)
    return _process_known(video, info, config, options, keep_uint8, progress)


def _process_known(
    video: str | Path | bytes,
    info: VideoInfo,
    config: ProcessingConfig,
    options: VideoOptions,
    keep_uint8: bool,
    progress: Progress,
) -> VideoPatches:
    indices = options.indices(info.num_frames, info.fps, config.version)
    timestamps = frame_timestamps(indices, info.fps)
    start, end = frame_range(info.num_frames, info.fps, options.video_start, options.video_end)
    fps = len(indices) / (end - start + 1) * info.fps
    if config.version == "preview":
        frames = tracked(decode_frames(video, indices), len(indices), progress)
        return video_preview.clip_from_frames(frames, timestamps, fps, config, options, keep_uint8)
    replay = video_slow_fast.Replay(lambda: decode_frames(video, indices), len(indices), progress)
    return video_slow_fast.clip_from_frames(replay, timestamps, fps, config, options, keep_uint8)
