"""Calls of every op on random data, at Keye's shapes and at odd ones, for stages to judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import keye_ops
from keye_ops import PackedGrid, dispatch

Tensors = tuple[torch.Tensor, ...]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GRIDS = {
    "1 megapixel": [(1, 72, 72)],
    "64 thumbnails": [(1, 16, 16)] * 64,
    "mixed": [(3, 34, 40), (1, 2, 2), (1, 6, 80), (2, 28, 30)],
    "other mixed": [(3, 40, 34), (1, 6, 80), (1, 2, 2), (2, 30, 28)],  # as many patches each
    "small": [(2, 4, 2), (1, 2, 6)],
    "other small": [(2, 2, 4), (1, 6, 2)],
}
OTHER = {"mixed": "other mixed", "small": "other small"}


@dataclass
class Call:
    """An op with its arguments.

    Attributes:
        op: the name that it is dispatched by.
        leaves: floating tensors by name, in the order of the gradients.
        function: of the leaves; a tuple of results.
        contents: tensors of integers that the call reads on the device, by name.
        others: values of the same shapes for them.
        exact: results must be those of the reference, bit by bit.
        gradients: whether there are any.
        meaning: the function in fp64, where the reference rounds to fp32 on the way.
    """

    op: str
    leaves: dict[str, torch.Tensor]
    function: Callable[..., Any]
    contents: dict[str, torch.Tensor] = field(default_factory=dict)
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    exact: bool = False
    gradients: bool = True
    meaning: Callable[..., Any] | None = None
    douts: dict[int, torch.Tensor] = field(default_factory=dict)

    def outputs(self, leaves: dict[str, torch.Tensor] | None = None) -> Tensors:
        """Results."""
        out = self.function(**(self.leaves if leaves is None else leaves))
        return (out,) if isinstance(out, torch.Tensor) else tuple(out)

    def results(self, dtype: torch.dtype | None = None) -> Tensors:
        """Results and gradients, all in another dtype if asked for."""
        leaves = {}
        for name, x in self.leaves.items():
            x = (x if dtype is None else x.to(dtype)).detach()
            leaves[name] = x.requires_grad_(self.gradients)
        if not self.gradients:
            return self.outputs(leaves)
        outputs = self.outputs(leaves)
        wanted = [x for x in outputs if x.requires_grad]
        douts = [self._dout(x, number) for number, x in enumerate(wanted)]
        grads = torch.autograd.grad(wanted, list(leaves.values()), douts)
        return tuple(x.detach() for x in (*outputs, *grads))

    def _dout(self, out: torch.Tensor, number: int) -> torch.Tensor:
        """The same random numbers at every call; made once, so that no call copies anything."""
        if number not in self.douts:
            like = next(iter(self.leaves.values()))
            shape = tuple(out.shape)
            self.douts[number] = random(shape, like.dtype, like.device, 1000 + number)
        return self.douts[number].to(out.dtype)

    def reference(self, dtype: torch.dtype | None = None) -> Tensors:
        """What plain PyTorch gives."""
        function = self.function
        if dtype == torch.float64 and self.meaning is not None:
            function = self.meaning
        with dispatch.backend("reference"):
            return replace(self, function=function, douts=self.douts).results(dtype)


def random(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> torch.Tensor:
    """Normal values that depend on the shape and the seed alone, not on the device."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    values = torch.randn(shape, generator=generator)
    return values.to(dtype).to(device)


# ---- the ops; ``big`` chooses Keye's shapes ----


def rope_2d(dtype: torch.dtype, device: str, big: bool, in_place: bool = False) -> Call:
    """Vision heads, positions of a batch of images."""
    total = 4097 if big else 19
    heads = {name: random((total, 16 if big else 2, 72), dtype, device, i) for i, name in
             enumerate("qk")}  # fmt: skip
    positions = torch.stack([torch.arange(total) % 72, torch.arange(total) // 72 % 70], 1)
    positions = positions.int().to(device)

    def function(q: torch.Tensor, k: torch.Tensor) -> Tensors:
        if in_place:
            packed = torch.stack([q, k, q], 1)
            keye_ops.rope_2d_(packed[:, 0], packed[:, 1], positions)
            return (packed,)
        return keye_ops.rope_2d(q, k, positions)

    other = {"positions": positions.flip(0).contiguous()}
    op, mine = "rope_" if in_place else "rope", {"positions": positions}
    return Call(op, heads, function, mine, other, gradients=not in_place)


def rope_2d_in_place(dtype: torch.dtype, device: str, big: bool) -> Call:
    """On views of a packed tensor."""
    return rope_2d(dtype, device, big, in_place=True)


def rope_3d(
    dtype: torch.dtype, device: str, big: bool, norm: bool = False, interleaved: bool = False
) -> Call:
    """Text heads."""
    total, heads, kv_heads = (4099, 32, 8) if big else (13, 4, 1)
    leaves = {
        "q": random((total, heads, 128), dtype, device),
        "k": random((total, kv_heads, 128), dtype, device, 1),
    }
    if norm:
        leaves["q_norm_weight"] = 1 + random((128,), dtype, device, 2) / 4
        leaves["k_norm_weight"] = 1 + random((128,), dtype, device, 3) / 4
    ramp = torch.arange(total)
    positions = torch.stack([ramp, ramp // 7, ramp % 31]).to(device)
    section = (24, 20, 20) if interleaved else (16, 24, 24)

    def function(**leaves: torch.Tensor) -> Tensors:
        q, k = leaves.pop("q"), leaves.pop("k")
        options = {"mrope_section": section, "mrope_interleaved": interleaved}
        return keye_ops.rope_3d(q, k, positions, **options, **leaves)

    other = {"positions": positions.flip(1).contiguous()}
    return Call("rope", leaves, function, {"positions": positions}, other)


def rope_3d_norm(dtype: torch.dtype, device: str, big: bool) -> Call:
    """With RMSNorm of q and k before it."""
    return rope_3d(dtype, device, big, norm=True)


def rope_3d_interleaved(dtype: torch.dtype, device: str, big: bool) -> Call:
    """Qwen3-VL's sections, with the norm."""
    return rope_3d(dtype, device, big, norm=True, interleaved=True)


def _norm(name: str, dtype: torch.dtype, device: str, big: bool, hidden: int) -> Call:
    # Errors of a row share that of its scale, so that few rows would be lucky or unlucky together.
    rows = 5184 if big else 150
    added, bias = name.startswith("add"), "layer" in name
    leaves = {"x": random((rows, hidden), dtype, device) + 0.25}
    if added:
        leaves["residual"] = random((rows, hidden), dtype, device, 1)
    leaves["weight"] = random((hidden,), dtype, device, 2)
    if bias:
        leaves["bias"] = random((hidden,), dtype, device, 3)
    op = name if added else f"add_{name}"
    return Call(op, leaves, lambda **x: getattr(keye_ops, name)(*x.values()))


def add_layer_norm(dtype: torch.dtype, device: str, big: bool) -> Call:
    """The vision tower's."""
    return _norm("add_layer_norm", dtype, device, big, 1152 if big else 72)


def layer_norm(dtype: torch.dtype, device: str, big: bool) -> Call:
    """The tower's first."""
    return _norm("layer_norm", dtype, device, big, 1152 if big else 72)


def layer_norm_odd(dtype: torch.dtype, device: str, big: bool) -> Call:
    """A width that fills no whole number of vectors."""
    return _norm("add_layer_norm", dtype, device, big, 1149 if big else 45)


def add_rms_norm(dtype: torch.dtype, device: str, big: bool) -> Call:
    """The text model's."""
    return _norm("add_rms_norm", dtype, device, big, 4096 if big else 64)


def rms_norm(dtype: torch.dtype, device: str, big: bool) -> Call:
    """The text model's first and last."""
    return _norm("rms_norm", dtype, device, big, 4096 if big else 64)


def grids(big: bool, device: str) -> tuple[PackedGrid, dict[str, Any], dict[str, Any]]:
    """A grid on the device, its contents, and those of another grid of as many patches."""
    name = "mixed" if big else "small"
    first, second = (
        PackedGrid.from_grid_thw(GRIDS[one], device=device) for one in (name, OTHER[name])
    )
    names = ("position_ids", "grid", "image_offsets", "cu_seqlens")
    return first, *({n: getattr(one, n) for n in names} for one in (first, second))


def merge_norm(dtype: torch.dtype, device: str, big: bool, after: bool = True) -> Call:
    """The merge, then the norm (1.5)."""
    grid, mine, others = grids(big, device)
    hidden = 1152 if big else 72
    width = 4 * hidden if after else hidden
    leaves = {
        "x": random((grid.total, hidden), dtype, device),
        "weight": random((width,), dtype, device, 1),
        "bias": random((width,), dtype, device, 2),
    }

    def function(**x: torch.Tensor) -> torch.Tensor:
        return keye_ops.merge_norm(*x.values(), grid)

    return Call("merge_norm", leaves, function, mine, others)


def merge_norm_before(dtype: torch.dtype, device: str, big: bool) -> Call:
    """The norm, then the merge (Preview)."""
    return merge_norm(dtype, device, big, after=False)


def linear_gelu(
    dtype: torch.dtype, device: str, big: bool, approximate: str = "none", odd: bool = False
) -> Call:
    """The projector's first layer; by tanh the tower's MLP."""
    rows, inner, outer = (1296, 4608, 4608) if approximate == "none" else (1337, 1152, 4304)
    if odd:
        rows, inner, outer = 333, 1149, 1003
    if not big:
        rows, inner, outer = (9, 31, 17) if odd else (9, 64, 48)
    leaves = {
        "x": random((rows, inner), dtype, device),
        "weight": random((outer, inner), dtype, device, 1) / inner**0.5,
        "bias": random((outer,), dtype, device, 2),
    }
    return Call("linear_gelu", leaves, lambda **x: keye_ops.linear_gelu(*x.values(), approximate))


def linear_gelu_tanh(dtype: torch.dtype, device: str, big: bool) -> Call:
    """The tower's MLP."""
    return linear_gelu(dtype, device, big, "tanh")


def linear_gelu_odd(dtype: torch.dtype, device: str, big: bool) -> Call:
    """Sizes that no tile divides."""
    return linear_gelu(dtype, device, big, odd=True)


def patch_embed(
    dtype: torch.dtype, device: str, big: bool, integers: bool = False, odd: bool = False
) -> Call:
    """588 to 1152 with the position table."""
    grid, mine, others = grids(big, device)
    hidden, patch, side = (1152, 14, 27) if big else (64, 4, 5)
    hidden += odd * 3
    inner = 3 * patch * patch
    leaves = {
        "pixel_values": random((grid.total, 3, patch, patch), dtype, device),
        "weight": random((hidden, 3, patch, patch), dtype, device, 1) / inner**0.5,
        "bias": random((hidden,), dtype, device, 2),
        "table": random((side * side, hidden), dtype, device, 3),
    }
    if integers:
        generator = torch.Generator().manual_seed(4)
        shape = leaves.pop("pixel_values").shape
        raw = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)

    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)

    def function(**x: torch.Tensor) -> torch.Tensor:
        pixels = raw if integers else x.pop("pixel_values")
        return keye_ops.patch_embed(pixels, *x.values(), grid, image_mean=mean, image_std=std)

    def meaning(**x: torch.Tensor) -> torch.Tensor:
        shift, factor = (torch.tensor(y, dtype=torch.float64) for y in (mean, std))
        shift, factor = (y[:, None, None].to(device) for y in (shift, factor))
        pixels = (raw.double() / 255 - shift) / factor
        return keye_ops.patch_embed(pixels, *x.values(), grid)

    in_fp64 = meaning if integers else None
    return Call("patch_embed", leaves, function, mine, others, meaning=in_fp64)


def patch_embed_uint8(dtype: torch.dtype, device: str, big: bool) -> Call:
    """On pixels as they are decoded."""
    return patch_embed(dtype, device, big, integers=True)


def patch_embed_odd(dtype: torch.dtype, device: str, big: bool) -> Call:
    """To a width that is no multiple of a vector."""
    return patch_embed(dtype, device, big, odd=True)


def projector(dtype: torch.dtype, device: str, big: bool) -> Call:
    """Of 1.5."""
    grid, mine, others = grids(big, device)
    hidden, out = (1152, 4096) if big else (16, 40)
    wide = 4 * hidden
    shapes = {
        **{"x": (grid.total, hidden), "norm_weight": (wide,), "norm_bias": (wide,)},
        **{"linear_1_weight": (wide, wide), "linear_1_bias": (wide,)},
        **{"linear_2_weight": (out, wide), "linear_2_bias": (out,)},
    }
    leaves = {n: random(shape, dtype, device, i) for i, (n, shape) in enumerate(shapes.items())}
    for name in ("linear_1_weight", "linear_2_weight"):
        leaves[name] /= wide**0.5

    def function(**x: torch.Tensor) -> torch.Tensor:
        return keye_ops.projector(*x.values(), grid)

    return Call("linear_gelu", leaves, function, mine, others)


def varlen_attention(
    dtype: torch.dtype, device: str, big: bool, text: bool = False, head_dim: int = 72
) -> Call:
    """Vision heads over packed frames; or causal grouped text heads."""
    lengths = [700, 3, 0, 260, 1] if big else [9, 3, 0, 12, 1]
    heads, kv_heads, head_dim = (32, 8, 128) if text else (16, 16, head_dim)
    if not big:
        heads, kv_heads = (4, 2) if text else (2, 2)
    total = sum(lengths) + 2
    leaves = {
        name: random((total, n, head_dim), dtype, device, i)
        for i, (name, n) in enumerate(zip("qkv", (heads, kv_heads, kv_heads), strict=True))
    }
    offsets = [
        torch.tensor([0, *one]).cumsum(0).int().to(device) for one in (lengths, lengths[::-1])
    ]

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        longest = {"max_seqlen_q": max(lengths)}
        return keye_ops.varlen_attention(q, k, v, offsets[0], **longest, causal=text)

    mine, others = ({"cu_seqlens": one} for one in offsets)
    return Call("varlen_attention", leaves, function, mine, others)


def varlen_attention_text(dtype: torch.dtype, device: str, big: bool) -> Call:
    """Causal."""
    return varlen_attention(dtype, device, big, text=True)


def varlen_attention_80(dtype: torch.dtype, device: str, big: bool) -> Call:
    """Another head size."""
    return varlen_attention(dtype, device, big, head_dim=80)


def patchify(dtype: torch.dtype, device: str, big: bool, video: bool = False) -> Call:
    """Frames to patches; integers, so that every bit counts."""
    count, height, width = (4, 480, 640) if big else (2, 20, 33)
    size = (392, 504) if big else (28, 14)
    generator = torch.Generator().manual_seed(5)
    shape = (count, height, width, 3)
    frames = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
    options = {"mode": "bilinear", "arithmetic": "uint8"} if video else {}

    def function() -> torch.Tensor:
        return keye_ops.patchify(frames, size, **options)

    return Call("patchify", {}, function, exact=True, gradients=False)


def patchify_video(dtype: torch.dtype, device: str, big: bool) -> Call:
    """As 1.5 resizes the frames of videos."""
    return patchify(dtype, device, big, video=True)


CASES = {
    "rope_2d": rope_2d,
    "rope_2d in place": rope_2d_in_place,
    "rope_3d": rope_3d,
    "rope_3d with norm": rope_3d_norm,
    "rope_3d interleaved": rope_3d_interleaved,
    "add_layer_norm": add_layer_norm,
    "layer_norm": layer_norm,
    "add_layer_norm odd": layer_norm_odd,
    "add_rms_norm": add_rms_norm,
    "rms_norm": rms_norm,
    "merge_norm": merge_norm,
    "merge_norm before": merge_norm_before,
    "linear_gelu": linear_gelu,
    "linear_gelu tanh": linear_gelu_tanh,
    "linear_gelu odd": linear_gelu_odd,
    "patch_embed": patch_embed,
    "patch_embed uint8": patch_embed_uint8,
    "patch_embed odd": patch_embed_odd,
    "projector": projector,
    "varlen_attention": varlen_attention,
    "varlen_attention text": varlen_attention_text,
    "varlen_attention 80": varlen_attention_80,
    "patchify": patchify,
    "patchify of videos": patchify_video,
}


def names() -> list[str]:
    """Cases of the ops that this version of keye_ops has."""
    return [name for name in CASES if hasattr(keye_ops, name.split()[0])]


def op_of(name: str) -> str:
    """The op that a case is dispatched by."""
    op = name.split()[0]
    op = {"rope_2d": "rope", "rope_3d": "rope", "projector": "linear_gelu"}.get(op, op)
    return f"add_{op}" if op in ("layer_norm", "rms_norm") else op


def make(name: str, dtype: str, device: str, big: bool) -> Call:
    """A case."""
    return CASES[name](DTYPES[dtype], device, big)
