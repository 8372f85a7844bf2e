"""projector: merge_norm, 4608 x 4608 with GELU, 4608 x 4096, over a packed batch."""

from __future__ import annotations

import sys
from functools import partial

import torch
from keye_ops.bench import cuda_peers, harness, peers
from keye_ops.bench.harness import Case, Settings, Skip, Workload

import keye_ops
from keye_ops.cli import main

HIDDEN, MERGED, OUT = 1152, 4608, 4096
KINDS = ("weight", "bias")
SHAPES = [name for name in harness.MERGED if name != "1000-frame clip"]


def cases(settings: Settings) -> list[Case]:
    """Preview's form, which transformers has too, on the tower's shapes; and that of 1.5."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for before in (True, False):
            for name in SHAPES:
                total, half = harness.patches(name), dtype == torch.bfloat16
                version = "Preview" if before else "1.5"
                flops = harness.linear_flops(total // 4, MERGED, MERGED + OUT)
                values = total // 4 * (MERGED + OUT) + MERGED * (MERGED + OUT)
                case = Case(
                    op="projector",
                    group=f"projector of {version}",
                    shape=f"{version}, {name}",
                    size=total,
                    dtype=dtype,
                    num_bytes=values * harness.size_of(dtype),
                    flops=flops,
                    build=partial(workload, name, before, dtype, settings),
                    quick=before and half and name in ("64 thumbnails", "1-megapixel image"),
                    headline=before and half and name == "1-megapixel image",
                )
                found.append(case)
    return found


def workload(name: str, before: bool, dtype: torch.dtype, settings: Settings) -> Workload:
    """x of [N, 1152]."""
    device, grids = settings.device, harness.SHAPES[name]
    grid = keye_ops.PackedGrid.from_grid_thw(grids, device=device)
    x = harness.random(grid.total, HIDDEN, dtype=dtype, device=device)
    norm, options = HIDDEN if before else MERGED, {"dtype": dtype, "device": device}
    args = (
        x,
        harness.random(norm, **options),
        harness.random(norm, **options),
        harness.random(MERGED, MERGED, **options, scale=MERGED**-0.5),
        harness.random(MERGED, **options),
        harness.random(OUT, MERGED, **options, scale=MERGED**-0.5),
        harness.random(OUT, **options),
        grid,
    )
    eager = harness.reference(keye_ops.projector)

    def one_image(part: torch.Tensor, grid: keye_ops.PackedGrid) -> torch.Tensor:
        return eager(part, *args[1:-1], grid)

    one_by_one = cuda_peers.per_image(one_image, x, grids)
    return Workload(
        ours={"keye_ops": lambda: keye_ops.projector(*args)},
        peers={
            "eager": lambda: eager(*args),
            **({"eager, a call an image": one_by_one} if len(grids) > 1 else {}),
            "torch.compile": peers.compiled(keye_ops.projector, settings, *args),
            "zentorch": peers.compiled(keye_ops.projector, settings, *args, backend="zentorch"),
            "transformers": _transformers(*args[:-1], grids),
        },
    )


def _transformers(
    x: torch.Tensor, *parameters_and_grids: torch.Tensor | list[tuple[int, int, int]]
) -> harness.Provider | Skip:
    """PaddleOCR-VL's projector, a loop over images."""
    *parameters, grids = parameters_and_grids
    if parameters[0].shape[0] != HIDDEN:
        return Skip("its projector is Preview's")
    config = peers.paddleocr_config()
    if isinstance(config, Skip):
        return config
    names = [f"{n}.{kind}" for n in ("pre_norm", "linear_1", "linear_2") for kind in KINDS]
    state = dict(zip(names, parameters, strict=True))
    module = peers.paddleocr_module("PaddleOCRProjector", config, state)
    grid_thw = torch.tensor(grids, device=x.device)
    return lambda: module(x, grid_thw)


if __name__ == "__main__":
    sys.exit(main(["bench", "projector", *sys.argv[1:]]))
