"""projector: vision tokens to text embeddings; merge_norm, linear_gelu and a linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from keye_ops.checks import check_same, check_shape
from keye_ops.grid import PackedGrid
from keye_ops.linear_gelu import linear_gelu
from keye_ops.merge_norm import merge_norm


def projector(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    linear_1_weight: torch.Tensor,
    linear_1_bias: torch.Tensor,
    linear_2_weight: torch.Tensor,
    linear_2_bias: torch.Tensor,
    grid: PackedGrid | Sequence[Sequence[int]],
    *,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Keye-VL's projector (``mlp_AR``) over a whole packed batch, however many images it holds.

    Args:
        x: [N, C], the vision tower's output.
        norm_weight, norm_bias: [C] (Preview) or [4 C] (1.5); see :func:`keye_ops.merge_norm`.
        linear_1_weight: [4 C, 4 C]; linear_1_bias: [4 C].
        linear_2_weight: [out, 4 C]; linear_2_bias: [out].
        grid: the batch; :class:`PackedGrid`, or ``(t, h, w)`` host integers an image.
        eps: of the LayerNorm.

    Returns:
        [N / 4, out].

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, or an odd grid.
    """
    merged = merge_norm(x, norm_weight, norm_bias, grid, eps=eps)
    hidden = linear_gelu(merged, linear_1_weight, linear_1_bias)
    check_shape("projector", "linear_2_weight", linear_2_weight, ("out", hidden.shape[1]))
    check_same("projector", "linear_2_weight", linear_2_weight, "x", x)
    check_shape("projector", "linear_2_bias", linear_2_bias, (linear_2_weight.shape[0],))
    check_same("projector", "linear_2_bias", linear_2_bias, "x", x)
    return F.linear(hidden, linear_2_weight, linear_2_bias)
