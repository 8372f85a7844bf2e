"""The whole model: vision tower, projector, text model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from keye_ops.grid import PackedGrid
from keye_ops.model.cache import KVCache, SequenceLayout
from keye_ops.model.config import KeyeConfig
from keye_ops.model.projector import Projector
from keye_ops.model.rope_index import Grid, get_rope_index
from keye_ops.model.text import TextModel
from keye_ops.model.vision import VisionTower

# Pixels [N, 3, P, P] and grid of the images or of the videos of a batch; None and None without any.
Vision = tuple[torch.Tensor | None, Grid | None]


class KeyeModel(nn.Module):
    """Keye-VL-8B-Preview or Keye-VL-1.5, with the parameter names of the released checkpoints."""

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision)
        self.mlp_AR = Projector(config)
        self.model = TextModel(config.text)
        # Tied: the embedding table is the head, and checkpoints hold it once.
        self.lm_head = (
            None
            if config.text.tie_word_embeddings
            else nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the text weights."""
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the text weights."""
        return self.model.embed_tokens.weight.device

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty key/value cache for `batch_size` prompts; see KVCache."""
        return KVCache(self.config.text, batch_size, capacity, dtype=self.dtype, device=self.device)

    def encode_images(
        self, pixel_values: torch.Tensor, grid_thw: PackedGrid | Grid
    ) -> torch.Tensor:
        """Turn patches into text rows: tower, then projector.

        Args:
            pixel_values: [N, 3, patch_size, patch_size], raster order per frame.
            grid_thw: (t, h, w) of every image or clip as host integers, or a PackedGrid.

        Returns:
            [N / spatial_merge_size**2, text hidden_size].
        """
        grid = grid_thw if isinstance(grid_thw, PackedGrid) else self.visual.pack(grid_thw)
        return self.mlp_AR(self.visual(pixel_values, grid), grid)

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: Grid | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: Grid | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: KVCache | None = None,
        second_per_grid_ts: Sequence[float] | torch.Tensor | None = None,
        last_logits_only: bool = False,
    ) -> torch.Tensor:
        """Logits of a batch of prompts, or of the next tokens of prompts in a cache.

        Padding is dropped before the text model and costs nothing. A prompt is read on the host
        (positions, vision tokens); a one-token step with a cache is not, so it does not wait for
        the device if its mask is on the host.

        Args:
            input_ids: integer [B, L], one pad token for every merged vision token.
            pixel_values: [N, 3, patch_size, patch_size] of all images, in prompt order.
            image_grid_thw: (t, h, w) of every image, host integers.
            pixel_values_videos, video_grid_thw: the same for videos (1.5: frames or videos).
            attention_mask: [B, L] over `input_ids` alone (not over the cache), 1 for tokens and
                0 for padding at any place; a row may be all padding.
            position_ids: [3, B, L] instead of the computed ones; then give them at every step.
            cache: from `new_cache`; extended by the tokens of this call.
            second_per_grid_ts: seconds between the frames of each video (Preview only).
            last_logits_only: give [B, 1, vocab_size], the last token of every prompt.

        Returns:
            [B, L, vocab_size] in the dtype of the weights; zeros at padding.

        Raises:
            ValueError: shapes that do not fit, or another number of vision tokens than vision rows.
        """
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                "KeyeModel: input_ids must be int32 or int64 [B, L], "
                f"got {input_ids.dtype} {list(input_ids.shape)}"
            )
        if position_ids is not None and position_ids.shape != (3, *input_ids.shape):
            raise ValueError(
                f"KeyeModel: position_ids must be {[3, *input_ids.shape]}, "
                f"got {list(position_ids.shape)}"
            )
        has_vision = pixel_values is not None or pixel_values_videos is not None
        is_prompt = cache is None or not any(cache.lengths) or input_ids.shape[1] > 1 or has_vision
        mask = _host_mask(input_ids, attention_mask)
        lengths = mask.sum(axis=1).tolist()
        # Places of the tokens in [B * L]; None where nothing is padding.
        places = None if mask.all() else torch.from_numpy(np.flatnonzero(mask)).to(self.device)

        ids = _take(input_ids.to(self.device).flatten(), places)
        if is_prompt:
            host_ids = input_ids.cpu()
            images, videos = (pixel_values, image_grid_thw), (pixel_values_videos, video_grid_thw)
            embeds = self._embed_prompt(ids, host_ids.numpy()[mask], images, videos)
        else:
            embeds = self.model.embed_tokens(ids)

        if position_ids is None and is_prompt:
            position_ids, deltas = get_rope_index(
                host_ids,
                self.config,
                image_grid_thw=image_grid_thw,
                video_grid_thw=video_grid_thw,
                attention_mask=torch.from_numpy(mask),
                second_per_grid_ts=second_per_grid_ts,
            )
            if cache is not None:
                spans = (deltas.flatten() + host_ids.shape[1]).tolist()
                position_ids = position_ids + cache.advance(spans)
        elif position_ids is None:
            position_ids = cache.advance(lengths).expand(3, -1, -1)

        layout = (
            SequenceLayout.from_lengths(lengths, self.device)
            if cache is None
            else cache.extend(lengths)
        )
        positions = position_ids.to(self.device).flatten(1)
        positions = positions if places is None else positions[:, places]
        hidden = self.model(embeds, positions, layout, cache)
        if last_logits_only:
            return self._last_logits(hidden, lengths)
        logits = _scatter_rows(self._logits(hidden), places, input_ids.numel())
        return logits.view(*input_ids.shape, logits.shape[-1])

    def _embed_prompt(
        self, ids: torch.Tensor, host_ids: np.ndarray, images: Vision, videos: Vision
    ) -> torch.Tensor:
        """[N, hidden_size]: embeddings of the tokens, with vision rows at the vision tokens."""
        vocab_size = self.config.text.vocab_size
        unknown = host_ids[(host_ids < 0) | (host_ids >= vocab_size)]
        if unknown.size:
            raise ValueError(
                f"KeyeModel: input_ids must be below vocab_size = {vocab_size}, got {unknown[0]}"
            )
        embeds = self.model.embed_tokens(ids)
        is_image = host_ids == self.config.image_token_id
        is_video = host_ids == self.config.video_token_id
        embeds = self._insert_rows(embeds, is_image, "image", *images)
        return self._insert_rows(embeds, is_video, "video", *videos)

    def _insert_rows(
        self,
        embeds: torch.Tensor,
        is_vision: np.ndarray,
        name: str,
        pixel_values: torch.Tensor | None,
        grid_thw: Grid | None,
    ) -> torch.Tensor:
        """Replace the embeddings of the vision tokens by vision rows, in order."""
        if (pixel_values is None) != (grid_thw is None):
            raise ValueError(f"KeyeModel: {name} pixels and {name}_grid_thw must be given together")
        grid = None if grid_thw is None else self.visual.pack(grid_thw)
        num_rows = 0 if grid is None else grid.total_merged
        num_tokens = int(is_vision.sum())
        if num_tokens != num_rows:
            raise ValueError(
                f"KeyeModel: the prompt has {num_tokens} {name} tokens, "
                f"but the {name} input gives {num_rows} rows"
            )
        if grid is None:
            return embeds
        rows = self.encode_images(pixel_values, grid)
        index = torch.from_numpy(np.flatnonzero(is_vision)).to(embeds.device)
        return embeds.index_copy(0, index, rows.to(embeds.dtype))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden, head.weight)

    def _last_logits(self, hidden: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """[B, 1, vocab_size]; zeros for a row without tokens."""
        kept = np.flatnonzero(lengths)
        last = torch.from_numpy(np.cumsum(lengths)[kept] - 1).to(hidden.device)
        places = None if len(kept) == len(lengths) else torch.from_numpy(kept).to(hidden.device)
        return _scatter_rows(self._logits(hidden[last]), places, len(lengths)).unsqueeze(1)


def _host_mask(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> np.ndarray:
    """Bool [B, L], true for tokens."""
    if attention_mask is None:
        return np.ones(tuple(input_ids.shape), bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            "KeyeModel: attention_mask must have the shape of input_ids "
            f"{list(input_ids.shape)}, got {list(attention_mask.shape)}"
        )
    return attention_mask.detach().cpu().numpy() != 0


def _take(values: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    return values if places is None else values[places]


def _scatter_rows(rows: torch.Tensor, places: torch.Tensor | None, total: int) -> torch.Tensor:
    """Put [n, C] rows at their places in [total, C], zeros elsewhere."""
    if places is None:
        return rows
    return rows.new_zeros(total, rows.shape[1]).index_copy(0, places, rows)
