"""The projector from vision patches to text rows."""

from __future__ import annotations

import torch
from torch import nn

import keye_ops
from keye_ops.grid import PackedGrid
from keye_ops.model.config import KeyeConfig

_NORM_EPS = 1e-5  # fixed in the published model, not a field of config.json


class Projector(nn.Module):
    """2x2 merge, Linear, exact GELU, Linear; the LayerNorm tells the versions apart.

    Keye-VL-8B-Preview normalises every patch before the merge, Keye-VL-1.5 the merged vector.
    """

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        channels = config.vision.hidden_size
        merged = channels * config.vision.spatial_merge_size**2
        norm_size = channels if config.version == "preview" else merged
        self.pre_norm = nn.LayerNorm(norm_size, eps=_NORM_EPS)
        self.linear_1 = nn.Linear(merged, merged)
        self.linear_2 = nn.Linear(merged, config.text.hidden_size)

    def forward(self, features: torch.Tensor, grid: PackedGrid) -> torch.Tensor:
        """Project a packed batch.

        Args:
            features: [N, hidden_size], the tower's output.
            grid: describes the N patches.

        Returns:
            [N / spatial_merge_size**2, text hidden_size], raster order, frames consecutive.
        """
        return keye_ops.projector(
            features,
            self.pre_norm.weight,
            self.pre_norm.bias,
            self.linear_1.weight,
            self.linear_1.bias,
            self.linear_2.weight,
            self.linear_2.bias,
            grid,
            eps=self.pre_norm.eps,
        )
