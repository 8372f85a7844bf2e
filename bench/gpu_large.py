"""Stage large: tensors past 2**31 elements, whose rows must be those of a call on few rows."""

from __future__ import annotations

from collections.abc import Callable

import gpu_device
import torch
from gpu_repeats import bits
from gpu_runner import Context, Found, NotRun

import keye_ops

LIMIT = 2**31
_SMALL = 2**16  # stands for 2**31 where the stage itself is tested
Rows = Callable[[slice], tuple[torch.Tensor, ...]]


def items(context: Context) -> list[str]:
    """Ops whose rows do not depend on each other, the cheapest first; and a million segments."""
    return [name for name in OPS if hasattr(keye_ops, name.split()[0])]


def run(item: str, context: Context) -> Found:
    """An op on a tensor of so many elements that 32-bit offsets would overflow."""
    op, make, copies = OPS[item]
    gpu_device.need_kernel(op, context)
    device = gpu_device.type_of(context)
    elements = LIMIT + LIMIT // 64 if context.device == "cuda" else _SMALL
    need, free = int(copies * elements * 2.02) + 2**28, gpu_device.free_bytes(device)
    if need > free:
        raise NotRun(f"needs {need / 1e9:.0f} GB, {free / 1e9:.0f} are free")
    total, apply, exact = make(elements, device)
    everything = apply(slice(None))
    gpu_device.synchronize(device)
    problems, rows = [], around(total, elements)
    for part in rows:
        alone = apply(part)
        for i, (whole, one) in enumerate(zip(everything, alone, strict=True)):
            rate = total // whole.shape[0]  # of rows that are merged into one
            piece = whole[part.start // rate : part.stop // rate]
            if not same(piece, one, exact):
                problems.append(f"result {i}, rows {part.start} to {part.stop} differ")
    facts = {"elements": elements, "rows": total, "gigabytes": round(need / 1e9, 1)}
    return {"cases": len(rows), "problems": problems, "facts": facts}


def same(whole: torch.Tensor, alone: torch.Tensor, exact: bool) -> bool:
    """Bit by bit; of torch's matrix products, which choose by size how they sum, nearly."""
    if whole.shape != alone.shape:
        return False
    if exact:
        return torch.equal(bits(whole), bits(alone))
    error = (whole.float() - alone.float()).abs().max()
    return bool(error <= 2**-6 * alone.float().abs().max())


def around(total: int, elements: int) -> list[slice]:
    """Rows at the start, where offsets pass 2**31 elements and bytes, and at the end."""
    border = elements * LIMIT / (LIMIT + LIMIT // 64) * total / elements  # the row of 2**31
    places = [0, int(border / 2), int(border)]
    starts = [max(0, min(place // 4 * 4 - 8, total - 16)) for place in (*places, total - 8)]
    return [slice(start // 4 * 4, start // 4 * 4 + 16) for start in starts]


def _fill(shape: tuple[int, ...], device: str) -> torch.Tensor:
    """Random values, drawn a part at a time so that nothing else is as large."""
    x = torch.empty(shape, dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(1)
    flat = x.view(-1)
    for part in flat.split(2**27):
        part.normal_(generator=generator)
    return x


def rope(elements: int, device: str) -> tuple[int, Rows, bool]:
    """q of 16 x 72, and one head of k."""
    total = elements // (16 * 72) // 4 * 4
    q, k = _fill((total, 16, 72), device), _fill((total, 1, 72), device)
    index = torch.arange(total, device=device, dtype=torch.int32)
    positions = torch.stack([index % 1000, index // 1000], 1)
    return total, lambda rows: keye_ops.rope_2d(q[rows], k[rows], positions[rows]), True


def add_layer_norm(elements: int, device: str) -> tuple[int, Rows, bool]:
    """Rows of 1152."""
    total = elements // 1152 // 4 * 4
    x, (weight, bias) = _fill((total, 1152), device), _fill((2, 1152), device)
    residual = _fill((16, 1152), device)[:1].expand(total, -1)
    return total, lambda r: keye_ops.add_layer_norm(x[r], residual[r], weight, bias), True


def layer_norm(elements: int, device: str) -> tuple[int, Rows, bool]:
    """The same alone."""
    total = elements // 1152 // 4 * 4
    x, (weight, bias) = _fill((total, 1152), device), _fill((2, 1152), device)
    return total, lambda r: (keye_ops.layer_norm(x[r], weight, bias),), True


def rms_norm(elements: int, device: str) -> tuple[int, Rows, bool]:
    """Rows of 4096."""
    total = elements // 4096 // 4 * 4
    x, weight = _fill((total, 4096), device), _fill((4096,), device)
    return total, lambda r: (keye_ops.rms_norm(x[r], weight),), True


def merge_norm(elements: int, device: str) -> tuple[int, Rows, bool]:
    """Many images of 2 x 2 patches: as many merged tokens, and up to millions of images."""
    total = elements // 1152 // 4 * 4
    x, weight = _fill((total, 1152), device), _fill((2, 4608), device)

    def apply(rows: slice) -> tuple[torch.Tensor, ...]:
        part = x[rows]
        grid = [(part.shape[0] // 4, 2, 2)]
        return (keye_ops.merge_norm(part, *weight, grid),)

    return total, apply, True


def merge_norm_images(elements: int, device: str) -> tuple[int, Rows, bool]:
    """A million images of 2 x 2 patches."""
    total = min(elements // 1152, 4_000_000) // 4 * 4
    x, weight = _fill((total, 1152), device), _fill((2, 4608), device)

    def apply(rows: slice) -> tuple[torch.Tensor, ...]:
        part = x[rows]
        return (keye_ops.merge_norm(part, *weight, [(1, 2, 2)] * (part.shape[0] // 4)),)

    return total, apply, True


def linear_gelu(elements: int, device: str) -> tuple[int, Rows, bool]:
    """A narrow product of very many rows."""
    total = elements // 1152 // 4 * 4
    x, weight = _fill((total, 1152), device), _fill((64, 1152), device) / 34
    bias = _fill((64,), device)
    return total, lambda rows: (keye_ops.linear_gelu(x[rows], weight, bias),), False


def patch_embed(elements: int, device: str) -> tuple[int, Rows, bool]:
    """Frames of a very long clip of 4 x 4 patches."""
    total = elements // 588 // 16 * 16
    pixels, weight = _fill((total, 588), device), _fill((64, 588), device) / 24
    table = _fill((729, 64), device)

    def apply(rows: slice) -> tuple[torch.Tensor, ...]:
        part = pixels[rows]
        return (keye_ops.patch_embed(part, weight, None, table, [(part.shape[0] // 4, 2, 2)]),)

    return total, apply, False


def varlen_attention(elements: int, device: str) -> tuple[int, Rows, bool]:
    """More than a million segments of 4 rows."""
    total = elements // (8 * 72) // 4 * 4
    q = _fill((total, 8, 72), device)
    k = _fill((total, 1, 72), device)

    def apply(rows: slice) -> tuple[torch.Tensor, ...]:
        part, keys = q[rows], k[rows]
        offsets = torch.arange(0, part.shape[0] + 1, 4, dtype=torch.int32, device=device)
        return (keye_ops.varlen_attention(part, keys, keys, offsets, max_seqlen_q=4),)

    return total, apply, True


# The op that it is dispatched by, the maker, and how many tensors of that size there are.
OPS = {
    "rope": ("rope", rope, 2.4),
    "layer_norm": ("add_layer_norm", layer_norm, 2.1),
    "add_layer_norm": ("add_layer_norm", add_layer_norm, 3.1),
    "rms_norm": ("add_rms_norm", rms_norm, 2.1),
    "merge_norm": ("merge_norm", merge_norm, 2.1),
    "merge_norm of a million images": ("merge_norm", merge_norm_images, 2.1),
    "linear_gelu": ("linear_gelu", linear_gelu, 1.3),
    "patch_embed": ("patch_embed", patch_embed, 1.5),
    "varlen_attention": ("varlen_attention", varlen_attention, 2.6),
}
