"""rope: rotary position embedding of q and k by 2D (vision) or 3D (text) positions.

A table per frequency says which position axis turns it, so that axial 2D, chunked and interleaved
3D sections are one op. RMSNorm of q and k before the rotation can be fused in.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from keye_ops import dispatch
from keye_ops.checks import check, check_floating, check_integer, check_same, check_shape
from keye_ops.extension import define

Pair = tuple[torch.Tensor, torch.Tensor]


class RopeTable(NamedTuple):
    """What turns each of the head_dim / 2 pairs of a head."""

    inv_freq: torch.Tensor  # fp32 [head_dim / 2], radians a position
    axis: torch.Tensor  # int32 [head_dim / 2], row of position_ids


# ---- reference ----


def rope_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    axis: torch.Tensor,
    interleaved: bool = False,
    inverse: bool = False,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Pair:
    """The definition, in plain PyTorch; arguments as in :func:`rope`."""
    _check_rope(q, k, position_ids, inv_freq, axis, q_norm_weight, k_norm_weight)
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    angle = position_ids[axis.long()].T.to(compute) * inv_freq.to(compute)  # [N, D/2]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    sin = -sin if inverse else sin

    def rotate(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        y = x.to(compute)
        if weight is not None:
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm_eps) * weight.to(compute)
        a, b = y.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else y.chunk(2, dim=-1)
        pair = (a * cos - b * sin, b * cos + a * sin)
        out = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
        return out.to(x.dtype)

    return rotate(q, q_norm_weight), rotate(k, k_norm_weight)


def rope_inplace_reference(q: torch.Tensor, k: torch.Tensor, *args: Any) -> None:
    """:func:`rope_reference`, written into q and k."""
    _check_inplace(q, k)
    out_q, out_k = rope_reference(q, k, *args)
    q.copy_(out_q)
    k.copy_(out_k)


def rope_backward_reference(
    dq: torch.Tensor,
    dk: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    axis: torch.Tensor,
    q_norm_weight: torch.Tensor,
    k_norm_weight: torch.Tensor,
    interleaved: bool,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the normed rotation with respect to q, k and both weights."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, q_norm_weight, k_norm_weight)]
        outputs = rope_reference(
            *inputs[:2], position_ids, inv_freq, axis, interleaved, False, *inputs[2:], norm_eps
        )
    grads = torch.autograd.grad(outputs, inputs, (dq, dk))
    return grads[0].contiguous(), grads[1].contiguous(), grads[2], grads[3]


def _check_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    axis: torch.Tensor,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
) -> None:
    check_floating("rope", "q", q)
    check_shape("rope", "q", q, ("N", "H", "D"))
    total, _, head_dim = q.shape
    good = head_dim % 2 == 0 and 2 <= head_dim <= 256
    check(good, "rope", "head_dim must be even, from 2 to 256", head_dim)
    check_shape("rope", "k", k, (total, "Hk", head_dim))
    check_same("rope", "k", k, "q", q)
    check_shape("rope", "position_ids", position_ids, ("axes", total))
    check_integer("rope", "position_ids", position_ids, q.device)
    axes = position_ids.shape[0]
    check(1 <= axes <= 4, "rope", "position_ids must have 1 to 4 axes", axes)
    check_shape("rope", "inv_freq", inv_freq, (head_dim // 2,))
    check_shape("rope", "axis", axis, (head_dim // 2,))
    good = inv_freq.dtype == torch.float32 and inv_freq.device == q.device
    check(good, "rope", f"inv_freq must be fp32 on {q.device}", (inv_freq.dtype, inv_freq.device))
    good = axis.dtype == torch.int32 and axis.device == q.device
    check(good, "rope", f"axis must be int32 on {q.device}", (axis.dtype, axis.device))
    both = (q_norm_weight is None) == (k_norm_weight is None)
    check(both, "rope", "q_norm_weight and k_norm_weight must be given together", "one of them")
    for name, weight in (("q_norm_weight", q_norm_weight), ("k_norm_weight", k_norm_weight)):
        if weight is not None:
            check_shape("rope", name, weight, (head_dim,))
            check_same("rope", name, weight, "q", q)
    # A graph cannot branch on values.
    plain = type(q) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    if plain and q.device.type == "cpu":
        _check_values(position_ids, inv_freq, axis)


def _check_values(position_ids: torch.Tensor, inv_freq: torch.Tensor, axis: torch.Tensor) -> None:
    outside = inv_freq[~((inv_freq >= 0) & (inv_freq <= 1))]
    good = outside.numel() == 0
    check(good, "rope", "inv_freq must be in [0, 1]", outside[:1].tolist())
    axes = position_ids.shape[0]
    good = axis.numel() == 0 or (axis.min() >= 0 and axis.max() < axes)
    check(bool(good), "rope", f"axis must be in [0, {axes})", axis.unique().tolist())
    if position_ids.numel():
        low, high = int(position_ids.min()), int(position_ids.max())
        good = low >= 0 and high < 2**24
        check(good, "rope", "position_ids must be in [0, 2**24)", low if low < 0 else high)


def _check_inplace(q: torch.Tensor, k: torch.Tensor) -> None:
    if torch.compiler.is_compiling():  # tensors of a graph have no address
        return
    for name, x in (("q", q), ("k", k)):
        extent = x.shape[-1]
        for dim in sorted(range(x.dim() - 1), key=x.stride):
            if x.shape[dim] > 1:
                requirement = f"{name} must not overlap itself to be rotated in place"
                received = f"stride {x.stride(dim)} in dimension {dim}"
                check(x.stride(dim) >= extent, "rope", requirement, received)
                extent += (x.shape[dim] - 1) * x.stride(dim)
    if q.numel() == 0 or k.numel() == 0:
        return
    (q_heads, q_all), (k_heads, k_all) = _extents(q), _extents(k)
    size, distance = q.element_size(), k.data_ptr() - q.data_ptr()
    apart = distance >= q_all * size or -distance >= k_all * size
    step = q.stride(0) * size
    if not apart and step > 0 and q.stride(0) == k.stride(0):
        # Views of one packed tensor: the heads of k lie between those of q of two tokens.
        between = distance % step
        apart = between >= q_heads * size and between + k_heads * size <= step
    requirement = "q and k must not share memory to be rotated in place"
    check(apart, "rope", requirement, f"addresses {distance} bytes apart")


def _extents(x: torch.Tensor) -> tuple[int, int]:
    """Elements from the first to behind the last: of one token's heads, and of everything."""
    heads = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    return heads, (x.shape[0] - 1) * x.stride(0) + heads


# ---- schemas, fakes, autograd ----

_TABLE = "Tensor position_ids, Tensor inv_freq, Tensor axis"
_OPTIONS = (
    "bool interleaved=False, bool inverse=False, Tensor? q_norm_weight=None, "
    "Tensor? k_norm_weight=None, float norm_eps=1e-06"
)
define("rope", f"(Tensor q, Tensor k, {_TABLE}, {_OPTIONS}) -> (Tensor, Tensor)", rope_reference)
define("rope_", f"(Tensor(a!) q, Tensor(b!) k, {_TABLE}, {_OPTIONS}) -> ()", rope_inplace_reference)
define(
    "rope_backward",
    f"(Tensor dq, Tensor dk, Tensor q, Tensor k, {_TABLE}, Tensor q_norm_weight, "
    "Tensor k_norm_weight, bool interleaved, float norm_eps) -> (Tensor, Tensor, Tensor, Tensor)",
    rope_backward_reference,
)


@torch.library.register_fake("keye_ops::rope")
def _(q: torch.Tensor, k: torch.Tensor, *args: Any) -> Pair:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.register_fake("keye_ops::rope_")
def _(q: torch.Tensor, k: torch.Tensor, *args: Any) -> None:
    return None


@torch.library.register_fake("keye_ops::rope_backward")
def _(
    dq: torch.Tensor, dk: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    weight = args[3]
    return q.new_empty(q.shape), k.new_empty(k.shape), weight.clone(), weight.clone()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    q, k, position_ids, inv_freq, axis, interleaved, inverse, q_weight, k_weight, eps = inputs
    ctx.options = (interleaved, inverse, eps)
    normed = q_weight is not None
    if normed and inverse:
        raise RuntimeError("rope: inverse with norm weights has no gradient, got both")
    saved = (q, k, q_weight, k_weight) if normed else ()
    ctx.save_for_backward(position_ids, inv_freq, axis, *saved)


def _fit_for_kernel(x: torch.Tensor) -> torch.Tensor:
    """A tensor as the kernels take it, where autograd or a graph leaves no other choice."""
    fits = x.dim() == 0 or x.stride(-1) == 1
    return dispatch.fit_rows(x) if fits else x.clone(memory_format=torch.contiguous_format)


def _backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[Any, ...]:
    position_ids, inv_freq, axis, *saved = ctx.saved_tensors
    interleaved, inverse, eps = ctx.options
    dq, dk = (_fit_for_kernel(x) for x in (dq, dk))
    table = (position_ids, inv_freq, axis)
    if not saved:
        # A rotation's transpose is the rotation by the negated angle.
        dq, dk = torch.ops.keye_ops.rope(dq, dk, *table, interleaved, not inverse)
        return dq, dk, *[None] * 8
    q, k, q_weight, k_weight = saved
    grads = torch.ops.keye_ops.rope_backward(
        dq, dk, q, k, *table, q_weight, k_weight, interleaved, eps
    )
    return *grads[:2], *[None] * 5, *grads[2:], None


torch.library.register_autograd("keye_ops::rope", _backward, setup_context=_setup_context)


# ---- public ----


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    axis: torch.Tensor,
    *,
    interleaved: bool = False,
    inverse: bool = False,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Pair:
    """Rotate the pairs of every head by ``position_ids[axis[j], n] * inv_freq[j]``.

    Args:
        q: [N, num_heads, head_dim], fp64, fp32, fp16 or bf16; any strides with unit last stride.
        k: [N, num_kv_heads, head_dim], dtype and device of q.
        position_ids: int32 or int64 [axes, N], values in [0, 2**24), up to 4 axes.
        inv_freq: fp32 [head_dim / 2], radians a position, values in [0, 1].
        axis: int32 [head_dim / 2], the row of position_ids that turns each pair.
        interleaved: pairs are (2j, 2j + 1) instead of (j, j + head_dim / 2).
        inverse: rotate by the negated angle.
        q_norm_weight, k_norm_weight: [head_dim] each, dtype of q; RMSNorm over head_dim comes
            before the rotation when they are given.
        norm_eps: added to the mean square.

    Returns:
        New contiguous tensors like q and k. Arithmetic is fp32 (fp64 for fp64) with one rounding.

    Raises:
        RuntimeError: shapes, dtypes, devices or (on CPU) values outside of the above.
    """
    args = (position_ids, inv_freq, axis, interleaved, inverse)
    norms = (q_norm_weight, k_norm_weight, norm_eps)
    if torch.compiler.is_compiling():
        q, k = _fit_for_kernel(q), _fit_for_kernel(k)
    if dispatch.use_native("rope", q, _unsupported(q, k, *norms[:2])):
        return dispatch.call(torch.ops.keye_ops.rope.default, (q, k, *args, *norms))
    return rope_reference(q, k, *args, *norms)


def rope_(
    q: torch.Tensor,
    k: torch.Tensor,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    axis: torch.Tensor,
    *,
    interleaved: bool = False,
    inverse: bool = False,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Pair:
    """:func:`rope` in place; q and k may be views of one packed qkv tensor. Returns q and k.

    Raises:
        RuntimeError: as :func:`rope`, and where a gradient would be needed.
    """
    tensors = (q, k, q_norm_weight, k_norm_weight)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    check(not needs_grad, "rope_", "in place works without gradients only", "requires_grad=True")
    args = (position_ids, inv_freq, axis, interleaved, inverse)
    norms = (q_norm_weight, k_norm_weight, norm_eps)
    if dispatch.use_native("rope_", q, _unsupported(q, k, *norms[:2])):
        torch.ops.keye_ops.rope_.default(q, k, *args, *norms)
    else:
        rope_inplace_reference(q, k, *args, *norms)
    return q, k


def rope_2d(
    q: torch.Tensor,
    k: torch.Tensor,
    position_ids: torch.Tensor,
    *,
    theta: float = 10000.0,
    inv_freq: torch.Tensor | None = None,
) -> Pair:
    """Axial rotation of vision queries and keys (Keye-VL, PaddleOCR-VL and Qwen-VL towers).

    The first half of the head_dim / 2 frequencies turns with the row, the second with the column,
    both with ``theta ** (-4 m / head_dim)``; pairs are (j, j + head_dim / 2).

    Args:
        q: [N, num_heads, head_dim]; k: [N, num_kv_heads, head_dim]; head_dim a multiple of 4.
        position_ids: int32 or int64 [N, 2], (row, column).
        theta: base of the frequencies.
        inv_freq: fp32 [head_dim / 4] to use instead of ``theta``.

    Returns:
        New contiguous q and k.

    Raises:
        RuntimeError: shapes, dtypes, devices or (on CPU) values that do not fit.
    """
    table = _table_2d(q, position_ids, theta, inv_freq)
    return rope(q, k, position_ids.T, *table)


def rope_2d_(
    q: torch.Tensor,
    k: torch.Tensor,
    position_ids: torch.Tensor,
    *,
    theta: float = 10000.0,
    inv_freq: torch.Tensor | None = None,
) -> Pair:
    """:func:`rope_2d` in place, on strided views too; inference only. Returns q and k."""
    table = _table_2d(q, position_ids, theta, inv_freq)
    return rope_(q, k, position_ids.T, *table)


def rope_3d(
    q: torch.Tensor,
    k: torch.Tensor,
    position_ids: torch.Tensor,
    *,
    mrope_section: Sequence[int],
    theta: float = 1000000.0,
    mrope_interleaved: bool = False,
    inv_freq: torch.Tensor | None = None,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Pair:
    """Multimodal rotation of text queries and keys, with RMSNorm of both before it if wanted.

    Frequency c is ``theta ** (-2 c / head_dim)``; sections say whether the temporal, height or
    width position turns it: in runs (Keye-VL, Qwen2-VL), or interleaved (Qwen3-VL).

    Args:
        q: [N, num_heads, head_dim]; k: [N, num_kv_heads, head_dim].
        position_ids: int32 or int64 [3, N], (temporal, height, width).
        mrope_section: frequencies of each axis; their sum is head_dim / 2.
        theta: base of the frequencies.
        mrope_interleaved: sections alternate t, h, w, t, h, w, ... as long as they last.
        inv_freq: fp32 [head_dim / 2] to use instead of ``theta``.
        q_norm_weight, k_norm_weight: [head_dim] each, or both None for no norm.
        norm_eps: added to the mean square.

    Returns:
        New contiguous q and k.

    Raises:
        RuntimeError: shapes, dtypes, devices or (on CPU) values that do not fit.
    """
    table = _table_3d(q, position_ids, mrope_section, theta, mrope_interleaved, inv_freq)
    norms = {"q_norm_weight": q_norm_weight, "k_norm_weight": k_norm_weight, "norm_eps": norm_eps}
    return rope(q, k, position_ids, *table, **norms)


def rope_3d_(
    q: torch.Tensor,
    k: torch.Tensor,
    position_ids: torch.Tensor,
    *,
    mrope_section: Sequence[int],
    theta: float = 1000000.0,
    mrope_interleaved: bool = False,
    inv_freq: torch.Tensor | None = None,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Pair:
    """:func:`rope_3d` in place, on strided views too; inference only. Returns q and k."""
    table = _table_3d(q, position_ids, mrope_section, theta, mrope_interleaved, inv_freq)
    norms = {"q_norm_weight": q_norm_weight, "k_norm_weight": k_norm_weight, "norm_eps": norm_eps}
    return rope_(q, k, position_ids, *table, **norms)


def rope_table_2d(
    head_dim: int, theta: float, device: torch.device | str = "cpu", inv_freq: Any = None
) -> RopeTable:
    """The table of :func:`rope_2d`: rows turn the first half, columns the second."""
    check(head_dim % 4 == 0, "rope_2d", "head_dim must be a multiple of 4", head_dim)
    if inv_freq is None:
        inv_freq = _inv_freq(head_dim // 2, theta, device)
    check_shape("rope_2d", "inv_freq", inv_freq, (head_dim // 4,))
    axis = (0,) * (head_dim // 4) + (1,) * (head_dim // 4)
    return RopeTable(torch.cat([inv_freq, inv_freq]), _axis_tensor(axis, device, inv_freq))


def rope_table_3d(
    head_dim: int,
    mrope_section: Sequence[int],
    theta: float,
    mrope_interleaved: bool = False,
    device: torch.device | str = "cpu",
    inv_freq: Any = None,
) -> RopeTable:
    """The table of :func:`rope_3d`: chunked or interleaved temporal, height, width sections."""
    section = tuple(mrope_section)
    good = len(section) == 3 and min(section) >= 0 and sum(section) == head_dim // 2
    requirement = f"mrope_section must be 3 sizes with sum head_dim / 2 = {head_dim // 2}"
    check(good, "rope_3d", requirement, section)
    if inv_freq is None:
        inv_freq = _inv_freq(head_dim, theta, device)
    check_shape("rope_3d", "inv_freq", inv_freq, (head_dim // 2,))
    axis = tuple(i for i, size in enumerate(section) for _ in range(size))
    if mrope_interleaved:
        # Channel c belongs to axis c % 3 while that axis has channels left, else to the temporal.
        axis = tuple(c % 3 if c < 3 * section[c % 3] else 0 for c in range(head_dim // 2))
        counts = tuple(axis.count(i) for i in range(3))
        requirement = "an interleaved mrope_section must have t >= h and t >= w"
        check(counts == section, "rope_3d", requirement, section)
    return RopeTable(inv_freq, _axis_tensor(axis, device, inv_freq))


def _inv_freq(dim: int, theta: float, device: torch.device | str) -> torch.Tensor:
    # Computed on the host in fp32, so that every device and the vendor's models share the bits.
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    return (1.0 / (theta**exponent)).to(device)


def _plain(x: torch.Tensor) -> bool:
    """Not a fake tensor nor in a graph, so that what is made for it may be kept."""
    return type(x) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


@functools.lru_cache(maxsize=64)
def _cached(make: Any, device: torch.device, *args: Any) -> Any:
    with torch.inference_mode(False):  # else a later forward could not save it for its backward
        return make(*args, device=device)


def _new_axis(axis: tuple[int, ...], device: torch.device | str) -> torch.Tensor:
    return torch.tensor(axis, dtype=torch.int32, device=device)


def _axis_tensor(
    axis: tuple[int, ...], device: torch.device | str, like: torch.Tensor
) -> torch.Tensor:
    return (
        _cached(_new_axis, torch.device(device), axis) if _plain(like) else _new_axis(axis, device)
    )


def _table(make: Any, like: torch.Tensor, inv_freq: torch.Tensor | None, *args: Any) -> RopeTable:
    if inv_freq is None and _plain(like):
        return _cached(make, like.device, *args)
    return make(*args, device=like.device, inv_freq=inv_freq)


def _table_2d(
    q: torch.Tensor, position_ids: torch.Tensor, theta: float, inv_freq: torch.Tensor | None
) -> RopeTable:
    if q.dim() != 3 or position_ids.shape != (q.shape[0], 2):  # checks cost, failures do not
        check_shape("rope_2d", "q", q, ("N", "H", "D"))
        check_shape("rope_2d", "position_ids", position_ids, (q.shape[0], 2))
    return _table(rope_table_2d, q, inv_freq, q.shape[2], theta)


def _table_3d(
    q: torch.Tensor,
    position_ids: torch.Tensor,
    mrope_section: Sequence[int],
    theta: float,
    mrope_interleaved: bool,
    inv_freq: torch.Tensor | None,
) -> RopeTable:
    if q.dim() != 3 or position_ids.shape != (3, q.shape[0]):
        check_shape("rope_3d", "q", q, ("N", "H", "D"))
        check_shape("rope_3d", "position_ids", position_ids, (3, q.shape[0]))
    section = tuple(mrope_section)
    return _table(rope_table_3d, q, inv_freq, q.shape[2], section, theta, mrope_interleaved)


def _unsupported(*tensors: torch.Tensor | None) -> str | None:
    """Why the native kernel does not take q, k and the norm weights, or None."""
    q, k = tensors[:2]
    if q.dim() == k.dim() == 3 and q.numel() and (q.stride(-1) != 1 or k.stride(-1) != 1):
        return "it needs a unit last stride"
    if dispatch.kernel_device(q) != "cuda" or q.dim() != 3:
        return None
    if q.dtype == torch.float64:
        return "it has no fp64 on cuda"
    vector = 16 // q.element_size()
    if q.shape[2] % vector or q.shape[2] > 32 * vector:
        return f"it has no head_dim {q.shape[2]} in {q.dtype} on cuda"
    if not all(map(dispatch.has_fitting_rows, tensors)):
        return "it needs rows at multiples of 16 bytes on cuda"
    return None
