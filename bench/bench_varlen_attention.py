"""varlen_attention: vision heads of 72 over packed frames, and causal grouped text heads of 128."""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch.nn.functional as F
from keye_ops.bench import cuda_peers, harness, peers
from keye_ops.bench.harness import Case, Provider, Settings, Skip, Workload

import keye_ops
from keye_ops.cli import main

TEXT = (1024, 4096, 8192, 16384, 32768)
# FLOPs: cases beyond are timed forward only, or without the peers that take minutes for them.
_FULL_LIMIT, _SLOW_PEER_LIMIT = 1.5e12, 4e12


def cases(settings: Settings) -> list[Case]:
    """A segment a frame, as in Keye-VL-1.5; text as one causal segment."""
    found = []
    for mode in ("forward", "full"):
        for dtype in (torch.bfloat16, torch.float32):
            half, size = dtype == torch.bfloat16, harness.size_of(dtype)
            for name in harness.UNMERGED:
                lengths = harness.frame_lengths(name)
                total, big = sum(lengths), name == "1-megapixel image"
                passes = 4 if mode == "forward" else 12
                case = Case(
                    op="varlen_attention",
                    group="vision, 16 heads of 72",
                    shape=name,
                    size=total,
                    dtype=dtype,
                    num_bytes=passes * total * 16 * 72 * size,
                    flops=harness.attention_flops(lengths, 16, 72, mode=mode),
                    build=partial(workload, lengths, 16, 16, 72, False, dtype, mode, settings),
                    mode=mode,
                    quick=half and (name == "image 378²" or (big and mode == "forward")),
                    headline=big and half and mode == "forward",
                )
                found.append(case)
            for total in TEXT:
                flops = harness.attention_flops([total], 32, 128, causal=True, mode=mode)
                if (mode == "full" and flops > _FULL_LIMIT) or (not half and total > 8192):
                    continue
                passes = 80 if mode == "forward" else 240
                case = Case(
                    op="varlen_attention",
                    group="text, causal, 32/8 heads of 128",
                    shape=f"text {total // 1024}k, causal",
                    size=total,
                    unit="tokens",
                    dtype=dtype,
                    num_bytes=passes * total * 128 * size,
                    flops=flops,
                    build=partial(workload, [total], 32, 8, 128, True, dtype, mode, settings),
                    mode=mode,
                    quick=half and total == TEXT[0] and mode == "forward",
                )
                found.append(case)
    return found


def workload(
    lengths: list[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    causal: bool,
    dtype: torch.dtype,
    mode: str,
    settings: Settings,
) -> Workload:
    """q, k and v as views of one packed tensor, as the model has them."""
    device, total = settings.device, sum(lengths)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    packed = harness.random(total, sum(heads), head_dim, dtype=dtype, device=device)
    inputs = packed.split(heads, dim=1)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int().to(device)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return keye_ops.varlen_attention(q, k, v, offsets, max_seqlen_q=max(lengths), causal=causal)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=num_heads != num_kv_heads
        )

    by_segment, together = peers.by_segment(attend, lengths), peers.together(attend, lengths)
    dense = peers.by_segment(partial(_dense, causal=causal), lengths)
    scores = num_heads * max(lengths) ** 2 * (harness.size_of(dtype) + 8)
    scores *= 1 if mode == "forward" else 3
    eager = harness.if_it_fits(scores, harness.in_mode(mode, dense, inputs), device)
    if settings.quick and scores > 1e9:
        eager = Skip("not with --quick: it takes seconds")
    many, equal = len(lengths) > 1, len(set(lengths)) == 1
    compiled: Provider | Skip = Skip("segments of several lengths")
    batch: dict[str, Provider | Skip] = {}
    if equal:
        compiled = peers.compiled(together, settings, *inputs, mode=mode)
        if many:
            batch["torch SDPA of the batch"] = harness.in_mode(mode, together, inputs)
    return Workload(
        ours={"keye_ops": harness.in_mode(mode, ours, inputs)},
        peers={
            "torch SDPA": harness.in_mode(mode, by_segment, inputs),
            **batch,
            "torch.compile of SDPA": compiled,
            "eager": eager,
            "zentorch": _zentorch(inputs, lengths, causal, mode, settings),
            **cuda_peers.attention(inputs, lengths, causal, mode, settings),
        },
    )


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """transformers' eager attention: all scores, softmax in fp32."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if causal:
        rows = q.shape[2]
        hidden = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def _zentorch(
    inputs: tuple[torch.Tensor, ...],
    lengths: list[int],
    causal: bool,
    mode: str,
    settings: Settings,
) -> Provider | Skip:
    """Its attention op; of the batch where segments have one length. Keys are repeated for GQA."""
    module = peers.zentorch(settings)
    if isinstance(module, Skip):
        return module
    if mode == "full":
        return Skip("has no gradients")
    if harness.attention_flops(lengths, *inputs[0].shape[1:], causal=causal) > _SLOW_PEER_LIMIT:
        return Skip("takes minutes")

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return torch.ops.zentorch.zentorch_sdpa(q, k, v, is_causal=causal)[0]

    wrap = peers.together if len(set(lengths)) == 1 else peers.by_segment
    return harness.in_mode(mode, wrap(attend, lengths), inputs)


if __name__ == "__main__":
    sys.exit(main(["bench", "varlen_attention", *sys.argv[1:]]))
