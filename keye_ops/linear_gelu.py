"""linear_gelu: a linear layer and GELU, exact or by tanh."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from keye_ops import dispatch
from keye_ops.checks import check, check_floating, check_same, check_shape
from keye_ops.extension import define

# ---- reference ----


def linear_gelu_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, approximate: str = "none"
) -> torch.Tensor:
    """The definition, in plain PyTorch; arguments as in :func:`linear_gelu`."""
    _check_linear_gelu(x, weight, bias, approximate)
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def linear_gelu_forward_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, approximate: str = "none"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and what its gradient needs: x @ weight.T + bias."""
    _check_linear_gelu(x, weight, bias, approximate)
    hidden = F.linear(x, weight, bias)
    return F.gelu(hidden, approximate=approximate), hidden


def linear_gelu_backward_reference(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    hidden: torch.Tensor,
    approximate: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`linear_gelu_reference` with respect to x, weight and bias."""
    _check_product(x, weight, approximate)
    for name, tensor in (("hidden", hidden), ("dout", dout)):
        check_shape("linear_gelu", name, tensor, (x.shape[0], weight.shape[0]))
        check_same("linear_gelu", name, tensor, "x", x)
    dhidden = torch.ops.aten.gelu_backward(dout, hidden, approximate=approximate)
    dx, dweight = dhidden @ weight, dhidden.T @ x
    return dx.contiguous(), dweight.contiguous(), dhidden.sum(0)


def _check_linear_gelu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, approximate: str
) -> None:
    _check_product(x, weight, approximate)
    check_shape("linear_gelu", "bias", bias, (weight.shape[0],))
    check_same("linear_gelu", "bias", bias, "x", x)


def _check_product(x: torch.Tensor, weight: torch.Tensor, approximate: str) -> None:
    op = "linear_gelu"
    check_floating(op, "x", x)
    check_shape(op, "x", x, ("M", "K"))
    check_shape(op, "weight", weight, ("N", x.shape[1]))
    check_same(op, "weight", weight, "x", x)
    good = approximate in ("none", "tanh")
    check(good, op, 'approximate must be "none" or "tanh"', approximate)


# ---- schema, fake, autograd ----

define(
    "linear_gelu",
    '(Tensor x, Tensor weight, Tensor bias, str approximate="none") -> Tensor',
    linear_gelu_reference,
)
define(
    "linear_gelu_forward",
    '(Tensor x, Tensor weight, Tensor bias, str approximate="none") -> (Tensor, Tensor)',
    linear_gelu_forward_reference,
)
define(
    "linear_gelu_backward",
    "(Tensor dout, Tensor x, Tensor weight, Tensor hidden, str approximate) "
    "-> (Tensor, Tensor, Tensor)",
    linear_gelu_backward_reference,
)


@torch.library.register_fake("keye_ops::linear_gelu")
def _(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, approximate: str = "none"
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("keye_ops::linear_gelu_forward")
def _(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, approximate: str = "none"
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape)


@torch.library.register_fake("keye_ops::linear_gelu_backward")
def _(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    hidden: torch.Tensor,
    approximate: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.approximate = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
    x, weight, bias = ctx.saved_tensors
    return _gradients(dout, x, weight, F.linear(x, weight, bias), ctx.approximate)


def _setup_forward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, weight, _, ctx.approximate = inputs
    hidden = output[1]
    ctx.mark_non_differentiable(hidden)
    ctx.save_for_backward(x, weight, hidden)


def _backward_of_forward(ctx: Any, dout: torch.Tensor, _: Any) -> tuple[Any, ...]:
    return _gradients(dout, *ctx.saved_tensors, ctx.approximate)


def _gradients(dout: torch.Tensor, *args: Any) -> tuple[Any, ...]:
    return *torch.ops.keye_ops.linear_gelu_backward(dout.contiguous(), *args), None


torch.library.register_autograd("keye_ops::linear_gelu", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "keye_ops::linear_gelu_forward", _backward_of_forward, setup_context=_setup_forward_context
)


# ---- public ----


def _as_autocast(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def linear_gelu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, approximate: str = "none"
) -> torch.Tensor:
    """GELU(x @ weight.T + bias).

    Keye-VL's projector has the exact, erf-based GELU; its vision tower the approximation by tanh.
    Under autocast the inputs are cast as those of a linear layer are. On a GPU bf16 is one GEMM
    unless gradients are needed; ``KEYE_OPS_GEMM=torch`` in the environment forbids it.

    Args:
        x: [M, K], fp64, fp32, fp16 or bf16.
        weight: [N, K]; bias: [N]; dtype of x.
        approximate: ``"none"`` or ``"tanh"``, as :func:`torch.nn.functional.gelu` takes it.

    Returns:
        [M, N].

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, or another approximation.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        x, weight, bias = (_as_autocast(t) for t in (x, weight, bias))
    args = (x, weight, bias, approximate)
    if not dispatch.use_native("linear_gelu", x, _unsupported(x)):
        return linear_gelu_reference(*args)
    if torch.is_grad_enabled() and any(t.requires_grad for t in args[:3]):
        # Keeps the hidden values for the gradient, which would need a matrix product more.
        return torch.ops.keye_ops.linear_gelu_forward(*args)[0]
    return dispatch.call(torch.ops.keye_ops.linear_gelu.default, args)


def _unsupported(x: torch.Tensor) -> str | None:
    """Why the native kernel does not take the arguments, or None if it does."""
    fp64_on_cuda = x.dtype == torch.float64 and dispatch.kernel_device(x) == "cuda"
    return "it takes fp32, fp16 and bf16 on CUDA" if fp64_on_cuda else None
