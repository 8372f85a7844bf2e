"""patch_embed: patches of any number of images to tokens, learned 2D positions included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from keye_ops import dispatch
from keye_ops.checks import check, check_floating, check_integer, check_same, check_shape
from keye_ops.extension import define
from keye_ops.grid import PackedGrid, as_packed_grid, check_grid

_MEAN_STD = (0.5, 0.5, 0.5)

# ---- reference ----


def patch_embed_reference(
    pixel_values: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    position_embedding: torch.Tensor,
    grid: torch.Tensor,
    image_offsets: torch.Tensor,
    position_ids: torch.Tensor,
    align_corners: bool = False,
    image_mean: Sequence[float] = _MEAN_STD,
    image_std: Sequence[float] = _MEAN_STD,
) -> torch.Tensor:
    """The definition, in plain PyTorch; arguments as in :func:`patch_embed`."""
    _check_patch_embed(pixel_values, weight, bias, position_embedding, position_ids)
    check_grid("patch_embed", grid, image_offsets, pixel_values.shape[0])
    _check_normalisation(pixel_values, weight, image_mean, image_std)
    _check_positions(grid, image_offsets, position_ids)
    rows = _pixel_rows(pixel_values, weight, image_mean, image_std)
    tokens = F.linear(rows, weight.flatten(1), bias)
    taps, lambdas = _taps(grid, image_offsets, position_ids, position_embedding, align_corners)
    corners = position_embedding.to(lambdas.dtype)[taps]  # [4, N, C]
    positions = (corners * lambdas[:, :, None]).sum(0)
    return (tokens + positions).to(weight.dtype)


def patch_embed_backward_reference(
    dout: torch.Tensor,
    pixel_values: torch.Tensor,
    weight: torch.Tensor,
    position_embedding: torch.Tensor,
    grid: torch.Tensor,
    image_offsets: torch.Tensor,
    position_ids: torch.Tensor,
    needs_dpixels: bool,
    has_bias: bool,
    align_corners: bool,
    image_mean: Sequence[float],
    image_std: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients with respect to pixels, weight, bias and table; empty ones for what is absent."""
    _check_patch_embed(pixel_values, weight, None, position_embedding, position_ids)
    check_grid("patch_embed", grid, image_offsets, pixel_values.shape[0])
    _check_normalisation(pixel_values, weight, image_mean, image_std)
    _check_positions(grid, image_offsets, position_ids)
    check_shape("patch_embed", "dout", dout, (pixel_values.shape[0], weight.shape[0]))
    check_same("patch_embed", "dout", dout, "weight", weight)
    dpixels = pixel_values.new_empty(0)
    if needs_dpixels:
        flat = dout @ weight.flatten(1)
        dpixels = flat.reshape(pixel_values.shape).to(pixel_values.dtype)
    rows = _pixel_rows(pixel_values, weight, image_mean, image_std)
    dweight = (dout.T @ rows).reshape(weight.shape)
    dbias = dout.sum(0) if has_bias else weight.new_empty(0)
    # The interpolation as a matrix [N, S*S], so that its transpose needs no atomics.
    taps, lambdas = _taps(grid, image_offsets, position_ids, position_embedding, align_corners)
    mixing = lambdas.new_zeros(dout.shape[0], position_embedding.shape[0])
    for tap, share in zip(taps, lambdas, strict=True):
        mixing = mixing.scatter_add(1, tap[:, None], share[:, None])
    dtable = (mixing.T @ dout.to(lambdas.dtype)).to(weight.dtype)
    return dpixels, dweight, dbias, dtable


def _pixel_rows(
    pixel_values: torch.Tensor, weight: torch.Tensor, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Pixels as rows [N, K] in the weight's dtype; uint8 is scaled to [0, 1] and normalised."""
    rows = pixel_values.flatten(1)
    if pixel_values.dtype != torch.uint8:
        return rows.to(weight.dtype)
    channels = rows.unflatten(1, (len(mean), -1)).float() / 255
    mean_, std_ = (channels.new_tensor(list(x))[:, None] for x in (mean, std))
    return ((channels - mean_) / std_).flatten(1).to(weight.dtype)


def _taps(
    grid: torch.Tensor,
    image_offsets: torch.Tensor,
    position_ids: torch.Tensor,
    position_embedding: torch.Tensor,
    align_corners: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The 4 table rows [4, N] of every patch and their bilinear weights [4, N]."""
    side = round(position_embedding.shape[0] ** 0.5)
    compute = torch.float64 if position_embedding.dtype == torch.float64 else torch.float32
    patch = torch.arange(position_ids.shape[0], device=grid.device)
    image = torch.searchsorted(image_offsets[1:].long(), patch, right=True)
    size = grid[image.clamp(max=grid.shape[0] - 1), 1:].long()  # [N, 2]
    index = position_ids.long()
    # Coordinates are fractions of integers: fp32 ones would cost most of the result's accuracy.
    if align_corners:
        numerator, denominator = index * (side - 1), (size - 1).clamp(min=1)
    else:
        numerator, denominator = (2 * index + 1) * side - size, 2 * size
    numerator = numerator.clamp(min=0)
    low = (numerator // denominator).clamp(max=side - 1)
    high = (low + 1).clamp(max=side - 1)
    fraction = (numerator % denominator).to(compute) / denominator
    (row0, column0), (row1, column1) = low.unbind(1), high.unbind(1)
    r, c = fraction.unbind(1)
    taps = [row0 * side + column0, row0 * side + column1, row1 * side + column0]
    weights = [(1 - r) * (1 - c), (1 - r) * c, r * (1 - c), r * c]
    return torch.stack([*taps, row1 * side + column1]), torch.stack(weights)


def _check_patch_embed(
    pixel_values: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    position_embedding: torch.Tensor,
    position_ids: torch.Tensor,
) -> None:
    op = "patch_embed"
    check_floating(op, "weight", weight)
    good = weight.dim() in (2, 4)
    check(good, op, "weight must be [C, 3, 14, 14] or [C, K]", list(weight.shape))
    hidden, inner = weight.shape[0], weight.shape[1:].numel()
    if pixel_values.dtype != torch.uint8:
        check_floating(op, "pixel_values (unless uint8)", pixel_values)
    good = pixel_values.device == weight.device
    check(good, op, f"pixel_values must be on {weight.device}", pixel_values.device)
    shape = list(pixel_values.shape)
    good = pixel_values.dim() >= 2 and pixel_values.shape[1:].numel() == inner
    check(good, op, f"pixel_values must be [N, ...] with {inner} values a patch", shape)
    check_shape(op, "position_ids", position_ids, ("N", 2))
    total = position_ids.shape[0]
    requirement = f"pixel_values must hold the {total} patches of the grid"
    check(pixel_values.shape[0] == total, op, requirement, shape[0])
    if bias is not None:
        check_shape(op, "bias", bias, (hidden,))
        check_same(op, "bias", bias, "weight", weight)
    check_shape(op, "position_embedding", position_embedding, ("S*S", hidden))
    check_same(op, "position_embedding", position_embedding, "weight", weight)
    count = position_embedding.shape[0]
    good = count > 0 and round(count**0.5) ** 2 == count
    check(good, op, "position_embedding must have a square number of rows", count)
    check_integer(op, "position_ids", position_ids, weight.device)


def _check_normalisation(
    pixel_values: torch.Tensor,
    weight: torch.Tensor,
    image_mean: Sequence[float],
    image_std: Sequence[float],
) -> None:
    if pixel_values.dtype != torch.uint8:
        return
    sizes = (len(image_mean), len(image_std))
    channels = weight.shape[1] if weight.dim() == 4 else 3
    requirement = f"image_mean and image_std must have {channels} values for uint8 pixels"
    check(sizes == (channels, channels), "patch_embed", requirement, sizes)
    good = channels > 0 and weight.shape[1:].numel() % channels == 0
    requirement = "weight must have channels of equal size for uint8 pixels"
    check(good, "patch_embed", requirement, list(weight.shape))
    good = all(x != 0 for x in image_std)
    check(good, "patch_embed", "image_std must not hold 0", list(image_std))


def _check_positions(
    grid: torch.Tensor, image_offsets: torch.Tensor, position_ids: torch.Tensor
) -> None:
    """Require positions inside the grid; values are looked at on the host only."""
    plain = type(grid) is torch.Tensor and type(position_ids) is torch.Tensor
    if torch.compiler.is_compiling() or not plain or grid.device.type != "cpu":
        return
    size = grid[:, 1:].repeat_interleave(image_offsets.diff(), 0)  # [N, 2]
    outside = ((position_ids < 0) | (position_ids >= size)).any(1)
    requirement = "position_ids must lie inside their image's grid"
    got = position_ids[outside][:1].flatten().tolist()
    check(not got, "patch_embed", requirement, got)


# ---- schema, fake, autograd ----

define(
    "patch_embed",
    "(Tensor pixel_values, Tensor weight, Tensor? bias, Tensor position_embedding, Tensor grid, "
    "Tensor image_offsets, Tensor position_ids, bool align_corners=False, "
    "float[] image_mean=[0.5, 0.5, 0.5], float[] image_std=[0.5, 0.5, 0.5]) -> Tensor",
    patch_embed_reference,
)

define(
    "patch_embed_backward",
    "(Tensor dout, Tensor pixel_values, Tensor weight, Tensor position_embedding, Tensor grid, "
    "Tensor image_offsets, Tensor position_ids, bool needs_dpixels, bool has_bias, "
    "bool align_corners, float[] image_mean, float[] image_std) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    patch_embed_backward_reference,
)


@torch.library.register_fake("keye_ops::patch_embed")
def _(pixel_values: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
    return weight.new_empty(pixel_values.shape[0], weight.shape[0])


@torch.library.register_fake("keye_ops::patch_embed_backward")
def _(
    dout: torch.Tensor,
    pixel_values: torch.Tensor,
    weight: torch.Tensor,
    position_embedding: torch.Tensor,
    grid: torch.Tensor,
    image_offsets: torch.Tensor,
    position_ids: torch.Tensor,
    needs_dpixels: bool,
    has_bias: bool,
    *args: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dpixels = pixel_values.new_empty(pixel_values.shape if needs_dpixels else [0])
    dbias = weight.new_empty(weight.shape[0] if has_bias else 0)
    dtable = weight.new_empty(position_embedding.shape)
    return dpixels, weight.new_empty(weight.shape), dbias, dtable


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    pixel_values, weight, bias, table, grid, offsets, position_ids, align, mean, std = inputs
    ctx.save_for_backward(pixel_values, weight, table, grid, offsets, position_ids)
    ctx.options = (bias is not None, align, mean, std)


def _backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
    has_bias, *options = ctx.options
    needs_dpixels = ctx.needs_input_grad[0]
    op = torch.ops.keye_ops.patch_embed_backward
    grads = op(dout.contiguous(), *ctx.saved_tensors, needs_dpixels, has_bias, *options)
    dpixels, dweight, dbias, dtable = grads
    absent = [None] * 6
    return dpixels if needs_dpixels else None, dweight, dbias if has_bias else None, dtable, *absent


torch.library.register_autograd("keye_ops::patch_embed", _backward, setup_context=_setup_context)


# ---- public ----


def patch_embed(
    pixel_values: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    position_embedding: torch.Tensor,
    grid: PackedGrid | Sequence[Sequence[int]],
    *,
    align_corners: bool = False,
    image_mean: Sequence[float] = _MEAN_STD,
    image_std: Sequence[float] = _MEAN_STD,
) -> torch.Tensor:
    """Embed the patches of a whole batch: linear + bias + interpolated position table.

    The table of S x S positions is resampled bilinearly to every image's own patch grid with
    half-pixel centres and no antialiasing, as ``interpolate(mode="bilinear")`` does; frames of a
    clip share positions. (Keye-VL and PaddleOCR-VL vision embeddings.)

    Args:
        pixel_values: [N, 3, 14, 14] or [N, 588], floating, or uint8 (then scaled by 1 / 255 and
            normalised by ``image_mean`` and ``image_std``).
        weight: [C, 3, 14, 14] or [C, 588]; its dtype is the result's.
        bias: [C] or None.
        position_embedding: [S * S, C].
        grid: the batch; :class:`PackedGrid`, or ``(t, h, w)`` host integers an image.
        align_corners: corner-aligned resampling (Qwen3-VL).
        image_mean, image_std: a float a channel, for uint8 pixels only.

    Returns:
        [N, C] in the weight's dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, or N other than the grid's.
    """
    packed = as_packed_grid(grid, weight.device)
    args = (pixel_values, weight, bias, position_embedding, packed.grid, packed.image_offsets)
    options = (packed.position_ids, align_corners, list(image_mean), list(image_std))
    unsupported = _unsupported(pixel_values, weight, bias, position_embedding)
    if dispatch.use_native("patch_embed", pixel_values, unsupported):
        return dispatch.call(torch.ops.keye_ops.patch_embed.default, args + options)
    return patch_embed_reference(*args, *options)


def _unsupported(pixel_values: torch.Tensor, *parameters: torch.Tensor | None) -> str | None:
    """Why the native kernel does not take the arguments, or None if it does."""
    tensors = [x for x in parameters if x is not None]
    if not all(x.is_contiguous() for x in tensors):
        return "it needs a contiguous weight, bias and position_embedding"
    weight = tensors[0]
    if dispatch.kernel_device(weight) != "cuda" or weight.dim() not in (2, 4):
        return None
    if weight.dtype == torch.float64:
        return "it has no fp64 on cuda"
    multiple = 16 // weight.element_size()
    if weight.shape[0] % multiple:
        return f"it needs a hidden size that is a multiple of {multiple} in {weight.dtype} on cuda"
    if pixel_values.dtype == torch.uint8 and weight.dim() == 4 and weight.shape[1] > 4:
        return f"it takes uint8 pixels of up to 4 channels on cuda, not {weight.shape[1]}"
    plain = not torch.compiler.is_compiling()
    if plain and any(x.data_ptr() % 16 for x in tensors):
        return "it needs parameters at multiples of 16 bytes on cuda"
    return None
