"""rope on the vision and text shapes of Keye-VL, beside eager PyTorch, torch.compile and a copy."""

from __future__ import annotations

import torch
from harness import Provider, Timing, arguments, compare, report, save
from tqdm import tqdm

import keye_ops
from keye_ops.rope import rope_reference, rope_table_2d, rope_table_3d

VISION = {"image 378 x 378": 729, "1-megapixel image": 5184, "16384 patches": 16384}
TEXT = {"text 1k": 1024, "text 8k": 8192}


def vision(total: int, dtype: torch.dtype) -> tuple[dict[str, Provider], int]:
    """q and k of 16 x 72, read and written once; in place where the name says so."""
    q, k = torch.randn(2, total, 16, 72).to(dtype)
    packed = torch.randn(total, 3, 16, 72).to(dtype)
    side = int(total**0.5) + 1
    place = torch.arange(total)
    position_ids = torch.stack([place // side, place % side], 1).int()
    table = rope_table_2d(72, 10000.0)
    compiled = torch.compile(rope_reference)
    args = (q, k, position_ids.T, *table)
    providers = {
        "keye_ops in place": lambda: keye_ops.rope_2d_(q, k, position_ids),
        "keye_ops in place, packed qkv": lambda: keye_ops.rope_2d_(
            packed[:, 0], packed[:, 1], position_ids
        ),
        "keye_ops": lambda: keye_ops.rope_2d(q, k, position_ids),
        "torch.compile": lambda: compiled(*args),
        "eager": lambda: rope_reference(*args),
    }
    return providers, 2 * (q.nbytes + k.nbytes)


def text(total: int, dtype: torch.dtype) -> tuple[dict[str, Provider], int]:
    """q of 32 x 128 and k of 8 x 128, with RMSNorm before the rotation."""
    q, k = torch.randn(total, 32, 128).to(dtype), torch.randn(total, 8, 128).to(dtype)
    weight = torch.randn(128).to(dtype)
    position_ids = torch.arange(total).expand(3, -1).contiguous()
    section = (16, 24, 24)
    table = rope_table_3d(128, section, 1e6)
    compiled = torch.compile(rope_reference)
    args = (q, k, position_ids, *table, False, False, weight, weight)
    options = {"mrope_section": section, "q_norm_weight": weight, "k_norm_weight": weight}
    providers = {
        "keye_ops in place": lambda: keye_ops.rope_3d_(q, k, position_ids, **options),
        "keye_ops": lambda: keye_ops.rope_3d(q, k, position_ids, **options),
        "torch.compile": lambda: compiled(*args),
        "eager": lambda: rope_reference(*args),
    }
    return providers, 2 * (q.nbytes + k.nbytes)


def main() -> None:
    """Time everything, print, and save if asked to."""
    options = arguments(__doc__ or "")
    rounds = 7 if options.quick else 31
    cases = [
        (f"{name}, {str(dtype).removeprefix('torch.')}{suffix}", make, total, dtype)
        for make, shapes, suffix in ((vision, VISION, ""), (text, TEXT, ", norm"))
        for name, total in shapes.items()
        for dtype in (torch.bfloat16, torch.float32)
    ]
    timings: list[Timing] = []
    with torch.inference_mode():
        for name, make, total, dtype in tqdm(cases, leave=False):
            providers, num_bytes = make(total, dtype)
            timings += compare(name, providers, num_bytes, rounds)
    report("rope", timings)
    if options.json:
        save(options.json, timings)


if __name__ == "__main__":
    main()
