"""Which tokens attend to which: the packed layout of a batch, and the key/value cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from keye_ops.model.config import TextConfig


@dataclass(frozen=True)
class SequenceLayout:
    """Segments of one text forward, computed once and used by every layer.

    Attributes:
        cu_seqlens_q: int32 [S + 1], offsets of the new tokens.
        cu_seqlens_k: int32 [S + 1], offsets of the keys they see; None: the new tokens' own.
        max_seqlen_q, max_seqlen_k: host ints.
        rows: int64 [N], cache rows that the new tokens fill; None without a cache.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    rows: torch.Tensor | None

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device) -> SequenceLayout:
        """Sequences of host-int `lengths` that lie one after the other and see only themselves."""
        longest = max(lengths, default=0)
        return cls(_offsets(lengths, device), None, longest, longest, None)


class KVCache:
    """Keys and values of a batch of sequences of different lengths.

    Every layer holds keys [batch_size * capacity, num_kv_heads, head_dim] and values of that shape;
    sequence b owns the rows from b * capacity. It grows by doubling (one copy) when a sequence
    outgrows `capacity`; give the final length to avoid that. Memory is 2 * layers * batch_size *
    capacity * num_kv_heads * head_dim elements. For inference: no gradient flows through it.

    Attributes:
        lengths: host ints, tokens stored for each sequence.
        next_positions: host ints, the position of each sequence's next token on all three axes.
            A vision block takes fewer positions than tokens, so these are not the lengths.
    """

    def __init__(
        self,
        config: TextConfig,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < 0 or capacity < 1:
            raise ValueError(
                "KVCache: batch_size must be >= 0 and capacity >= 1, "
                f"got {batch_size} and {capacity}"
            )
        self.batch_size, self.capacity = batch_size, capacity
        self.device = torch.device(device)
        self.lengths = [0] * batch_size
        self.next_positions = [0] * batch_size
        shape = (batch_size * capacity, config.num_kv_heads, config.head_dim)
        self._layers = [
            (
                torch.empty(shape, dtype=dtype, device=device),
                torch.empty(shape, dtype=dtype, device=device),
            )
            for _ in range(config.num_hidden_layers)
        ]

    def advance(self, spans: Sequence[int]) -> torch.Tensor:
        """Move `next_positions` by `spans`; give the old ones, int64 [B, 1] on the host."""
        self._check_batch(spans)
        start = torch.tensor(self.next_positions, dtype=torch.int64)
        self.next_positions = [p + s for p, s in zip(self.next_positions, spans, strict=True)]
        return start[:, None]

    def extend(self, new_lengths: Sequence[int]) -> SequenceLayout:
        """Make room for `new_lengths[b]` tokens of each sequence and say where they go."""
        self._check_batch(new_lengths)
        lengths = [old + new for old, new in zip(self.lengths, new_lengths, strict=True)]
        longest = max(lengths, default=0)
        if longest > self.capacity:
            self._grow(max(longest, 2 * self.capacity))

        rows: list[int] = []
        for b, (old, new) in enumerate(zip(self.lengths, lengths, strict=True)):
            rows += range(b * self.capacity + old, b * self.capacity + new)
        # Segments alternate: the filled rows of a sequence, seen by its new tokens, then its free
        # rows, seen by nobody. So attention reads the cache in place, with no gather.
        queries: list[int] = []
        keys: list[int] = []
        for new, length in zip(new_lengths, lengths, strict=True):
            queries += [new, 0]
            keys += [length, self.capacity - length]
        queries, keys = queries[:-1], keys[:-1]  # nothing follows the last free rows
        self.lengths = lengths
        return SequenceLayout(
            _offsets(queries, self.device),
            _offsets(keys, self.device),
            max(queries, default=0),
            max(keys, default=0),
            torch.tensor(rows, dtype=torch.int64).to(self.device, non_blocking=True),
        )

    def update(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values [N, num_kv_heads, head_dim]; give all rows of the layer."""
        if k.requires_grad or v.requires_grad:
            raise ValueError("KVCache: no gradient flows through the cache; use torch.no_grad()")
        keys, values = self._layers[layer]
        keys.index_copy_(0, layout.rows, k)
        values.index_copy_(0, layout.rows, v)
        return keys, values

    def _check_batch(self, values: Sequence[int]) -> None:
        if len(values) != self.batch_size:
            raise ValueError(
                f"KVCache: made for {self.batch_size} sequences, got a batch of {len(values)}"
            )

    def _grow(self, capacity: int) -> None:
        def grown(old: torch.Tensor) -> torch.Tensor:
            new = old.new_empty(self.batch_size, capacity, *old.shape[1:])
            new[:, : self.capacity] = old.view(self.batch_size, self.capacity, *old.shape[1:])
            return new.flatten(0, 1)

        self._layers = [(grown(keys), grown(values)) for keys, values in self._layers]
        self.capacity = capacity


def _offsets(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """0 and the running sums, int32 on `device`."""
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return torch.tensor(offsets, dtype=torch.int32).to(device, non_blocking=True)
