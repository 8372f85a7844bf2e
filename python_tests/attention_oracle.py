"""What attention is held to: a dense product under a mask, plain attention; and its inputs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from tolerance import assert_within_twice

import keye_ops

# Lengths of the segments (q, k), and rows past the last offset (q, k).
SEGMENTS = {
    "keye frames": ([24, 24, 24], [24, 24, 24], 0, 0),
    "odd": ([1, 17, 3, 40], [1, 17, 3, 40], 0, 0),
    "one token": ([1], [1], 0, 0),
    "no row": ([], [], 0, 0),
    "empty segments": ([0, 5, 0, 0, 7, 0], [0, 5, 0, 0, 7, 0], 0, 0),
    "only empty segments": ([0, 0], [0, 0], 0, 0),
    "rows past the end": ([4, 6, 0, 0], [4, 6, 0, 0], 5, 3),
    "rows but no segment": ([], [], 4, 4),
    "q shorter": ([3, 1, 8], [9, 6, 20], 0, 0),
    "q longer": ([9, 6, 20], [3, 1, 8], 0, 0),
    "q without k": ([3, 4], [0, 5], 0, 0),
    "k without q": ([0, 4], [3, 5], 0, 0),
    "no k at all": ([3, 4], [0, 0], 0, 0),
}


def zeros(*shape, dtype=torch.float64):
    return torch.zeros(shape, dtype=dtype)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def offsets(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def make(segments, dtype=torch.float64, heads=2, kv_heads=2, head_dim=8, seed=0):
    """q, k, v, cu_seqlens_q, cu_seqlens_k."""
    lengths_q, lengths_k, rest_q, rest_k = segments
    generator = torch.Generator().manual_seed(seed)
    rows = (sum(lengths_q) + rest_q, sum(lengths_k) + rest_k, sum(lengths_k) + rest_k)
    shapes = zip(rows, (heads, kv_heads, kv_heads), strict=True)
    qkv = [
        torch.randn(n, h, head_dim, generator=generator, dtype=torch.float64).to(dtype)
        for n, h in shapes
    ]
    return (*qkv, offsets(lengths_q), offsets(lengths_k))


def attention(way, q, k, v, cu_q, cu_k, scale=None, causal=False):
    """out and lse."""
    if way == "public":
        options = {"softmax_scale": scale, "causal": causal, "return_lse": True}
        return keye_ops.varlen_attention(q, k, v, cu_q, cu_k, **options)
    return torch.ops.keye_ops.varlen_attention(q, k, v, cu_q, cu_k, None, None, scale, causal)


def oracle(q, k, v, cu_q, cu_k, scale=None, causal=False):
    """One dense product of all rows with all keys; a mask says who sees whom."""
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    seen = torch.zeros(len(q), len(k), dtype=torch.bool)
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        for i in range(a, b):
            last = d - (b - 1 - i) if causal else d  # bottom right: the last row sees all keys
            seen[i, c : max(last, c)] = True
    kv_head = [h * k.shape[1] // q.shape[1] for h in range(q.shape[1])]
    scores = torch.stack([q[:, h] @ k[:, g].T for h, g in enumerate(kv_head)]) * scale
    scores = torch.where(seen, scores, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    sighted = seen.any(1)
    weights = torch.zeros_like(scores)
    weights[:, sighted] = torch.softmax(scores[:, sighted], -1)
    out = torch.stack([weights[h] @ v[:, g] for h, g in enumerate(kv_head)], 1)
    return out, lse


def plain_attention(q, k, v, cu_q, cu_k, scale=None, causal=False):
    """scaled_dot_product_attention of every segment, of the rows that see a key."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = torch.zeros_like(q)
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        first = max(a, b - (d - c)) if causal else a
        if first < b and c < d:
            rows = (x.transpose(0, 1)[None] for x in (q[first:b], k[c:d], v[c:d]))
            mask = torch.ones(b - first, d - c, dtype=torch.bool)
            mask = mask.tril(d - c - (b - first)) if causal else mask
            segment = F.scaled_dot_product_attention(*rows, attn_mask=mask, scale=scale)
            out[first:b] = segment[0].transpose(0, 1)
    return out


def compare(way, inputs, **options):
    """Hold out and lse to the tolerance; lse is fp32 whatever the dtype."""
    out, lse = attention(way, *inputs, **options)
    wide = [x.double() for x in inputs[:3]]
    exact_out, exact_lse = oracle(*wide, *inputs[3:], **options)
    plain_out = plain_attention(*inputs, **options)
    lse_dtype = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    _, plain_lse = oracle(*(x.to(lse_dtype) for x in inputs[:3]), *inputs[3:], **options)
    assert out.is_contiguous()
    assert_within_twice(out, plain_out, exact_out)
    assert_within_twice(lse, plain_lse, exact_lse)
