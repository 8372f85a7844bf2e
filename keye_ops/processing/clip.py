"""What goes into and comes out of the processing of one video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from keye_ops.model_version import Version
from keye_ops.processing.config import ProcessingConfig
from keye_ops.processing.image import normalize, patchify
from keye_ops.processing.sampling import sample_indices

Frame = np.ndarray  # uint8 [H, W, 3]

_PREVIEW_ONLY = ("num_frames", "min_frames", "resized_height", "resized_width")


class VideoPatches(NamedTuple):
    """One video ready for the vision tower.

    pixel_values: [N, 3, 14, 14] float32 in [-1, 1], or uint8; frame after frame, raster order.
    grid_thw: one row (t, h, w) for the clip (Keye-VL-8B-Preview), or a row (1, h, w) a frame
        (Keye-VL-1.5).
    timestamps: seconds, one a frame; None for frames given to Keye-VL-1.5 without a rate.
    is_fast: one flag a frame; all False in Preview.
    fps: frames a second after sampling; ``1 / fps`` is Preview's seconds per grid step.
    """

    pixel_values: Tensor
    grid_thw: tuple[tuple[int, int, int], ...]
    timestamps: tuple[float, ...] | None
    is_fast: tuple[bool, ...]
    fps: float


@dataclass(frozen=True)
class VideoOptions:
    """What a caller may ask of one video; None takes the version's default.

    See :func:`sample_indices` for the fields that choose frames. ``min_pixels`` and ``max_pixels``
    bound the area of a frame, ``total_pixels`` the sum over the video. ``num_frames``,
    ``min_frames`` and the ``resized_`` pair exist in Keye-VL-8B-Preview only,
    ``min_frame_similarity`` in Keye-VL-1.5 only.
    """

    fps: float | None = None
    num_frames: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: float | None = None
    video_start: float | None = None
    video_end: float | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    min_frame_similarity: float | None = None

    def check(self, version: Version) -> None:
        """Raise ValueError for a field that the version does not have, or half of a pair."""
        self.forbid(
            ("min_frame_similarity",) if version == "preview" else _PREVIEW_ONLY,
            f"does not exist in version {version!r}",
        )
        if (self.resized_height is None) != (self.resized_width is None):
            raise ValueError(
                "process_video: resized_height and resized_width go together, "
                f"got {self.resized_height} and {self.resized_width}"
            )

    def forbid(self, names: tuple[str, ...], reason: str) -> None:
        """Raise ValueError if one of the named fields is set."""
        for name in names:
            if getattr(self, name) is not None:
                raise ValueError(f"process_video: {name} {reason}, got {getattr(self, name)}")

    def indices(self, total_frames: int, video_fps: float, version: Version) -> list[int]:
        """:func:`sample_indices` with these options."""
        return sample_indices(
            total_frames,
            video_fps,
            version=version,
            fps=self.fps,
            num_frames=self.num_frames,
            min_frames=self.min_frames,
            max_frames=self.max_frames,
            min_pixels=self.min_pixels,
            total_pixels=self.total_pixels,
            video_start=self.video_start,
            video_end=self.video_end,
        )


class PatchWriter:
    """Fills one preallocated tensor of patches, frame after frame."""

    def __init__(self, total: int, config: ProcessingConfig, keep_uint8: bool) -> None:
        p = config.patch_size
        dtype = torch.uint8 if keep_uint8 else torch.float32
        self.patches = torch.empty((total, 3, p, p), dtype=dtype)
        self._config, self._keep_uint8, self._row = config, keep_uint8, 0

    def add(self, frame: Frame | Tensor) -> None:
        """Append the patches of a uint8 frame, [H, W, 3] or [3, H, W]."""
        cut, _ = patchify(frame[None], patch_size=self._config.patch_size)
        rows = slice(self._row, self._row + cut.shape[0])
        self.patches[rows] = cut if self._keep_uint8 else normalize(cut, self._config)
        self._row = rows.stop
