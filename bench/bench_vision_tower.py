"""vision_tower: end to end at full width; layers are alike, so a few of the 27 tell the ratio."""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch.nn.functional as F
from keye_ops.bench import cuda_peers, harness, peers
from keye_ops.bench.harness import Case, Settings, Skip, Workload

import keye_ops
from keye_ops.cli import main
from keye_ops.model import VisionConfig, VisionTower, init_random

HIDDEN, INNER, HEADS, PATCH = 1152, 4304, 16, 588
# Time per patch must not depend on the number of images.
THUMBNAILS = (1, 8, 64, 512)
_OURS_AND_EAGER = 30_000  # patches: larger batches take minutes for every further peer


def cases(settings: Settings) -> list[Case]:
    """The shapes of the model, and 1 to 512 thumbnails."""
    batches = {name: harness.SHAPES[name] for name in harness.UNMERGED if "thumbnail" not in name}
    for count in THUMBNAILS:
        batches[f"{count} thumbnail{'s' * (count > 1)}"] = [(1, 16, 16)] * count
    if cuda_peers.on_gpu(settings):
        batches["32 images of 378²"] = [(1, 27, 27)] * 32
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        half = dtype == torch.bfloat16
        for name, grids in batches.items():
            lengths = [h * w for t, h, w in grids for _ in range(t)]
            total = sum(lengths)
            if not half and total > _OURS_AND_EAGER:
                continue
            layers = settings.layers
            case = Case(
                op="vision_tower",
                group="thumbnails" if "thumbnail" in name else "images and clips",
                shape=f"{name}, {layers} of 27 layers" if layers != 27 else name,
                size=total,
                dtype=dtype,
                num_bytes=(total * (PATCH + HIDDEN) + parameters(layers)) * harness.size_of(dtype),
                flops=tower_flops(lengths, layers),
                build=partial(workload, grids, layers, dtype, settings),
                quick=half and name in ("image 378²", "1 thumbnail", "8 thumbnails"),
                headline=half and name == "1-megapixel image",
            )
            found.append(case)
    return found


def tower_flops(lengths: list[int], layers: int) -> int:
    """Useful FLOPs of patch embedding and layers: q, k, v, output, MLP and attention."""
    total = sum(lengths)
    linear = harness.linear_flops(total, HIDDEN, 4 * HIDDEN + 2 * INNER)
    attention = harness.attention_flops(lengths, HEADS, HIDDEN // HEADS)
    return harness.linear_flops(total, PATCH, HIDDEN) + layers * (linear + attention)


def parameters(layers: int) -> int:
    """Values of the weights."""
    layer = 4 * HIDDEN * (HIDDEN + 1) + 2 * HIDDEN * INNER + HIDDEN + INNER + 4 * HIDDEN
    return HIDDEN * (PATCH + 1 + 27 * 27 + 2) + layers * layer


def workload(
    grids: list[tuple[int, int, int]], layers: int, dtype: torch.dtype, settings: Settings
) -> Workload:
    """A tower with random weights on random pixels."""
    config = VisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_heads=HEADS,
        image_size=384,
        segment="frame",
    )
    tower = init_random(VisionTower(config), settings.seed).to(settings.device, dtype).eval()
    grid = tower.pack(grids)
    pixels = harness.random(grid.total, 3, 14, 14, dtype=dtype, device=settings.device)
    eager = harness.reference(tower)
    lengths = [h * w for t, h, w in grids for _ in range(t)]
    # The reference reads offsets while it runs, which breaks graphs: compilers get known lengths.
    equal = len(set(lengths)) == 1
    wrap = peers.together if equal else peers.by_segment
    attend = wrap(F.scaled_dot_product_attention, lengths)
    batched: dict[str, harness.Provider | Skip] = {}
    if equal and len(lengths) > 1:
        name = "eager, SDPA of the batch"
        batched[name] = peers.with_attention(attend, lambda: eager(pixels, grid))
    large = Skip("takes minutes") if grid.total > _OURS_AND_EAGER else None
    args = (tower, settings, pixels, grid)

    packed = _packed_attention(grid, settings)
    ours: dict[str, harness.Provider | Skip] = {"keye_ops": lambda: tower(pixels, grid)}
    if packed is not None:
        name = "torch varlen_attn"
        batched[f"eager, {name}"] = peers.with_attention(packed, lambda: eager(pixels, grid))
        ours[f"keye_ops, {name}"] = peers.with_attention(packed, ours["keye_ops"])

    def compiled(backend: str) -> harness.Provider | Skip:
        return large or peers.with_attention(attend, peers.compiled(*args, backend=backend))

    return Workload(
        ours=ours,
        peers={
            "eager": lambda: eager(pixels, grid),
            **batched,
            "torch.compile": compiled("inductor"),
            "zentorch": compiled("zentorch"),
            "transformers": large or _transformers(tower, pixels, grids),
        },
    )


def _packed_attention(grid: keye_ops.PackedGrid, settings: Settings) -> peers.Attention | None:
    """torch's own attention of packed segments, on a GPU."""
    if not cuda_peers.on_gpu(settings):
        return None
    function = cuda_peers.torch_varlen(grid.cu_seqlens, grid.max_seqlen, causal=False)
    return None if isinstance(function, Skip) else function


def _transformers(
    tower: VisionTower, pixels: torch.Tensor, grids: list[tuple[int, int, int]]
) -> harness.Provider | Skip:
    """PaddleOCR-VL's tower with the same weights and torch SDPA, a call a frame."""
    config = peers.paddleocr_config(tower.config.num_hidden_layers)
    if isinstance(config, Skip):
        return config
    state = tower.state_dict()
    module = peers.paddleocr_module("PaddleOCRVisionModel", config.vision_config, state)
    grid_thw = torch.tensor(grids, device=pixels.device)
    return lambda: module(pixels[None], grid_thw=grid_thw).last_hidden_state


if __name__ == "__main__":
    sys.exit(main(["bench", "vision_tower", *sys.argv[1:]]))
