"""Preprocessing settings of each model version, and what a checkpoint folder says of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from keye_ops.json_file import read_json
from keye_ops.model_version import Version, check_version, version_of

PIXELS_PER_TOKEN = 28 * 28  # one merged token covers 2 x 2 patches of 14 x 14 pixels

_BICUBIC, _BILINEAR = 3, 2  # Pillow's codes, which preprocessor_config.json uses
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class PixelLimits:
    """Pixel budgets applied when media are read, before the image processor's own limits."""

    image_min: int
    image_max: int
    frame_min: int
    frame_max: int
    video_total: int


LIMITS: dict[Version, PixelLimits] = {
    "preview": PixelLimits(
        image_min=4 * PIXELS_PER_TOKEN,
        image_max=16384 * PIXELS_PER_TOKEN,
        frame_min=128 * PIXELS_PER_TOKEN,
        frame_max=768 * PIXELS_PER_TOKEN,
        video_total=int(128000 * PIXELS_PER_TOKEN * 0.9),
    ),
    "1.5": PixelLimits(
        image_min=4 * PIXELS_PER_TOKEN,
        image_max=20480 * PIXELS_PER_TOKEN,
        frame_min=48 * PIXELS_PER_TOKEN,
        frame_max=768 * PIXELS_PER_TOKEN,
        video_total=65536 * PIXELS_PER_TOKEN,
    ),
}


@dataclass(frozen=True)
class ProcessingConfig:
    """Settings of the image processor.

    ``min_pixels`` and ``max_pixels`` are the processor's own limits; images are first brought
    within ``limits`` and then within these. ``resample`` is Pillow's code of the filter of that
    second step (3 bicubic in Keye-VL-8B-Preview, 2 bilinear in Keye-VL-1.5; None picks by
    version).
    """

    version: Version = "1.5"
    min_pixels: int = 4 * PIXELS_PER_TOKEN
    max_pixels: int = 1280 * PIXELS_PER_TOKEN
    patch_size: int = 14
    merge_size: int = 2
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    resample: int | None = None

    def __post_init__(self) -> None:
        check_version("ProcessingConfig", self.version)
        if self.resample is None:
            default = _BICUBIC if self.version == "preview" else _BILINEAR
            object.__setattr__(self, "resample", default)
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(
                "ProcessingConfig: need 0 < min_pixels <= max_pixels, "
                f"got {self.min_pixels} and {self.max_pixels}"
            )

    @property
    def factor(self) -> int:
        """Side of a merged token in pixels; image sides are multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def limits(self) -> PixelLimits:
        """Budgets of this version for images and videos as they are read."""
        return LIMITS[self.version]

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, version: Version | None = None
    ) -> ProcessingConfig:
        """Read ``preprocessor_config.json`` of a checkpoint folder.

        Without that file the released settings are used. A file that omits a field gets the
        default of the released processor class for it. ``version`` None reads it from
        ``config.json``.

        Raises:
            FileNotFoundError: the folder, or ``config.json`` when it is needed, is missing.
            ValueError: a setting that neither version has.
        """
        folder = existing_folder("ProcessingConfig.from_pretrained", folder)
        version = version or detect_version(folder)
        path = folder / "preprocessor_config.json"
        if not path.exists():
            return cls(version=version)
        raw = read_json(path)
        for name, needed in {
            "temporal_patch_size": 1,
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
        }.items():
            if raw.get(name, needed) != needed:
                raise ValueError(f"{path}: {name} must be {needed}, got {raw[name]}")
        size = raw.get("size") or {}
        defaults = cls(version=version)
        return cls(
            version=version,
            min_pixels=_first(raw, size, "min_pixels", "shortest_edge", defaults.min_pixels),
            max_pixels=_first(raw, size, "max_pixels", "longest_edge", defaults.max_pixels),
            patch_size=raw.get("patch_size", defaults.patch_size),
            merge_size=raw.get("merge_size", defaults.merge_size),
            image_mean=_per_channel(path, "image_mean", raw.get("image_mean", _CLIP_MEAN)),
            image_std=_per_channel(path, "image_std", raw.get("image_std", _CLIP_STD)),
            rescale_factor=raw.get("rescale_factor", defaults.rescale_factor),
            resample=raw.get("resample"),
        )


def detect_version(folder: str | Path) -> Version:
    """Tell the model version from the names in ``config.json``.

    Raises:
        FileNotFoundError: the folder or its ``config.json`` is missing.
        ValueError: a broken file, or names that are missing, unknown or of different versions.
    """
    path = existing_folder("detect_version", folder) / "config.json"
    try:
        return version_of(read_json(path), str(path))
    except ValueError as error:
        raise ValueError(f"{error}; or pass version='preview' or '1.5'") from error


def existing_folder(caller: str, folder: str | Path) -> Path:
    """Return ``folder`` as a Path, or raise FileNotFoundError."""
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{caller}: checkpoint folder not found: {path}")
    return path


def _first(raw: dict, size: dict, name: str, edge: str, default: int) -> int:
    """Take a pixel limit from where any of the released file formats keeps it."""
    for source, key in ((raw, name), (size, name), (size, edge)):
        if source.get(key) is not None:
            return int(source[key])
    return default


def _per_channel(path: Path, name: str, value: object) -> tuple[float, float, float]:
    values = [value] * 3 if isinstance(value, (int, float)) else list(value or ())
    if len(values) != 3:
        raise ValueError(f"{path}: {name} must be one or three numbers, got {value}")
    return tuple(float(v) for v in values)
