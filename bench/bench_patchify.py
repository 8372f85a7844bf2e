"""patchify: decoded frames to patches; every source byte read and every patch written once."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from keye_ops.bench import harness
from keye_ops.bench.harness import Case, Provider, Settings, Skip, Workload

import keye_ops
from keye_ops.cli import main

# (frames, height, width) and the (height, width) that they are resized to.
SIZES = {
    "1080p image": ((1, 1080, 1920), (672, 1176)),
    "4K image": ((1, 2160, 3840), (756, 1344)),
    "720p image, grown": ((1, 720, 1280), (784, 1400)),
    "60 frames of 720p": ((60, 720, 1280), (252, 448)),
}
# (filter, arithmetic) of images, of frames of Keye-VL-1.5, and of those of Keye-VL-8B-Preview.
KINDS = {
    "as Pillow": ("bicubic", "pillow"),
    "as torch, uint8": ("bilinear", "uint8"),
    "as torch, fp32": ("bicubic", "float32"),
}


def cases(settings: Settings) -> list[Case]:
    """Each of the three roundings on images and a clip."""
    found = []
    for kind in KINDS:
        for name in SIZES:
            (frames, height, width), (new_height, new_width) = SIZES[name]
            patches = frames * (new_height // 14) * (new_width // 14)
            big = name == "1080p image"
            case = Case(
                op="patchify",
                group=f"patchify, {kind}",
                shape=f"{kind}, {name}",
                size=patches,
                dtype=torch.uint8,
                num_bytes=3 * frames * (height * width + new_height * new_width),
                flops=0,
                build=partial(workload, name, kind, settings),
                quick=big,
                headline=big and kind == "as Pillow",
            )
            found.append(case)
    return found


def workload(name: str, kind: str, settings: Settings) -> Workload:
    """Frames of noise [T, H, W, 3]."""
    shape, size = SIZES[name]
    mode, arithmetic = KINDS[kind]
    device = settings.device
    frames = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, device=device)

    def ours() -> torch.Tensor:
        return keye_ops.patchify(frames, size, mode=mode, arithmetic=arithmetic)

    def interpolated() -> torch.Tensor:
        x = frames.permute(0, 3, 1, 2)
        if arithmetic == "float32" or x.is_cuda:  # whose interpolation of uint8 is the CPU's alone
            x = x.float()
        x = F.interpolate(x, list(size), mode=mode, antialias=True)
        return _cut(x.clamp(0, 255).round().byte() if x.is_floating_point() else x)

    return Workload(
        ours={"keye_ops": ours},
        peers={
            "eager": interpolated,
            "Pillow": _pillow(frames, size, mode) if kind == "as Pillow" else Skip("rounds else"),
        },
        yardsticks=harness.copies(3 * shape[0] * (shape[1] * shape[2] + size[0] * size[1]), device),
    )


def _cut(resized: torch.Tensor) -> torch.Tensor:
    """[T, 3, H, W] to patches, as processors do."""
    t, _, height, width = resized.shape
    cut = resized.reshape(t, 3, height // 14, 14, width // 14, 14)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 14, 14)


def _pillow(frames: torch.Tensor, size: tuple[int, int], mode: str) -> Provider | Skip:
    """From arrays to patches, a frame at a time."""
    if frames.is_cuda:
        return Skip("has no GPU")
    try:
        image: Any = importlib.import_module("PIL.Image")
        numpy: Any = importlib.import_module("numpy")
    except ImportError as error:
        return Skip(f"not installed: {error}")
    code = image.Resampling[mode.upper()]

    def call() -> torch.Tensor:
        resized = [image.fromarray(x.numpy()).resize(size[::-1], code) for x in frames]
        stacked = torch.from_numpy(numpy.stack([numpy.asarray(x) for x in resized]))
        return _cut(stacked.permute(0, 3, 1, 2))

    return call


if __name__ == "__main__":
    sys.exit(main(["bench", "patchify", *sys.argv[1:]]))
