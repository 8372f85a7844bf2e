"""What keye_ops is timed beside on a GPU, where it is installed; absent ones are listed."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from keye_ops.bench import peers
from keye_ops.bench.harness import Provider, Settings, Skip, in_mode

from keye_ops import PackedGrid

Inputs = Sequence[torch.Tensor]


def on_gpu(settings: Settings) -> bool:
    """Whether a GPU is what is timed."""
    return settings.device.startswith("cuda")


def optional(module: str, name: str) -> Any:
    """A function of a library, or why there is none."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return Skip("not installed")
    except Exception as error:  # a binary for another torch fails in many ways
        first = (str(error).splitlines() or [""])[0]
        return Skip(f"does not load: {type(error).__name__}: {first}"[:200])


def with_variable(name: str, value: str, provider: Provider) -> Provider:
    """A provider that runs under a variable of the environment."""

    def call() -> Any:
        before = os.environ.get(name)
        os.environ[name] = value
        try:
            return provider()
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before

    return call


def both_products(settings: Settings, name: str, provider: Provider) -> dict[str, Provider | Skip]:
    """Our matrix product, and torch's with our epilogue after it, by name."""
    if not on_gpu(settings):
        return {}
    return {
        f"{name}, KEYE_OPS_GEMM={kind}": with_variable("KEYE_OPS_GEMM", kind, provider)
        for kind in ("fused", "torch")
    }


# ---- attention ----


def attention(
    inputs: Inputs, lengths: Sequence[int], causal: bool, mode: str, settings: Settings
) -> dict[str, Provider | Skip]:
    """Every attention of packed segments that this machine has."""
    if not on_gpu(settings):
        return {}
    offsets = torch.tensor([0, *lengths]).cumsum(0).int().to(settings.device)
    args = (offsets, max(lengths), causal)
    found: dict[str, Provider | Skip] = {
        "torch varlen_attn": _given(torch_varlen(*args), inputs, mode),
        "FlashAttention 2": _given(flash("flash_attn", *args), inputs, mode),
        "FlashAttention 3": _given(flash("flash_attn_interface", *args), inputs, mode),
        "FlashAttention 4": _given(flash("flash_attn.cute", *args), inputs, mode),
    }
    for kind in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
        name = f"torch SDPA, {kind.split('_')[0].lower()}"
        found[name] = _given(sdpa(kind, lengths, causal), inputs, mode)
    found["flex_attention"] = _given(flex(offsets, lengths, causal, settings), inputs, mode)
    if not isinstance(found["flex_attention"], Skip):
        found["flex_attention"].compiles = True
    return found


def _given(function: Any, inputs: Inputs, mode: str) -> Provider | Skip:
    return function if isinstance(function, Skip) else in_mode(mode, function, inputs)


def torch_varlen(offsets: torch.Tensor, longest: int, causal: bool) -> Any:
    """torch's own packed attention; its arguments changed from release to release."""
    function = optional("torch.nn.attention.varlen", "varlen_attn")
    if isinstance(function, Skip):
        return function
    known = inspect.signature(function).parameters
    if causal and "is_causal" in known:
        options: dict[str, Any] = {"is_causal": True}
    elif causal:
        options = {"window_size": (-1, 0)}
    else:
        options = {}

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        own = dict(options)
        if q.shape[1] != k.shape[1]:
            if "enable_gqa" in known:
                own["enable_gqa"] = True
            else:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return function(q, k, v, offsets, offsets, longest, longest, **own)

    return call


def flash(module: str, offsets: torch.Tensor, longest: int, causal: bool) -> Any:
    """FlashAttention of a generation; all take the same arguments."""
    function = optional(module, "flash_attn_varlen_func")
    if isinstance(function, Skip):
        return function
    options = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "causal": causal}
    options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
    known = inspect.signature(function).parameters
    options = {k: v for k, v in options.items() if k in known}

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = function(q, k, v, **options)
        return out[0] if isinstance(out, tuple) else out

    return call


def sdpa(kind: str, lengths: Sequence[int], causal: bool) -> Any:
    """One kernel of torch's SDPA, for segments of one length."""
    if len(set(lengths)) > 1:
        return Skip("segments of several lengths")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = getattr(SDPBackend, kind)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    batched = peers.together(attend, lengths)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel([backend]):
            return batched(q, k, v)

    return call


@functools.cache
def _compiled_flex() -> Any:
    function = optional("torch.nn.attention.flex_attention", "flex_attention")
    return function if isinstance(function, Skip) else torch.compile(function, dynamic=False)


def flex(offsets: torch.Tensor, lengths: Sequence[int], causal: bool, settings: Settings) -> Any:
    """flex_attention with a mask of documents, made outside of what is timed."""
    if settings.skips_compilation:
        return Skip("not timed on this case: it has to be compiled first")
    function = _compiled_flex()
    make = optional("torch.nn.attention.flex_attention", "create_block_mask")
    if isinstance(function, Skip) or isinstance(make, Skip):
        return function if isinstance(function, Skip) else make
    total, device = sum(lengths), settings.device
    document = torch.repeat_interleave(
        torch.arange(len(lengths), device=device), offsets.diff().long(), output_size=total
    )

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        same = document[q] == document[k]
        return same & (q >= k) if causal else same

    block_mask = make(mask, None, None, total, total, device=device, _compile=True)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        grouped = q.shape[1] != k.shape[1]
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = function(q, k, v, block_mask=block_mask, enable_gqa=grouped)
        return out[0].transpose(0, 1)

    return call


# ---- norms and rotations ----


def liger(name: str, settings: Settings, *args: Any, **options: Any) -> Provider | Skip:
    """A function of Liger-Kernel on arguments."""
    if not on_gpu(settings):
        return Skip("a GPU library")
    function = optional("liger_kernel.transformers.functional", f"liger_{name}")
    return function if isinstance(function, Skip) else lambda: function(*args, **options)


def liger_rope_3d(
    q: torch.Tensor,
    k: torch.Tensor,
    table: Sequence[torch.Tensor],
    weight: torch.Tensor,
    section: Sequence[int],
    settings: Settings,
) -> Provider | Skip:
    """Its two norms, then its rotation with cosines and sines made beforehand."""
    if not on_gpu(settings):
        return Skip("a GPU library")
    module = "liger_kernel.transformers.functional"
    norm, rotate = (optional(module, f"liger_{name}") for name in ("rms_norm", "qwen2vl_mrope"))
    if isinstance(norm, Skip) or isinstance(rotate, Skip):
        return norm if isinstance(norm, Skip) else rotate
    position_ids, inv_freq, _ = table
    angles = position_ids[:, None, :, None] * inv_freq  # [3, 1, N, 64]
    cos, sin = (f(torch.cat([angles, angles], -1)).to(q.dtype) for f in (torch.cos, torch.sin))

    def call() -> Any:
        normed = (norm(x, weight, 1e-6, in_place=False) for x in (q, k))
        heads = (x.transpose(0, 1)[None] for x in normed)
        return rotate(*heads, cos, sin, list(section))

    return call


def flash_rotary(
    q: torch.Tensor, k: torch.Tensor, table: Sequence[torch.Tensor], settings: Settings
) -> Provider | Skip:
    """FlashAttention's rotation with cosines and sines made beforehand."""
    if not on_gpu(settings):
        return Skip("a GPU library")
    rotate = optional("flash_attn.layers.rotary", "apply_rotary_emb")
    if isinstance(rotate, Skip):
        return rotate
    position_ids, inv_freq, axis = table
    angles = position_ids[axis.long()].T * inv_freq
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    return lambda: tuple(rotate(x[None], cos, sin) for x in (q, k))


def per_image(
    function: Callable[[torch.Tensor, PackedGrid], torch.Tensor],
    x: torch.Tensor,
    grids: Sequence[tuple[int, int, int]],
) -> Callable[[], torch.Tensor]:
    """A call an image, as models are commonly written."""
    packed = [PackedGrid.from_grid_thw([grid], device=x.device) for grid in grids]
    parts = x.split([grid.total for grid in packed])
    return lambda: torch.cat([function(*pair) for pair in zip(parts, packed, strict=True)])
