"""FlashAttention's packed interface, so that its users can swap the import."""

from __future__ import annotations

from typing import Any

import torch

from keye_ops.varlen_attention import varlen_attention


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> Any:
    """:func:`varlen_attention` with the arguments of FlashAttention's function of this name.

    Args:
        q, k, v: [Nq, num_heads, head_dim], [Nk, num_kv_heads, head_dim] twice.
        cu_seqlens_q, cu_seqlens_k: int32 [num_segments + 1].
        max_seqlen_q, max_seqlen_k: upper bounds of the segment lengths.
        softmax_scale: None is head_dim ** -0.5.
        causal: aligned at the bottom right.
        deterministic: gradients always are.
        return_attn_probs: give (out, softmax_lse [num_heads, Nq], None), too.
        dropout_p, window_size, softcap, alibi_slopes, block_table: only their defaults.

    Raises:
        RuntimeError: an option that keye_ops does not have, or arguments that do not fit.
    """
    missing = {
        "dropout_p": (dropout_p, dropout_p == 0.0),
        "window_size": (window_size, all(x < 0 for x in window_size)),
        "softcap": (softcap, softcap == 0.0),
        "alibi_slopes": (alibi_slopes, alibi_slopes is None),
        "block_table": (block_table, block_table is None),
    }
    for name, (value, is_default) in missing.items():
        if not is_default:
            got = f"{list(value.shape)}" if isinstance(value, torch.Tensor) else value
            raise RuntimeError(f"flash_attn_varlen_func: {name} must be its default, got {got}")
    out = varlen_attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=softmax_scale,
        causal=causal,
        return_lse=return_attn_probs,
    )
    return (*out, None) if return_attn_probs else out
