"""The Qwen3 text model of Keye-VL, on packed tokens with multimodal positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import keye_ops
from keye_ops.model.cache import KVCache, SequenceLayout
from keye_ops.model.config import TextConfig


class TextAttention(nn.Module):
    """Causal grouped-query attention; q and k are RMS-normalised, then rotated by (t, h, w)."""

    def __init__(self, config: TextConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        hidden, dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(hidden, config.num_heads * dim, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_kv_heads * dim, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_kv_heads * dim, bias=bias)
        self.o_proj = nn.Linear(config.num_heads * dim, hidden, bias=bias)
        # Only the weights are used: the norms are fused into the rotation.
        self.q_norm = nn.RMSNorm(dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden: torch.Tensor,
        position_ids: torch.Tensor,
        layout: SequenceLayout,
        cache: KVCache | None,
        plan: keye_ops.AttentionPlan | None = None,
    ) -> torch.Tensor:
        """[N, hidden_size], position_ids [3, N] -> [N, hidden_size]."""
        config = self.config
        q = self.q_proj(hidden).view(-1, config.num_heads, config.head_dim)
        k = self.k_proj(hidden).view(-1, config.num_kv_heads, config.head_dim)
        v = self.v_proj(hidden).view(-1, config.num_kv_heads, config.head_dim)
        involved = (q, k, self.q_norm.weight, self.k_norm.weight)
        keeps_graph = torch.is_grad_enabled() and any(x.requires_grad for x in involved)
        rotate = keye_ops.rope_3d if keeps_graph else keye_ops.rope_3d_
        q, k = rotate(
            q,
            k,
            position_ids,
            mrope_section=config.mrope_section,
            theta=config.rope_theta,
            mrope_interleaved=config.mrope_interleaved,
            q_norm_weight=self.q_norm.weight,
            k_norm_weight=self.k_norm.weight,
            norm_eps=config.rms_norm_eps,
        )
        if cache is not None:
            k, v = cache.update(self.layer_idx, k, v, layout)
        out = keye_ops.varlen_attention(
            q,
            k,
            v,
            layout.cu_seqlens_q,
            layout.cu_seqlens_k,
            max_seqlen_q=layout.max_seqlen_q,
            max_seqlen_k=layout.max_seqlen_k,
            causal=True,
            plan=plan,
        )
        return self.o_proj(out.flatten(1))


class TextMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden_size] -> [N, hidden_size]."""
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class AddRMSNorm(nn.RMSNorm):
    """RMSNorm of a residual stream to which a block's update is added first, in one pass."""

    def forward(
        self, update: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, C], [N, C] or nothing -> the stream, then its norm, both [N, C]."""
        update = update.to(self.weight.dtype)  # another one under autocast only
        if residual is None:
            return update, keye_ops.rms_norm(update, self.weight, eps=self.eps)
        return keye_ops.add_rms_norm(update, residual, self.weight, eps=self.eps)


class TextLayer(nn.Module):
    """One pre-norm block.

    The stream goes in and out as an update and the residual to add it to, so that every add joins
    the RMSNorm after it, which may be the next block's.
    """

    def __init__(self, config: TextConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = AddRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = TextAttention(config, layer_idx)
        self.post_attention_layernorm = AddRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = TextMLP(config)

    def forward(
        self,
        update: torch.Tensor,
        position_ids: torch.Tensor,
        layout: SequenceLayout,
        cache: KVCache | None,
        residual: torch.Tensor | None = None,
        plan: keye_ops.AttentionPlan | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block.

        Args:
            update: [N, hidden_size], the stream itself where there is no residual.
            position_ids: [3, N].
            layout: of the N tokens.
            cache: as of `TextModel`.
            residual: [N, hidden_size].
            plan: of the layout's segments, if many blocks share one.

        Returns:
            Update and residual, [N, hidden_size] each; their sum is the stream after the block.
        """
        residual, normed = self.input_layernorm(update, residual)
        attended = self.self_attn(normed, position_ids, layout, cache, plan)
        residual, normed = self.post_attention_layernorm(attended, residual)
        return self.mlp(normed), residual


class TextModel(nn.Module):
    """Embedding table, blocks and final norm; works on packed tokens, so padding costs nothing."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TextLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = AddRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        layout: SequenceLayout,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Run the new tokens of a batch.

        Args:
            inputs_embeds: [N, hidden_size], the sequences one after the other.
            position_ids: integer [3, N], (t, h, w) of every token.
            layout: from `SequenceLayout.from_lengths`, or from `cache.extend` with a cache.
            cache: receives the keys and values, and provides the earlier ones.

        Returns:
            [N, hidden_size] after the final norm.
        """
        update, residual = inputs_embeds, None
        total = inputs_embeds.shape[0]
        plan = keye_ops.AttentionPlan.make(
            layout.cu_seqlens_q,
            layout.cu_seqlens_k,
            total_q=total,
            total_k=total if cache is None else cache.batch_size * cache.capacity,
            max_seqlen_q=layout.max_seqlen_q,
            max_seqlen_k=layout.max_seqlen_k,
            causal=True,
        )
        for layer in self.layers:
            update, residual = layer(update, position_ids, layout, cache, residual, plan)
        return self.norm(update, residual)[1]
