"""Images: reading, resizing, normalising and cutting into patches."""

from __future__ import annotations

import base64
import binascii
import io
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from keye_ops.model_version import Version, check_version
from keye_ops.processing.config import ProcessingConfig
from keye_ops.processing.resize import processor_resize, smart_resize

if TYPE_CHECKING:
    from PIL.Image import Image

_BICUBIC = 3  # Pillow's code


class ImagePatches(NamedTuple):
    """One image ready for the vision tower.

    pixel_values: [h*w, 3, 14, 14] float32 in [-1, 1], or uint8; raster order.
    grid_thw: (1, h, w) in patches.
    """

    pixel_values: Tensor
    grid_thw: tuple[int, int, int]


def load_image(image: Any, *, version: Version = "1.5") -> Image:
    """Read an image as 8-bit RGB.

    Args:
        image: a path, a ``file://`` address, a ``data:image/...;base64,`` address, the bytes of an
            image file, a PIL image, or a uint8 numpy array or torch tensor of shape [H, W], [H, W,
            C] or [C, H, W] with C of 1, 3 or 4 (an array is read as channels last, a tensor as
            channels first, when both fit).
        version: decides what happens to RGBA: Keye-VL-8B-Preview pastes it on white, Keye-VL-1.5
            drops alpha.

    Returns:
        A PIL image of mode RGB.

    As in both released models an EXIF orientation is *not* applied; use
    ``PIL.ImageOps.exif_transpose`` first where that is wanted. The one difference from them:
    16-bit grayscale is scaled to 8 bits, where plain conversion would turn every value above 255
    white.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable file, wrong dtype or shape, or a mode with no 8-bit meaning (32-bit
            int, float).
        ImportError: Pillow is missing.
    """
    check_version("load_image", version)
    pil = _pillow()
    if isinstance(image, (np.ndarray, Tensor)):
        image = pil.fromarray(_array_hwc(image))
    elif not isinstance(image, pil.Image):
        image = _open(pil, image)
    if image.mode.startswith("I;16"):
        deep = np.asarray(image).astype(np.uint32)
        image = pil.fromarray(((deep + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"load_image: need 8-bit or 16-bit pixels, got mode {image.mode!r} (32 bits a pixel)"
        )
    if version == "preview" and image.mode == "RGBA":
        white = pil.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def process_image(
    image: Any,
    config: ProcessingConfig | None = None,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    resized_height: int | None = None,
    resized_width: int | None = None,
    keep_uint8: bool = False,
) -> ImagePatches:
    """Turn one image into patches, as Keye-VL-8B-Preview and Keye-VL-1.5 do.

    The image is resized twice, as there. First, bicubic, to fit the reading limits; then to fit
    the image processor's limits, which changes nothing unless the first result is outside them.
    At the released settings that means above 1280 tokens.

    Args:
        image: whatever :func:`load_image` takes.
        config: settings; None means Keye-VL-1.5 as released.
        min_pixels: least area of the first resize; None takes the version's limit.
        max_pixels: greatest area of the first resize; None takes the version's limit. To allow
            more than the image processor does, raise ``config.max_pixels`` too.
        resized_height: with ``resized_width``, the size wanted, instead of the image's own.
        resized_width: see ``resized_height``.
        keep_uint8: return the patches before rescaling and normalising.
    """
    config = config or ProcessingConfig()
    picture = resize_for_reading(
        load_image(image, version=config.version),
        config,
        min_pixels=config.limits.image_min if min_pixels is None else min_pixels,
        max_pixels=config.limits.image_max if max_pixels is None else max_pixels,
        resized_height=resized_height,
        resized_width=resized_width,
    )
    frame = resize_for_processor(np.asarray(picture), config)
    patches, grid = patchify(frame[None], patch_size=config.patch_size)
    return ImagePatches(patches if keep_uint8 else normalize(patches, config), grid)


def resize_for_reading(
    picture: Image,
    config: ProcessingConfig,
    *,
    min_pixels: int,
    max_pixels: int,
    resized_height: int | None = None,
    resized_width: int | None = None,
) -> Image:
    """First resize of an image: Pillow bicubic to what :func:`smart_resize` says."""
    if (resized_height is None) != (resized_width is None):
        raise ValueError(
            "process_image: resized_height and resized_width go together, "
            f"got {resized_height} and {resized_width}"
        )
    height, width = picture.height, picture.width
    if resized_height is not None:
        # An explicit size is checked against the version's own limits, not against the caller's.
        height, width = resized_height, resized_width
        min_pixels, max_pixels = config.limits.image_min, config.limits.image_max
    height, width = smart_resize(
        height, width, factor=config.factor, min_pixels=min_pixels, max_pixels=max_pixels
    )
    return picture.resize((width, height), _BICUBIC)


def resize_for_processor(
    frame: np.ndarray, config: ProcessingConfig, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Second resize, uint8 [H, W, 3]: to the image processor's limits, or to (height, width)."""
    height, width = size or processor_resize(
        *frame.shape[:2],
        factor=config.factor,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
    )
    if (height, width) == frame.shape[:2]:
        return frame
    return np.asarray(_pillow().fromarray(frame).resize((width, height), config.resample))


def patchify(
    frames: Tensor | np.ndarray, *, patch_size: int = 14
) -> tuple[Tensor, tuple[int, int, int]]:
    """Cut frames of one size into patches.

    Args:
        frames: [T, 3, H, W] or [T, H, W, 3], any dtype; H and W multiples of ``patch_size``.
        patch_size: side of a patch in pixels.

    Returns:
        patches [T*h*w, 3, patch_size, patch_size] of the same dtype, in raster order, frame after
        frame; and the grid ``(T, h, w)``.
    """
    if isinstance(frames, np.ndarray):
        frames = torch.from_numpy(np.require(frames, requirements=("C", "W")))
    if frames.ndim != 4 or 3 not in (frames.shape[1], frames.shape[3]):
        raise ValueError(
            f"patchify: frames must be [T, 3, H, W] or [T, H, W, 3], got {tuple(frames.shape)}"
        )
    if frames.shape[1] != 3:
        frames = frames.permute(0, 3, 1, 2)
    t, _, height, width = frames.shape
    h, w = height // patch_size, width // patch_size
    if (h * patch_size, w * patch_size) != (height, width) or not (h and w):
        raise ValueError(
            f"patchify: height and width must be multiples of {patch_size}, got {height}x{width}"
        )
    cut = frames.reshape(t, 3, h, patch_size, w, patch_size).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(t * h * w, 3, patch_size, patch_size), (t, h, w)


def unpatchify(patches: Tensor, grid_thw: tuple[int, int, int]) -> Tensor:
    """The inverse of :func:`patchify`: patches [T*h*w, 3, p, p] to frames [T, 3, h*p, w*p]."""
    t, h, w = grid_thw
    if patches.ndim != 4 or patches.shape[0] != t * h * w:
        raise ValueError(
            f"unpatchify: need [t*h*w, 3, p, p] patches for grid {tuple(grid_thw)}, "
            f"got {tuple(patches.shape)}"
        )
    p = patches.shape[-1]
    return patches.reshape(t, h, w, 3, p, p).permute(0, 3, 1, 4, 2, 5).reshape(t, 3, h * p, w * p)


def normalize(patches: Tensor, config: ProcessingConfig) -> Tensor:
    """Rescale and normalise: uint8 [N, 3, p, p] to float32 ``(value * rescale - mean) / std``."""
    if patches.dtype != torch.uint8:
        raise ValueError(f"normalize: patches must be uint8, got {patches.dtype}")
    tables = _tables(config.image_mean, config.image_std, config.rescale_factor)
    result = np.empty(tuple(patches.shape), dtype=np.float32)
    # A channel has only 256 values, so a table gives exactly what the float arithmetic would.
    for channel, table in enumerate(tables):
        result[:, channel] = table[patches[:, channel].numpy()]
    return torch.from_numpy(result)


@lru_cache(maxsize=8)
def _tables(mean: tuple, std: tuple, rescale_factor: float) -> tuple[np.ndarray, ...]:
    scaled = (np.arange(256) * rescale_factor).astype(np.float32)
    return tuple((scaled - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True))


def _array_hwc(image: np.ndarray | Tensor) -> np.ndarray:
    """A uint8 array of shape [H, W] or [H, W, C] from an array or a tensor."""
    array = image if isinstance(image, np.ndarray) else image.detach().cpu().numpy()
    if array.dtype != np.uint8:
        raise ValueError(f"load_image: arrays must be uint8, got {array.dtype}")
    shape = array.shape
    last = array.ndim == 3 and shape[2] in (1, 3, 4)
    first = array.ndim == 3 and shape[0] in (1, 3, 4)
    if array.size == 0 or not (array.ndim == 2 or last or first):
        raise ValueError(
            "load_image: arrays must be non-empty [H, W], [H, W, C] or [C, H, W] "
            f"with C of 1, 3 or 4, got {tuple(shape)}"
        )
    if first and (not last or isinstance(image, Tensor)):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return np.ascontiguousarray(array)


def _open(pil: Any, image: Any) -> Image:
    """Open and fully decode an image given as a path, an address or bytes."""
    name = "<bytes>" if isinstance(image, bytes) else str(image)[:200]
    if not isinstance(image, (str, Path, bytes)):
        raise ValueError(
            "load_image: need a path, bytes, a PIL image, an array or a tensor, "
            f"got {type(image).__name__}"
        )
    source: Any = io.BytesIO(image) if isinstance(image, bytes) else image
    if isinstance(image, str):
        if image.startswith(("http://", "https://")):
            raise ValueError(f"load_image: addresses are not fetched; download {name} first")
        if image.startswith("data:"):
            source = io.BytesIO(_decode_data_address(image))
            name = image.split(",", 1)[0]
        else:
            source = Path(image.removeprefix("file://"))
    if isinstance(source, Path) and not source.is_file():
        raise FileNotFoundError(f"load_image: no such file: {source}")
    try:
        with pil.open(source) as opened:
            opened.load()
            return opened.copy()
    except (OSError, SyntaxError, ValueError, EOFError, pil.DecompressionBombError) as error:
        raise ValueError(f"load_image: cannot read {name} as an image ({error})") from error


def _decode_data_address(address: str) -> bytes:
    head, _, payload = address.partition(",")
    if not head.startswith("data:image") or not head.endswith(";base64"):
        raise ValueError(
            f"load_image: a data address must start with data:image/...;base64, got {head[:60]!r}"
        )
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise ValueError(f"load_image: the data address is not valid base64 ({error})") from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            'reading and resizing images needs Pillow: pip install "keye-ops[image]"'
        ) from error
    return Image
