"""linear_gelu: a linear layer and the exact (erf) GELU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from keye_ops import dispatch
from keye_ops.checks import check_floating, check_same, check_shape
from keye_ops.extension import define

# ---- reference ----


def linear_gelu_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """The definition, in plain PyTorch; arguments as in :func:`linear_gelu`."""
    op = "linear_gelu"
    check_floating(op, "x", x)
    check_shape(op, "x", x, ("M", "K"))
    check_shape(op, "weight", weight, ("N", x.shape[1]))
    check_same(op, "weight", weight, "x", x)
    check_shape(op, "bias", bias, (weight.shape[0],))
    check_same(op, "bias", bias, "x", x)
    return F.gelu(F.linear(x, weight, bias))


# ---- schema, fake, autograd ----

define("linear_gelu", "(Tensor x, Tensor weight, Tensor bias) -> Tensor", linear_gelu_reference)


@torch.library.register_fake("keye_ops::linear_gelu")
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, weight, bias = ctx.saved_tensors
    dhidden = torch.ops.aten.gelu_backward(dout, F.linear(x, weight, bias))
    return dhidden @ weight, dhidden.T @ x, dhidden.sum(0)


torch.library.register_autograd("keye_ops::linear_gelu", _backward, setup_context=_setup_context)


# ---- public ----


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU(x @ weight.T + bias) with the exact, erf-based GELU of Keye-VL's projector.

    Args:
        x: [M, K], fp64, fp32, fp16 or bf16.
        weight: [N, K]; bias: [N]; dtype of x.

    Returns:
        [M, N].

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
    """
    if dispatch.use_native("linear_gelu", x):
        return dispatch.call(torch.ops.keye_ops.linear_gelu.default, (x, weight, bias))
    return linear_gelu_reference(x, weight, bias)
