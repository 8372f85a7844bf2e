"""varlen_attention: attention over segments packed one after another, without padding or masks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from keye_ops import dispatch
from keye_ops.attention_plan import (
    AttentionPlan,
    check_offsets_pair,
    varlen_attention_plan_reference,
)
from keye_ops.checks import check, check_floating, check_same, check_shape
from keye_ops.extension import define

_BLOCK_ROWS = 1024  # query rows whose scores the reference holds at a time
_PLAN_ROWS, _PLAN_HEADER = 256, 8  # kAttentionTileRows, kAttentionPlanHeader

# ---- reference ----


def varlen_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_lse: bool = True,
    plan: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: scaled_dot_product_attention of every segment by itself.

    Returns ``out`` and ``softmax_lse`` (an empty tensor unless asked for).
    """
    _check_varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    offsets_q = _host_offsets("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    offsets_k = _host_offsets("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    _check_longest("max_seqlen_q", max_seqlen_q, offsets_q)
    _check_longest("max_seqlen_k", max_seqlen_k, offsets_k)

    outputs, lses = [], []
    for i in range(len(offsets_q) - 1):
        segment = (
            q[offsets_q[i] : offsets_q[i + 1]],
            k[offsets_k[i] : offsets_k[i + 1]],
            v[offsets_k[i] : offsets_k[i + 1]],
        )
        outputs.append(_attend(*segment, scale, causal))
        if return_lse:
            lses.append(_lse(segment[0].detach(), segment[1].detach(), scale, causal))
    # Rows past the last offset belong to no segment.
    outputs.append(_zeros(q[offsets_q[-1] :], k, v))
    rest = q.shape[0] - offsets_q[-1]
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lses.append(q.new_full((q.shape[1], rest), -torch.inf, dtype=lse_dtype))
    lse = torch.cat(lses, 1) if return_lse else q.new_empty(0, dtype=lse_dtype)
    return torch.cat(outputs), lse


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> torch.Tensor:
    """Attention of one segment: q [nq, H, D], k and v [nk, Hkv, D]."""
    nq, nk = q.shape[0], k.shape[0]
    blind = max(nq - nk, 0) if causal else (nq if nk == 0 else 0)  # rows that see no key
    if blind == nq:
        return _zeros(q, k, v)
    if not causal or nq >= nk:
        out = _dense_attention(q[blind:], k, v, scale, is_causal=causal)
        return torch.cat([q.new_zeros(blind, *q.shape[1:]), out]) if blind else out
    # is_causal aligns at the top left, so these rows need a mask: of a block of them at a time.
    blocks = []
    for start in range(0, nq, _BLOCK_ROWS):
        rows = q[start : start + _BLOCK_ROWS]
        before = start + nk - nq  # keys that every row of the block sees
        seen = before + rows.shape[0]
        mask = torch.ones(rows.shape[0], seen, dtype=torch.bool, device=q.device).tril(before)
        blocks.append(_dense_attention(rows, k[:seen], v[:seen], scale, attn_mask=mask))
    return torch.cat(blocks)


def _dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, **mask: Any
) -> torch.Tensor:
    """scaled_dot_product_attention of [rows, heads, head_dim] tensors."""
    if scale <= 0:
        # Kernels of torch for GPUs hide scores before they scale them, and -inf times that is not
        # -inf.
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    # They also read vectors of 16 bytes from wherever the tensors start.
    q, k, v = (dispatch.fit_rows(x).transpose(0, 1)[None] for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped, **mask)
    return out[0].transpose(0, 1)


def _zeros(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Zeros like q that depend on no value, yet leave gradients that are zeros and not missing."""
    return q.new_zeros(q.shape) + (q[:0].sum() + k[:0].sum() + v[:0].sum())


def _score_blocks(
    q: torch.Tensor, k: torch.Tensor, scale: float, causal: bool
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Rows, their scores [H, rows, nk] and what is hidden of them, a block of rows at a time."""
    nq, nk = q.shape[0], k.shape[0]
    for start in range(0, nq, _BLOCK_ROWS):
        rows = slice(start, min(start + _BLOCK_ROWS, nq))
        row = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
        key = torch.arange(nk, device=q.device)
        hidden = (key > row + (nk - nq)) & causal
        scores = torch.einsum("qhd,khd->hqk", q[rows], k) * scale
        yield rows, scores.masked_fill(hidden, -torch.inf), hidden


def _widen(x: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """fp32 (fp64 for fp64), every head ``groups`` times."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to(compute).repeat_interleave(groups, dim=1)


def _lse(q: torch.Tensor, k: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    """Log of the softmax denominator [H, nq]."""
    q, k = _widen(q), _widen(k, q.shape[1] // k.shape[1])
    blocks = [scores.logsumexp(-1) for _, scores, _ in _score_blocks(q, k, scale, causal)]
    return torch.cat(blocks, 1) if blocks else q.new_empty(q.shape[1], 0)


def varlen_attention_backward_reference(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    softmax_scale: float | None,
    causal: bool,
    plan: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, written out: autograd does not record inside an op."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    groups = q.shape[1] // k.shape[1]
    wide_q, wide_k, wide_v, wide_dout = (
        _widen(q),
        _widen(k, groups),
        _widen(v, groups),
        _widen(dout),
    )
    dq, dk, dv = (torch.zeros_like(x) for x in (wide_q, wide_k, wide_v))
    offsets_q = _host_offsets("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    offsets_k = _host_offsets("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    for (start_q, end_q), (start_k, end_k) in zip(
        pairwise(offsets_q), pairwise(offsets_k), strict=True
    ):
        keys = slice(start_k, end_k)
        segment_q, segment_k = wide_q[start_q:end_q], wide_k[keys]
        for rows, scores, hidden in _score_blocks(segment_q, segment_k, scale, causal):
            block = slice(start_q + rows.start, start_q + rows.stop)
            weights = scores.softmax(-1).masked_fill(hidden, 0)
            dweights = torch.einsum("qhd,khd->hqk", wide_dout[block], wide_v[keys])
            mean = (weights * dweights).sum(-1, keepdim=True)
            dscores = weights * (dweights - mean) * scale
            dq[block] = torch.einsum("hqk,khd->qhd", dscores, segment_k)
            dk[keys] += torch.einsum("hqk,qhd->khd", dscores, wide_q[block])
            dv[keys] += torch.einsum("hqk,qhd->khd", weights, wide_dout[block])
    dk, dv = (x.unflatten(1, (k.shape[1], groups)).sum(2) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _check_varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> None:
    op = "varlen_attention"
    check_floating(op, "q", q)
    check_shape(op, "q", q, ("Nq", "H", "D"))
    check_shape(op, "k", k, ("Nk", "Hkv", q.shape[2]))
    check_same(op, "k", k, "q", q)
    check_shape(op, "v", v, tuple(k.shape))
    check_same(op, "v", v, "q", q)
    heads, kv_heads = q.shape[1], k.shape[1]
    good = kv_heads > 0 and heads % kv_heads == 0
    check(good, op, "num_heads must be a multiple of num_kv_heads", (heads, kv_heads))
    check_offsets_pair(cu_seqlens_q, cu_seqlens_k)
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check(cu_seqlens.device == q.device, op, f"{name} must be on {q.device}", cu_seqlens.device)


def _host_offsets(name: str, cu_seqlens: torch.Tensor, total: int) -> list[int]:
    offsets = cu_seqlens.tolist()
    op = "varlen_attention"
    check(offsets[0] == 0, op, f"{name} must start at 0", offsets[0])
    for low, high in pairwise(offsets):
        check(low <= high, op, f"{name} must not decrease", f"{low} then {high}")
    check(offsets[-1] <= total, op, f"{name} must end within the {total} rows", offsets[-1])
    return offsets


def _check_longest(name: str, longest: int | None, offsets: list[int]) -> None:
    real = max((b - a for a, b in pairwise(offsets)), default=0)
    good = longest is None or longest >= real
    check(good, "varlen_attention", f"{name} must be at least the longest segment, {real}", longest)


# ---- schema, fake, autograd ----

_SEQLENS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
define(
    "varlen_attention",
    f"(Tensor q, Tensor k, Tensor v, {_SEQLENS}SymInt? max_seqlen_q=None, "
    "SymInt? max_seqlen_k=None, float? softmax_scale=None, bool causal=False, "
    "bool return_lse=True, Tensor? plan=None) -> (Tensor, Tensor)",
    varlen_attention_reference,
)
define(
    "varlen_attention_backward",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, {_SEQLENS}"
    "SymInt? max_seqlen_q, SymInt? max_seqlen_k, float? softmax_scale, bool causal, "
    "Tensor? plan=None) -> (Tensor, Tensor, Tensor)",
    varlen_attention_backward_reference,
)
define(
    "varlen_attention_plan",
    f"({_SEQLENS}SymInt total_q, SymInt total_k, bool causal=False) -> Tensor",
    varlen_attention_plan_reference,
)


@torch.library.register_fake("keye_ops::varlen_attention")
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_lse: bool = True,
    plan: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = (q.shape[1], q.shape[0]) if return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=lse_dtype)


@torch.library.register_fake("keye_ops::varlen_attention_backward")
def _(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake("keye_ops::varlen_attention_plan")
def _(
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    total_q: int,
    total_k: int,
    causal: bool = False,
) -> torch.Tensor:
    planned = dispatch.kernel_device(cu_seqlens_q) == "cuda" and dispatch.has_kernel(
        "varlen_attention_plan", cu_seqlens_q.device.type
    )
    words = _plan_words(cu_seqlens_q.shape[0] - 1, total_q, total_k) if planned else 0
    return cu_seqlens_q.new_empty(words)


def _plan_words(num_segments: int, *totals: int) -> int:
    """Of attention_plan_words() in varlen_attention.h."""
    tiles = (n // _PLAN_ROWS + torch.sym_min(num_segments + 1, n) for n in totals)
    return _PLAN_HEADER + 4 * sum(tiles)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, causal, _, plan = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, plan)
    ctx.options = (max_q, max_k, scale, causal)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dout: torch.Tensor, dlse: Any) -> tuple[Any, ...]:
    op = torch.ops.keye_ops.varlen_attention_backward
    *saved, plan = ctx.saved_tensors
    if dout.stride(-1) != 1 or not _has_tiles(dout):  # a sum's gradient has strides of 0
        dout = dout.clone(memory_format=torch.contiguous_format)
    return *op(dout, *saved, *ctx.options, plan), *[None] * 8


torch.library.register_autograd(
    "keye_ops::varlen_attention", _backward, setup_context=_setup_context
)


# ---- public ----


_CUDA_HEAD_DIMS = (64, 72, 80, 96, 128)
_CUDA_DTYPES = (torch.float16, torch.bfloat16)


def _unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why the native kernel does not take these arguments, or None if it does."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() == 3 and x.stride(2) != 1 and x.shape[2] > 1 and x.numel():
            return f"{name} must have unit last stride, got {x.stride(2)}"
    if dispatch.kernel_device(q) != "cuda":
        return None
    if q.dtype not in _CUDA_DTYPES:
        return f"it has no {q.dtype} on cuda"
    if q.dim() == 3 and q.shape[2] not in _CUDA_HEAD_DIMS:
        return f"it has no head_dim {q.shape[2]} on cuda"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not _has_tiles(x):
            return f"it needs rows of {name} at multiples of 16 bytes on cuda"
    return None


def _has_tiles(x: torch.Tensor) -> bool:
    """Whether CUDA's copies of whole tiles can read x, which take no stride of 0."""
    if dispatch.kernel_device(x) != "cuda":
        return True
    strides = zip(x.shape, x.stride(), strict=True)
    return all(n <= 1 or stride > 0 for n, stride in strides) and dispatch.has_fitting_rows(x)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_lse: bool = False,
    plan: AttentionPlan | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(q @ k.T * softmax_scale) @ v inside every segment of a packed batch.

    Args:
        q: [Nq, num_heads, head_dim]; any strides with unit last stride.
        k: [Nk, num_kv_heads, head_dim], num_kv_heads a divisor of num_heads (grouped queries).
        v: like k.
        cu_seqlens_q: int32 [num_segments + 1], offsets into q: from 0, never falling, at most Nq.
        cu_seqlens_k: the same for k and v; None takes cu_seqlens_q, and max_seqlen_q with it.
        max_seqlen_q, max_seqlen_k: host upper bounds of the segment lengths, if known.
        softmax_scale: factor of the scores; None is head_dim ** -0.5.
        causal: query i of a segment sees keys up to i + (nk - nq), aligned at the bottom right.
        return_lse: also give the log of the softmax denominators.
        plan: of these offsets, made once for many calls; saves a launch on GPUs.

    Returns:
        out [Nq, num_heads, head_dim]; with ``return_lse`` also softmax_lse, fp32 (fp64 for fp64)
        [num_heads, Nq], which carries no gradient. Rows that see no key, and rows past the last
        offset, are zero with lse -inf.

    On CUDA the kernels take fp16 and bf16 and head_dim 64, 72, 80, 96 and 128; the rest is the
    reference's, which reads offsets on the host. There, with ``causal``, a value of v that is not
    finite may reach rows of its segment that do not see it.

    Raises:
        RuntimeError: shapes, dtypes, devices, offsets or a plan that do not fit. Offsets on a GPU,
            which the host does not see, are reported by :func:`check_errors` where they lie, and
            everything is zero.
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
        max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
    if plan is not None:
        plan.check_fits(q, k, cu_seqlens_q, cu_seqlens_k, causal)
        max_seqlen_q = plan.max_seqlen_q if max_seqlen_q is None else max_seqlen_q
        max_seqlen_k = plan.max_seqlen_k if max_seqlen_k is None else max_seqlen_k
    args = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    tiles = plan.tiles if plan is not None else None
    options = (softmax_scale, causal, return_lse or torch.is_grad_enabled(), tiles)
    if dispatch.use_native("varlen_attention", q, _unsupported(q, k, v)):
        out, lse = dispatch.call(torch.ops.keye_ops.varlen_attention.default, args + options)
    else:
        out, lse = varlen_attention_reference(*args, *options[:2], return_lse)
    return (out, lse) if return_lse else out
