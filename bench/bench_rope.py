"""rope on the vision and text shapes: q and k read and written once."""

from __future__ import annotations

import sys
from functools import partial

import torch
from keye_ops.bench import cuda_peers, harness, peers
from keye_ops.bench.harness import Case, Settings, Workload

import keye_ops
from keye_ops.cli import main
from keye_ops.rope import rope_reference, rope_table_2d, rope_table_3d

TEXT = (1024, 8192, 32768)
DTYPES = (torch.bfloat16, torch.float32)


def cases(settings: Settings) -> list[Case]:
    """2D rotation of the tower's shapes; 3D with RMSNorm of text."""
    found = []
    for dtype in DTYPES:
        half, size = dtype == torch.bfloat16, harness.size_of(dtype)
        for name in harness.UNMERGED:
            total = harness.patches(name)
            case = Case(
                op="rope",
                group="rope_2d, 16 x 72",
                shape=f"rope_2d, {name}",
                size=total,
                dtype=dtype,
                num_bytes=2 * 2 * total * 16 * 72 * size,
                flops=0,
                build=partial(vision, name, dtype, settings),
                quick=name == "1-megapixel image",
                headline=name == "1-megapixel image" and half,
            )
            found.append(case)
        for total in TEXT:
            case = Case(
                op="rope",
                group="rope_3d with norm, 32/8 x 128",
                shape=f"rope_3d with norm, text {total // 1024}k",
                size=total,
                unit="tokens",
                dtype=dtype,
                num_bytes=2 * total * (32 + 8) * 128 * size,
                flops=0,
                build=partial(text, total, dtype, settings),
                quick=total == TEXT[0] and half,
            )
            found.append(case)
    return found


def vision(name: str, dtype: torch.dtype, settings: Settings) -> Workload:
    """q and k of 16 x 72."""
    device = settings.device
    grid = keye_ops.PackedGrid.from_grid_thw(harness.SHAPES[name], device=device)
    q, k = (harness.random(grid.total, 16, 72, dtype=dtype, device=device) for _ in range(2))
    packed = harness.random(grid.total, 3, 16, 72, dtype=dtype, device=device)
    position_ids = grid.position_ids
    args = (q, k, position_ids.T, *rope_table_2d(72, 10000.0, device))
    return Workload(
        ours={
            "keye_ops in place, packed qkv": lambda: keye_ops.rope_2d_(
                packed[:, 0], packed[:, 1], position_ids
            ),
            "keye_ops in place": lambda: keye_ops.rope_2d_(q, k, position_ids),
            "keye_ops": lambda: keye_ops.rope_2d(q, k, position_ids),
        },
        peers={
            "eager": lambda: rope_reference(*args),
            "torch.compile": peers.compiled(rope_reference, settings, *args),
            "transformers": _transformers(q, k, position_ids),
            "FlashAttention's rotary": cuda_peers.flash_rotary(q, k, args[2:], settings),
        },
        yardsticks=harness.copies(2 * harness.bytes_of(q, k), device),
    )


def _transformers(
    q: torch.Tensor, k: torch.Tensor, position_ids: torch.Tensor
) -> harness.Provider | harness.Skip:
    """PaddleOCR-VL's rotation; its cosines and sines are computed beforehand, once a batch."""
    config = peers.paddleocr_config()
    if isinstance(config, harness.Skip):
        return config
    module = peers.transformers_models("paddleocr_vl.modeling_paddleocr_vl")
    rotary = module.PaddleOCRVisionRotaryEmbedding(config.vision_config).to(q.device)
    cos, sin = rotary(q, position_ids)
    return lambda: module.apply_rotary_pos_emb_vision(q, k, cos, sin)


def text(total: int, dtype: torch.dtype, settings: Settings) -> Workload:
    """q of 32 x 128 and k of 8 x 128, with RMSNorm before the rotation."""
    device = settings.device
    q = harness.random(total, 32, 128, dtype=dtype, device=device)
    k = harness.random(total, 8, 128, dtype=dtype, device=device)
    weight = harness.random(128, dtype=dtype, device=device)
    position_ids = torch.arange(total, device=device).expand(3, -1).contiguous()
    section = (16, 24, 24)
    table = rope_table_3d(128, section, 1e6, device=device)
    args = (q, k, position_ids, *table, False, False, weight, weight)
    options = {"mrope_section": section, "q_norm_weight": weight, "k_norm_weight": weight}
    return Workload(
        ours={
            "keye_ops in place": lambda: keye_ops.rope_3d_(q, k, position_ids, **options),
            "keye_ops": lambda: keye_ops.rope_3d(q, k, position_ids, **options),
        },
        peers={
            "eager": lambda: rope_reference(*args),
            "torch.compile": peers.compiled(rope_reference, settings, *args),
            "Liger": cuda_peers.liger_rope_3d(q, k, args[2:5], weight, section, settings),
        },
        yardsticks=harness.copies(2 * harness.bytes_of(q, k), device),
    )


if __name__ == "__main__":
    sys.exit(main(["bench", "rope", *sys.argv[1:]]))
