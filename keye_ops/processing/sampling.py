"""Which frames of a video are looked at, and when they happen."""

from __future__ import annotations

import math

import torch

from keye_ops.model_version import Version, check_version
from keye_ops.processing.config import LIMITS

DEFAULT_FPS = 2.0
_FRAME_FACTOR = 2  # Keye-VL-8B-Preview takes an even number of frames
_PREVIEW_MIN_FRAMES, _PREVIEW_MAX_FRAMES = 4, 768


def sample_indices(
    total_frames: int,
    video_fps: float,
    *,
    version: Version,
    fps: float | None = None,
    num_frames: int | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    min_pixels: int | None = None,
    total_pixels: float | None = None,
    video_start: float | None = None,
    video_end: float | None = None,
) -> list[int]:
    """Indices of the frames to use, evenly spaced from first to last.

    Keye-VL-8B-Preview takes ``fps`` frames a second, at least 4 and at most 768, and an even
    number of them. Keye-VL-1.5 takes ``min(fps, video_fps)`` frames a second, at most
    ``total_pixels / min_pixels`` (1365); where that gives none, because the clip is shorter than
    ``1/fps``, it takes one.

    Args:
        total_frames: frames in the video.
        video_fps: frames a second of the video.
        version: which rule.
        fps: frames a second wanted, 2 by default.
        num_frames: exact count wanted instead of ``fps``, rounded to even (Preview).
        min_frames: at least so many (Preview; default 4).
        max_frames: at most so many.
        min_pixels: least area of a frame, which bounds the count (1.5).
        total_pixels: budget of the whole video, which bounds the count (1.5).
        video_start: seconds; frames before it are left out.
        video_end: seconds; frames after it are left out.

    Raises:
        ValueError: no frames, a rate that is not positive, an empty time range, or a count outside
            ``[2, total_frames]`` (Preview).
    """
    check_version("sample_indices", version)
    _positive("total_frames", total_frames)
    _positive("video_fps", video_fps)
    for name, value in (("fps", fps), ("num_frames", num_frames), ("max_frames", max_frames)):
        if value is not None:
            _positive(name, value)
    start, end = frame_range(total_frames, video_fps, video_start, video_end)
    total = end - start + 1
    if version == "preview":
        count = _preview_count(total, video_fps, fps, num_frames, min_frames, max_frames)
    else:
        limits = LIMITS["1.5"]
        budget = limits.video_total if total_pixels is None else total_pixels
        least = limits.frame_min if min_pixels is None else min_pixels
        _positive("min_pixels", least)
        most = int(budget / least)
        most = most if max_frames is None else min(max_frames, most)
        rate = min(DEFAULT_FPS if fps is None else fps, video_fps)
        count = max(1, min(int(total / video_fps * rate), most))
    return torch.linspace(start, end, count).round().long().tolist()


def frame_range(
    total_frames: int, video_fps: float, video_start: float | None, video_end: float | None
) -> tuple[int, int]:
    """First and last frame index inside ``[video_start, video_end]`` seconds."""
    if video_start is None and video_end is None:
        return 0, total_frames - 1
    duration = total_frames / video_fps
    clamped_start = min(max(video_start or 0.0, 0.0), duration)
    clamped_end = duration if video_end is None else min(max(video_end, 0.0), duration)
    start = math.ceil(clamped_start * video_fps)
    end = min(math.floor(clamped_end * video_fps), total_frames - 1)
    if start >= end:
        raise ValueError(
            f"sample_indices: the range {video_start} s to {video_end} s holds no two "
            f"frames of a video of {duration:.2f} s ({total_frames} frames, {video_fps:g} a second)"
        )
    return start, end


def frame_timestamps(indices: list[int], video_fps: float) -> list[float]:
    """Seconds at which frames happen, index / fps in float32 as the prompt text rounds them."""
    _positive("video_fps", video_fps)
    return torch.tensor([(1 / video_fps) * i for i in indices], dtype=torch.float32).tolist()


def _preview_count(
    total: int,
    video_fps: float,
    fps: float | None,
    num_frames: int | None,
    min_frames: int | None,
    max_frames: int | None,
) -> int:
    if num_frames is not None:
        if fps is not None:
            raise ValueError(
                f"sample_indices: give fps or num_frames, not both, got {fps} and {num_frames}"
            )
        count = round(num_frames / _FRAME_FACTOR) * _FRAME_FACTOR
    else:
        least = _PREVIEW_MIN_FRAMES if min_frames is None else min_frames
        most = min(_PREVIEW_MAX_FRAMES, total) if max_frames is None else max_frames
        least = math.ceil(least / _FRAME_FACTOR) * _FRAME_FACTOR
        most = most // _FRAME_FACTOR * _FRAME_FACTOR
        wanted = total / video_fps * (DEFAULT_FPS if fps is None else fps)
        wanted = min(max(wanted, least), most, total)
        count = math.floor(wanted / _FRAME_FACTOR) * _FRAME_FACTOR
    if not _FRAME_FACTOR <= count <= total:
        raise ValueError(
            f"sample_indices: the number of frames must be in [{_FRAME_FACTOR}, {total}], "
            f"got {count}"
        )
    return count


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"sample_indices: {name} must be positive, got {value}")
