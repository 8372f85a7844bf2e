"""The vision tower of Keye-VL: SigLIP-shaped, native resolution, packed batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import keye_ops
from keye_ops.attention_plan import AttentionPlan
from keye_ops.grid import PackedGrid
from keye_ops.model.config import VisionConfig


class VisionAttention(nn.Module):
    """Full attention inside every segment, with axial rotary positions.

    The three projections of the checkpoint are one Linear here. `state_dict()` shows them under
    their own names as views of the fused weight, and loading fuses them again.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.rope_theta = config.rope_theta
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.register_state_dict_post_hook(_split_qkv)
        self.register_load_state_dict_pre_hook(_fuse_qkv)

    def forward(
        self, hidden: torch.Tensor, grid: PackedGrid, plan: AttentionPlan | None = None
    ) -> torch.Tensor:
        """[N, hidden_size] -> [N, hidden_size]."""
        qkv = self.qkv_proj(hidden).view(-1, 3, self.num_heads, self.head_dim)
        q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        # Without a graph to keep, the views of the packed tensor are rotated where they lie.
        rotate = keye_ops.rope_2d if qkv.requires_grad else keye_ops.rope_2d_
        q, k = rotate(q, k, grid.position_ids, theta=self.rope_theta)
        out = keye_ops.varlen_attention(
            q, k, v, grid.cu_seqlens, max_seqlen_q=grid.max_seqlen, plan=plan
        )
        return self.out_proj(out.flatten(1))


class VisionMLP(nn.Module):
    """Linear, tanh-approximated GELU, Linear."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden_size] -> [N, hidden_size]."""
        fc1 = self.fc1
        return self.fc2(keye_ops.linear_gelu(hidden, fc1.weight, fc1.bias, approximate="tanh"))


class AddLayerNorm(nn.LayerNorm):
    """LayerNorm of a residual stream to which a block's update is added first, in one pass."""

    def forward(
        self, update: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, C], [N, C] or nothing -> the stream, then its norm, both [N, C]."""
        update = update.to(self.weight.dtype)  # another one under autocast only
        if residual is None:
            return update, keye_ops.layer_norm(update, self.weight, self.bias, eps=self.eps)
        return keye_ops.add_layer_norm(update, residual, self.weight, self.bias, eps=self.eps)


class VisionLayer(nn.Module):
    """One pre-norm block.

    The stream goes in and out as an update and the residual to add it to, so that every add joins
    the LayerNorm after it, which may be the next block's.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = AddLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = AddLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(
        self,
        update: torch.Tensor,
        grid: PackedGrid,
        residual: torch.Tensor | None = None,
        plan: AttentionPlan | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block.

        Args:
            update: [N, hidden_size], the stream itself where there is no residual.
            grid: describes the N patches.
            residual: [N, hidden_size].
            plan: of the grid's segments.

        Returns:
            Update and residual, [N, hidden_size] each; their sum is the stream after the block.
        """
        residual, normed = self.layer_norm1(update, residual)
        residual, normed = self.layer_norm2(self.self_attn(normed, grid, plan), residual)
        return self.mlp(normed), residual


class VisionEmbeddings(nn.Module):
    """Patch embedding plus the learned position table, interpolated to every image's grid."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        # A Conv2d in the checkpoint; on patches cut beforehand it is one matrix product.
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(config.position_table_size**2, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor, grid: PackedGrid) -> torch.Tensor:
        """[N, C, P, P] -> [N, hidden_size]."""
        conv = self.patch_embedding
        table = self.position_embedding.weight
        return keye_ops.patch_embed(pixel_values, conv.weight, conv.bias, table, grid)


class VisionEncoder(nn.Module):
    """The stack of blocks."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self, hidden: torch.Tensor, grid: PackedGrid, norm: AddLayerNorm | None = None
    ) -> torch.Tensor:
        """[N, hidden_size] -> [N, hidden_size], through ``norm`` at the end if it is given."""
        residual = None
        plan = AttentionPlan.make(
            grid.cu_seqlens, total_q=hidden.shape[0], max_seqlen_q=grid.max_seqlen
        )
        for layer in self.layers:
            hidden, residual = layer(hidden, grid, residual, plan)
        if norm is not None:
            return norm(hidden, residual)[1]
        return hidden if residual is None else hidden + residual


class VisionTransformer(nn.Module):
    """Embeddings, blocks, final LayerNorm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = AddLayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor, grid: PackedGrid) -> torch.Tensor:
        """[N, C, P, P] -> [N, hidden_size]."""
        hidden = self.embeddings(pixel_values, grid)
        return self.encoder(hidden, grid, self.post_layernorm)


class VisionTower(nn.Module):
    """The tower as checkpoints name it: every parameter lies under `vision_model.`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config)

    @property
    def segment(self) -> str:
        """What attends jointly, as PackedGrid takes it: "clip" (Preview) or "frame" (1.5)."""
        return self.config.segment

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.vision_model.post_layernorm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.vision_model.post_layernorm.weight.device

    def pack(self, grid_thw: Any) -> PackedGrid:
        """Describe a batch of (t, h, w) host integers for this tower, on its device."""
        return PackedGrid.from_grid_thw(
            grid_thw,
            segment=self.segment,
            spatial_merge_size=self.config.spatial_merge_size,
            device=self.device,
        )

    def forward(self, pixel_values: torch.Tensor, grid: PackedGrid) -> torch.Tensor:
        """Encode a packed batch of images and clips.

        With native kernels nothing in it waits for the device; the references of the rotation and
        of the attention read position_ids and cu_seqlens back to the host.

        Args:
            pixel_values: [N, num_channels, patch_size, patch_size], patches in raster order per
                frame, frames one after the other. Floating pixels are normalised already and cast
                to the dtype of the weights; uint8 pixels are normalised to [-1, 1] here.
            grid: describes the N patches; `pack(grid_thw)` gives one with this tower's segments.

        Returns:
            [N, hidden_size] after the final LayerNorm, in the dtype of the weights.

        Raises:
            ValueError: pixel_values whose shape does not fit the configuration and the grid.
        """
        size = self.config.patch_size
        expected = (grid.total, self.config.num_channels, size, size)
        if tuple(pixel_values.shape) != expected:
            raise ValueError(
                f"VisionTower: pixel_values must be {list(expected)} for the given grid, "
                f"got {list(pixel_values.shape)}"
            )
        return self.vision_model(pixel_values.to(self.device), grid)


def _split_qkv(module: VisionAttention, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Show the fused projection under the checkpoint's three names, on the same storage."""
    for kind in ("weight", "bias"):
        parts = state.pop(f"{prefix}qkv_proj.{kind}").chunk(3)
        state |= {f"{prefix}{n}_proj.{kind}": part for n, part in zip("qkv", parts, strict=True)}


def _fuse_qkv(
    module: VisionAttention,
    state: dict[str, Any],
    prefix: str,
    _metadata: Any,
    _strict: bool,
    _missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    """Join the checkpoint's three projections; incomplete sets are left for torch to report."""
    for kind in ("weight", "bias"):
        names = [f"{prefix}{n}_proj.{kind}" for n in "qkv"]
        if not all(name in state for name in names):
            continue
        want = module.out_proj.get_parameter(kind).shape
        parts = [state.pop(name) for name in names]
        wrong = [
            f"size mismatch for {name}: {list(part.shape)} in the state dict, {list(want)} here"
            for name, part in zip(names, parts, strict=True)
            if part.shape != want
        ]
        errors += wrong
        fused = module.qkv_proj.get_parameter(kind) if wrong else torch.cat(parts)
        state[f"{prefix}qkv_proj.{kind}"] = fused
