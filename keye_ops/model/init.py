"""Random weights that keep activations in range, for demos and tests without a checkpoint."""

from __future__ import annotations

import math

import torch
from torch import nn

# Layers that write to the residual stream: their sum over the depth should stay of order one.
_RESIDUAL = ("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")


@torch.no_grad()
def init_random(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill a model with random weights, in place; gives the model.

    The values depend on the seed and the shapes, not on dtype or device: they are drawn in fp32 on
    the host and rounded. Matrices have variance 1 / fan_in, those that end a residual branch
    also 1 / (2 * layers), so bf16 activations stay finite through the full depth.

    Args:
        model: a KeyeModel, VisionTower, Projector or TextModel with allocated parameters.
        seed: of the host generator.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = {name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("weight"):  # norms
            parameter.fill_(1.0)
            continue
        std = 0.02 if parameter.dim() == 1 else 1 / math.sqrt(parameter[0].numel())
        if "embed_tokens" in name or "position_embedding" in name:
            std = 0.5
        if name.endswith(_RESIDUAL):
            layers = next((n for path, n in depth.items() if name.startswith(path + ".")), 1)
            std /= math.sqrt(2 * layers)
        drawn = torch.empty(parameter.shape, dtype=torch.float32).normal_(
            0, std, generator=generator
        )
        parameter.copy_(drawn)
    return model
