"""add_rms_norm: a residual add and the RMSNorm after it, in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from keye_ops import dispatch
from keye_ops.checks import check_floating, check_same, check_shape
from keye_ops.extension import define

Pair = tuple[torch.Tensor, torch.Tensor]

# ---- reference ----


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float = 1e-6
) -> Pair:
    """The definition, in plain PyTorch; arguments as in :func:`add_rms_norm`.

    Without a residual the first output is empty: an op must not return its own argument.
    """
    _check_add_rms_norm("x", x, weight, residual=residual)
    total = x if residual is None else x + residual  # the stream keeps the dtype's rounding
    normed = F.rms_norm(total, weight.shape, weight, eps).contiguous()
    return (x.new_empty(0) if residual is None else total.contiguous()), normed


def add_rms_norm_backward_reference(
    dsum: torch.Tensor | None,
    dnormed: torch.Tensor,
    sum: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> Pair:
    """Gradients with respect to x (and the residual, the same) and weight."""
    _check_add_rms_norm("sum", sum, weight, dnormed=dnormed, dsum=dsum)
    compute = torch.float64 if sum.dtype == torch.float64 else torch.float32
    x, grad = sum.to(compute), dnormed.to(compute)
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed, weighted = x * rstd, grad * weight.to(compute)
    dx = rstd * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    dx = dx if dsum is None else dx + dsum
    return dx.to(sum.dtype).contiguous(), (grad * normed).sum(0).to(sum.dtype)


def _check_add_rms_norm(
    name: str, x: torch.Tensor, weight: torch.Tensor, **others: torch.Tensor | None
) -> None:
    op = "add_rms_norm"
    check_floating(op, name, x)
    check_shape(op, name, x, ("N", "C"))
    check_shape(op, "weight", weight, (x.shape[1],))
    check_same(op, "weight", weight, name, x)
    for other, tensor in others.items():
        if tensor is not None:
            check_shape(op, other, tensor, tuple(x.shape))
            check_same(op, other, tensor, name, x)


# ---- schemas, fakes, autograd ----

define(
    "add_rms_norm",
    "(Tensor x, Tensor? residual, Tensor weight, float eps=1e-06) -> (Tensor, Tensor)",
    add_rms_norm_reference,
)
define(
    "add_rms_norm_backward",
    "(Tensor? dsum, Tensor dnormed, Tensor sum, Tensor weight, float eps) -> (Tensor, Tensor)",
    add_rms_norm_backward_reference,
)


@torch.library.register_fake("keye_ops::add_rms_norm")
def _(x: torch.Tensor, residual: torch.Tensor | None, *args: Any) -> Pair:
    return x.new_empty(0 if residual is None else x.shape), x.new_empty(x.shape)


@torch.library.register_fake("keye_ops::add_rms_norm_backward")
def _(
    dsum: torch.Tensor | None,
    dnormed: torch.Tensor,
    sum: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> Pair:
    return sum.new_empty(sum.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    x, residual, weight, eps = inputs
    ctx.save_for_backward(x if residual is None else output[0], weight)
    ctx.eps, ctx.added = eps, residual is not None


def _backward(ctx: Any, dsum: torch.Tensor, dnormed: torch.Tensor) -> tuple[Any, ...]:
    dsum = dispatch.fit_gradient(dsum) if ctx.added else None
    op = torch.ops.keye_ops.add_rms_norm_backward
    dx, dweight = op(dsum, dispatch.fit_gradient(dnormed), *ctx.saved_tensors, ctx.eps)
    return dx, (dx if ctx.added else None), dweight, None


torch.library.register_autograd("keye_ops::add_rms_norm", _backward, setup_context=_setup_context)


# ---- public ----


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6
) -> Pair:
    """Add ``x`` to the residual stream and normalise the sum.

    ``sum = x + residual`` and ``normed = sum * rsqrt(mean(sum ** 2) + eps) * weight``, the norm of
    Qwen3 and so of Keye-VL's text model. Like ``F.rms_norm`` it rounds once. The published models
    round twice, ``sum * rsqrt(...)`` to the dtype before the product with the weight, which adds
    an error of about half a unit in the last place of bf16; in fp32 the two agree.

    Args:
        x: [N, C], fp64, fp32, fp16 or bf16; rows of any stride.
        residual: [N, C], dtype of x.
        weight: [C], dtype of x.
        eps: added to the mean of squares.

    Returns:
        ``x + residual``, rounded to the dtype as the stream carries it on, and RMSNorm over C of
        that sum; new contiguous tensors [N, C]. Arithmetic is fp32 (fp64 for fp64).

    Raises:
        RuntimeError: shapes, dtypes or devices outside of the above.
    """
    return _add_rms_norm(x, residual, weight, eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """RMSNorm over the last dimension: :func:`add_rms_norm` without a residual.

    Args:
        x: [N, C], fp64, fp32, fp16 or bf16; rows of any stride.
        weight: [C], dtype of x.
        eps: added to the mean of squares.

    Returns:
        A new contiguous tensor [N, C].

    Raises:
        RuntimeError: shapes, dtypes or devices outside of the above.
    """
    return _add_rms_norm(x, None, weight, eps)[1]


def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> Pair:
    if torch.compiler.is_compiling():
        x = dispatch.fit_for_kernel(x)
        residual = None if residual is None else dispatch.fit_for_kernel(residual)
    args = (x, residual, weight, eps)
    if dispatch.use_native("add_rms_norm", x, _unsupported(*args[:3])):
        return dispatch.call(torch.ops.keye_ops.add_rms_norm.default, args)
    return add_rms_norm_reference(*args)


def _unsupported(x: torch.Tensor, *others: torch.Tensor | None) -> str | None:
    """Why the native kernel does not take the tensors, or None."""
    return dispatch.unsupported_rows(x, x.shape[-1] if x.dim() else 0, *others)
