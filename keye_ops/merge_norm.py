"""merge_norm: LayerNorm and the 2x2 merge of patches, in either order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from keye_ops import dispatch
from keye_ops.checks import check, check_floating, check_same, check_shape
from keye_ops.extension import define
from keye_ops.grid import PackedGrid, as_packed_grid, check_grid, merge_index

# ---- reference ----


def merge_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    grid: torch.Tensor,
    image_offsets: torch.Tensor,
    spatial_merge_size: int = 2,
    block_order: bool = False,
    eps: float = 1e-5,
) -> torch.Tensor:
    """The definition, in plain PyTorch; arguments as in :func:`merge_norm`."""
    _check_merge_norm(x, weight, bias, spatial_merge_size)
    check_grid("merge_norm", grid, image_offsets, x.shape[0], spatial_merge_size)
    index = _index(x, grid, image_offsets, spatial_merge_size, block_order)
    if weight.shape[0] == x.shape[1]:
        x = F.layer_norm(x, weight.shape, weight, bias, eps)
        return x[index].flatten(1)
    return F.layer_norm(x[index].flatten(1), weight.shape, weight, bias, eps)


def merge_norm_backward_reference(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    grid: torch.Tensor,
    image_offsets: torch.Tensor,
    spatial_merge_size: int,
    block_order: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`merge_norm_reference` with respect to x, weight and bias."""
    _check_merge_norm(x, weight, weight, spatial_merge_size)
    check_grid("merge_norm", grid, image_offsets, x.shape[0], spatial_merge_size)
    square = spatial_merge_size**2
    shape = (x.shape[0] // square, square * x.shape[1])
    check_shape("merge_norm", "dout", dout, shape)
    check_same("merge_norm", "dout", dout, "x", x)
    index = _index(x, grid, image_offsets, spatial_merge_size, block_order)
    before = weight.shape[0] == x.shape[1]
    # Every patch is in exactly one merged token: scattering back is a plain assignment.
    patches = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = patches.index_put((index,), dout.unflatten(1, (square, x.shape[1]))) if before else dout
    inputs = x if before else x[index].flatten(1)
    shape = list(weight.shape)
    _, mean, rstd = torch.native_layer_norm(inputs, shape, weight, weight, eps)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        rows, inputs, shape, mean, rstd, weight, weight, [True, True, True]
    )
    if not before:
        dx = patches.index_put((index,), dx.unflatten(1, (square, x.shape[1])))
    return dx.contiguous(), dweight, dbias


def _index(
    x: torch.Tensor, grid: torch.Tensor, offsets: torch.Tensor, merge: int, block_order: bool
) -> torch.Tensor:
    return merge_index(grid, offsets, x.shape[0], merge, "block" if block_order else "raster")


def _check_merge_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, merge: int
) -> None:
    op = "merge_norm"
    check_floating(op, "x", x)
    check_shape(op, "x", x, ("N", "C"))
    total, hidden = x.shape
    good = 1 <= merge <= 2**15
    check(good, op, "spatial_merge_size must be from 1 to 32768", merge)
    good = total % merge**2 == 0
    check(good, op, f"x must have a multiple of {merge**2} rows", total)
    good = weight.dim() == 1 and weight.shape[0] in (hidden, merge**2 * hidden)
    requirement = f"weight must be [{hidden}] (norm, then merge) or [{merge**2 * hidden}] (after)"
    check(good, op, requirement, list(weight.shape))
    check_same(op, "weight", weight, "x", x)
    check_shape(op, "bias", bias, tuple(weight.shape))
    check_same(op, "bias", bias, "x", x)


# ---- schema, fake, autograd ----

define(
    "merge_norm",
    "(Tensor x, Tensor weight, Tensor bias, Tensor grid, Tensor image_offsets, "
    "int spatial_merge_size=2, bool block_order=False, float eps=1e-05) -> Tensor",
    merge_norm_reference,
)
define(
    "merge_norm_backward",
    "(Tensor dout, Tensor x, Tensor weight, Tensor grid, Tensor image_offsets, "
    "int spatial_merge_size, bool block_order, float eps) -> (Tensor, Tensor, Tensor)",
    merge_norm_backward_reference,
)


@torch.library.register_fake("keye_ops::merge_norm")
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    grid: torch.Tensor,
    image_offsets: torch.Tensor,
    spatial_merge_size: int = 2,
    block_order: bool = False,
    eps: float = 1e-5,
) -> torch.Tensor:
    square = spatial_merge_size**2
    return x.new_empty(x.shape[0] // square, x.shape[1] * square)


@torch.library.register_fake("keye_ops::merge_norm_backward")
def _(
    dout: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = weight.shape
    return x.new_empty(x.shape), weight.new_empty(shape), weight.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, _, *grid, merge, block_order, eps = inputs
    ctx.save_for_backward(x, weight, *grid)
    ctx.options = (merge, block_order, eps)


def _backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
    op = torch.ops.keye_ops.merge_norm_backward
    grads = op(dispatch.fit_gradient(dout), *ctx.saved_tensors, *ctx.options)
    return *grads, *[None] * 5


torch.library.register_autograd("keye_ops::merge_norm", _backward, setup_context=_setup_context)


# ---- public ----


def merge_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    grid: PackedGrid | Sequence[Sequence[int]],
    *,
    eps: float = 1e-5,
) -> torch.Tensor:
    """LayerNorm with the merge of 2x2 neighbouring patches into one token.

    The weight's length tells the order: [C] normalises every patch before the merge (Keye-VL
    Preview, PaddleOCR-VL), [4 C] the merged vector after it (Keye-VL-1.5 and later). A merged token
    holds its patches in the order (row offset, column offset).

    Args:
        x: [N, C], fp64, fp32, fp16 or bf16; rows of any stride.
        weight, bias: [C] or [spatial_merge_size ** 2 * C], dtype of x.
        grid: the batch; :class:`PackedGrid`, or ``(t, h, w)`` host integers an image.
        eps: added to the variance.

    Returns:
        [N / 4, 4 C] (for merge size 2), tokens in raster order, frames one after another.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, an odd grid, or N other than the
            grid's.
    """
    packed = as_packed_grid(grid, x.device)
    if not torch.compiler.is_compiling():  # a graph serves every grid, so it must not see sizes
        packed.require_mergeable("merge_norm")
        requirement = f"x must have the grid's {packed.total} rows"
        check(x.shape[:1] == (packed.total,), "merge_norm", requirement, list(x.shape))
    options = (packed.spatial_merge_size, packed.order == "block", eps)
    if torch.compiler.is_compiling():
        x = dispatch.fit_for_kernel(x)
    args = (x, weight, bias, packed.grid, packed.image_offsets, *options)
    if dispatch.use_native("merge_norm", x, _unsupported(x, weight, bias)):
        return dispatch.call(torch.ops.keye_ops.merge_norm.default, args)
    return merge_norm_reference(*args)


def _unsupported(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> str | None:
    """Why the native kernel does not take the tensors, or None."""
    width = weight.shape[0] if weight.dim() else 0
    return dispatch.unsupported_rows(x, width, weight, bias)
