"""Decoding of video files with PyAV, one frame at a time."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Progress = bool | Callable[[int, int], None] | None
T = TypeVar("T")


@dataclass(frozen=True)
class VideoInfo:
    """What has to be known of a video before its frames are chosen."""

    name: str
    num_frames: int
    fps: float


class ShortVideoError(ValueError):
    """Fewer frames could be decoded than the container holds; ``decoded`` says how many."""

    def __init__(self, name: str, decoded: int, expected: int) -> None:
        super().__init__(
            f"decode_frames: only {decoded} of the {expected} frames of {name} can be decoded"
        )
        self.decoded = decoded


def probe_video(video: str | Path | bytes) -> VideoInfo:
    """Count the frames of a video file, without decoding them, and read its average rate.

    Args:
        video: a path, a ``file://`` address, or the bytes of a video file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a video, no video stream, no frames, or no frame rate.
        ImportError: PyAV is missing.
    """
    with _opened(video, "probe_video") as (container, stream, name):
        count = sum(
            1 for packet in container.demux(stream) if packet.size and not _discarded(packet)
        )
        if count == 0:
            raise ValueError(f"probe_video: {name} has a video stream without frames")
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise ValueError(f"probe_video: {name} does not state its frame rate")
        return VideoInfo(name, count, float(rate))


def decode_frames(video: str | Path | bytes, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Decode a video and yield the frames at ``indices``, one at a time.

    Args:
        video: as for :func:`probe_video`.
        indices: strictly increasing positions in display order.

    Yields:
        uint8 [H, W, 3] RGB by FFmpeg's own colour conversion, turned upright where the file carries
        a rotation, all of the first frame's size.

    Raises:
        ShortVideoError: the stream ends before the last index.
        ValueError: as :func:`probe_video`.
    """
    wanted = iter(indices)
    target = next(wanted, None)
    position, size = 0, None
    with _opened(video, "decode_frames") as (container, stream, name):
        if target is None:
            return
        stream.thread_type = "AUTO"
        for frame in _decoded(container, stream):
            if position == target:
                size = size or (frame.width, frame.height)
                yield _upright(frame, size)
                target = next(wanted, None)
                if target is None:
                    return
            position += 1
    raise ShortVideoError(name, position, max(indices) + 1)


def tracked(
    items: Iterable[T], total: int, progress: Progress, description: str = "frames"
) -> Iterator[T]:
    """Pass ``items`` on, reporting ``(done, total)`` to a callback, or to tqdm for True."""
    if progress is True:
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise ImportError('a progress bar needs tqdm: pip install "keye-ops[cli]"') from error
        yield from tqdm(items, total=total, desc=description)
        return
    for done, item in enumerate(items, start=1):
        yield item
        if progress:
            progress(done, total)


@contextmanager
def _opened(video: str | Path | bytes, caller: str) -> Iterator[tuple[Any, Any, str]]:
    """Open a video and its first video stream; every error names the file."""
    try:
        import av
    except ImportError as error:
        raise ImportError('reading videos needs PyAV: pip install "keye-ops[video]"') from error
    source, name = _source(video, caller)
    try:
        container = av.open(source)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise ValueError(f"{caller}: cannot read {name} as a video ({error})") from error
    with container:
        if not container.streams.video:
            raise ValueError(f"{caller}: {name} has no video stream")
        try:
            yield container, container.streams.video[0], name
        except av.FFmpegError as error:
            raise ValueError(f"{caller}: cannot read {name} as a video ({error})") from error


def _source(video: str | Path | bytes, caller: str) -> tuple[Any, str]:
    if isinstance(video, bytes):
        return io.BytesIO(video), "<bytes>"
    if not isinstance(video, (str, Path)):
        raise ValueError(f"{caller}: need a path or bytes, got {type(video).__name__}")
    text = str(video)
    if text.startswith(("http://", "https://")):
        raise ValueError(f"{caller}: addresses are not fetched; download {text} first")
    path = Path(text.removeprefix("file://"))
    if not path.is_file():
        raise FileNotFoundError(f"{caller}: no such file: {path}")
    return str(path), str(path)


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Frames in display order; packets that cannot be decoded are passed over."""
    import av

    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            continue
        yield from frames


def _upright(frame: Any, size: tuple[int, int]) -> np.ndarray:
    rgb = frame.reformat(width=size[0], height=size[1], format="rgb24").to_ndarray()
    # A quarter turn is counted anticlockwise by both PyAV and numpy.
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(rgb, turns))


def _discarded(packet: Any) -> bool:
    return bool(getattr(packet, "is_discard", False))
