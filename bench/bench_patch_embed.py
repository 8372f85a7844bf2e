"""patch_embed: a matrix product of 588 x 1152 and the interpolated position table, in one call."""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch.nn.functional as F
from keye_ops.bench import cuda_peers, harness, peers
from keye_ops.bench.harness import Case, Settings, Skip, Workload

import keye_ops
from keye_ops.cli import main

HIDDEN, INNER, SIDE = 1152, 588, 27


def cases(settings: Settings) -> list[Case]:
    """The tower's shapes."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for name in harness.UNMERGED:
            total, big = harness.patches(name), name == "1-megapixel image"
            values = total * (INNER + HIDDEN) + HIDDEN * (INNER + 1 + SIDE * SIDE)
            case = Case(
                op="patch_embed",
                group="patch_embed, 588 to 1152",
                shape=name,
                size=total,
                dtype=dtype,
                num_bytes=values * harness.size_of(dtype),
                flops=harness.linear_flops(total, INNER, HIDDEN),
                build=partial(workload, name, dtype, settings),
                quick=big and dtype == torch.bfloat16,
                headline=big and dtype == torch.bfloat16,
            )
            found.append(case)
    return found


def workload(name: str, dtype: torch.dtype, settings: Settings) -> Workload:
    """Pixels in the dtype of the weights, and for one provider uint8."""
    device, grids = settings.device, harness.SHAPES[name]
    grid = keye_ops.PackedGrid.from_grid_thw(grids, device=device)
    pixels = harness.random(grid.total, 3, 14, 14, dtype=dtype, device=device)
    raw = torch.randint(0, 256, pixels.shape, dtype=torch.uint8, device=device)
    weight = harness.random(HIDDEN, 3, 14, 14, dtype=dtype, device=device, scale=INNER**-0.5)
    bias = harness.random(HIDDEN, dtype=dtype, device=device)
    table = harness.random(SIDE * SIDE, HIDDEN, dtype=dtype, device=device)
    eager = harness.reference(keye_ops.patch_embed)
    rows, matrix = pixels.flatten(1), weight.flatten(1)
    args = (pixels, weight, bias, table, grid)

    def ours() -> torch.Tensor:
        return keye_ops.patch_embed(*args)

    def convolution() -> torch.Tensor:
        """As vision towers are commonly written: a loop over images for the positions."""
        tokens = F.conv2d(pixels, weight, bias, stride=14).flatten(1)
        square = table.T.view(1, HIDDEN, SIDE, SIDE)
        positions = []
        for t, h, w in grids:
            resized = F.interpolate(square, size=(h, w), mode="bilinear")[0]
            positions.append(resized.flatten(1).T.repeat(t, 1))
        return tokens + torch.cat(positions)

    return Workload(
        ours={
            "keye_ops": ours,
            **cuda_peers.both_products(settings, "keye_ops", ours),
            "keye_ops, uint8 pixels": lambda: keye_ops.patch_embed(raw, *args[1:]),
        },
        peers={
            "eager": lambda: eager(*args),
            "torch.compile": peers.compiled(keye_ops.patch_embed, settings, *args),
            "zentorch": peers.compiled(keye_ops.patch_embed, settings, *args, backend="zentorch"),
            "conv2d + interpolate + add": convolution,
            "transformers": _transformers(*args[:-1], grids),
        },
        yardsticks={
            "F.linear alone": lambda: F.linear(rows, matrix, bias),
            "F.linear + interpolate + add": _packed(rows, matrix, bias, table, grids),
        },
    )


def _packed(
    rows: torch.Tensor,
    matrix: torch.Tensor,
    bias: torch.Tensor,
    table: torch.Tensor,
    grids: list[tuple[int, int, int]],
) -> harness.Provider | Skip:
    """The shortest eager form, for a batch whose images have one size."""
    if len(set(grids)) > 1:
        return Skip("images of several sizes")
    _, h, w = grids[0]
    square = table.T.view(1, HIDDEN, SIDE, SIDE)

    def call() -> torch.Tensor:
        positions = F.interpolate(square, size=(h, w), mode="bilinear")[0].flatten(1).T
        return (F.linear(rows, matrix, bias).view(-1, h * w, HIDDEN) + positions).flatten(0, 1)

    return call


def _transformers(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    table: torch.Tensor,
    grids: list[tuple[int, int, int]],
) -> harness.Provider | Skip:
    """PaddleOCR-VL's embeddings."""
    config = peers.paddleocr_config()
    if isinstance(config, Skip):
        return config
    state = {"patch_embedding.weight": weight, "patch_embedding.bias": bias}
    state["position_embedding.weight"] = table
    module = peers.paddleocr_module("PaddleOCRVisionEmbeddings", config.vision_config, state)
    grid_thw = torch.tensor(grids, device=pixels.device)
    return lambda: module(pixels[None], grid_thw=grid_thw)


if __name__ == "__main__":
    sys.exit(main(["bench", "patch_embed", *sys.argv[1:]]))
