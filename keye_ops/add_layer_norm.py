"""add_layer_norm: a residual add and the LayerNorm after it, in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from keye_ops import dispatch
from keye_ops.checks import check_floating, check_same, check_shape
from keye_ops.extension import define

Pair = tuple[torch.Tensor, torch.Tensor]

# ---- reference ----


def add_layer_norm_reference(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-6,
) -> Pair:
    """The definition, in plain PyTorch; arguments as in :func:`add_layer_norm`.

    Without a residual the first output is empty: an op must not return its own argument.
    """
    _check_add_layer_norm("x", x, weight, residual=residual)
    check_shape("add_layer_norm", "bias", bias, (x.shape[1],))
    check_same("add_layer_norm", "bias", bias, "x", x)
    total = x if residual is None else x + residual  # the stream keeps the dtype's rounding
    normed = F.layer_norm(total, weight.shape, weight, bias, eps).contiguous()
    return (x.new_empty(0) if residual is None else total.contiguous()), normed


def add_layer_norm_backward_reference(
    dsum: torch.Tensor | None,
    dnormed: torch.Tensor,
    sum: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients with respect to x (and the residual, the same), weight and bias."""
    _check_add_layer_norm("sum", sum, weight, dnormed=dnormed, dsum=dsum)
    shape = list(weight.shape)
    _, mean, rstd = torch.native_layer_norm(sum, shape, weight, weight, eps)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dnormed, sum, shape, mean, rstd, weight, weight, [True, True, True]
    )
    return (dx if dsum is None else dx + dsum).contiguous(), dweight, dbias


def _check_add_layer_norm(
    name: str, x: torch.Tensor, weight: torch.Tensor, **others: torch.Tensor | None
) -> None:
    op = "add_layer_norm"
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
    "add_layer_norm",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps=1e-06) -> (Tensor, Tensor)",
    add_layer_norm_reference,
)
define(
    "add_layer_norm_backward",
    "(Tensor? dsum, Tensor dnormed, Tensor sum, Tensor weight, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    add_layer_norm_backward_reference,
)


@torch.library.register_fake("keye_ops::add_layer_norm")
def _(x: torch.Tensor, residual: torch.Tensor | None, *args: Any) -> Pair:
    return x.new_empty(0 if residual is None else x.shape), x.new_empty(x.shape)


@torch.library.register_fake("keye_ops::add_layer_norm_backward")
def _(
    dsum: torch.Tensor | None,
    dnormed: torch.Tensor,
    sum: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = weight.shape
    return sum.new_empty(sum.shape), weight.new_empty(shape), weight.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    x, residual, weight, _, eps = inputs
    ctx.save_for_backward(x if residual is None else output[0], weight)
    ctx.eps, ctx.added = eps, residual is not None


def _backward(ctx: Any, dsum: torch.Tensor, dnormed: torch.Tensor) -> tuple[Any, ...]:
    dsum = dispatch.fit_gradient(dsum) if ctx.added else None
    op = torch.ops.keye_ops.add_layer_norm_backward
    dx, dweight, dbias = op(dsum, dispatch.fit_gradient(dnormed), *ctx.saved_tensors, ctx.eps)
    return dx, (dx if ctx.added else None), dweight, dbias, None


torch.library.register_autograd("keye_ops::add_layer_norm", _backward, setup_context=_setup_context)


# ---- public ----


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float = 1e-6,
) -> Pair:
    """Add ``x`` to the residual stream and normalise the sum.

    Args:
        x: [N, C], fp64, fp32, fp16 or bf16; rows of any stride.
        residual: [N, C], dtype of x.
        weight, bias: [C], dtype of x.
        eps: added to the variance.

    Returns:
        ``x + residual``, rounded to the dtype as the stream carries it on, and LayerNorm over C of
        that sum; new contiguous tensors [N, C]. Arithmetic is fp32 (fp64 for fp64).

    Raises:
        RuntimeError: shapes, dtypes or devices outside of the above.
    """
    return _add_layer_norm(x, residual, weight, bias, eps)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float = 1e-6
) -> torch.Tensor:
    """LayerNorm over the last dimension: :func:`add_layer_norm` without a residual.

    Args:
        x: [N, C], fp64, fp32, fp16 or bf16; rows of any stride.
        weight, bias: [C], dtype of x.
        eps: added to the variance.

    Returns:
        A new contiguous tensor [N, C].

    Raises:
        RuntimeError: shapes, dtypes or devices outside of the above.
    """
    return _add_layer_norm(x, None, weight, bias, eps)[1]


def _add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> Pair:
    if torch.compiler.is_compiling():
        x = dispatch.fit_for_kernel(x)
        residual = None if residual is None else dispatch.fit_for_kernel(residual)
    args = (x, residual, weight, bias, eps)
    if dispatch.use_native("add_layer_norm", x, _unsupported(*args[:4])):
        return dispatch.call(torch.ops.keye_ops.add_layer_norm.default, args)
    return add_layer_norm_reference(*args)


def _unsupported(x: torch.Tensor, *others: torch.Tensor | None) -> str | None:
    """Why the native kernel does not take the tensors, or None."""
    return dispatch.unsupported_rows(x, x.shape[-1] if x.dim() else 0, *others)
