"""Rotary positions (t, h, w) of a prompt that holds images and videos.

A text token advances all three axes by one. An image or video takes a block: its merged grid spans
the h and w axes from the block's start, and the next token goes on after the block's largest id.
What a block is and how time advances in it differs between the versions:

- Keye-VL-8B-Preview: a whole video is one block; frame i has t = start + floor(i * seconds * rate).
- Keye-VL-1.5: every frame is its own block with t = start; time advances through the
  timestamp text between the frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from keye_ops.model.config import KeyeConfig

Grid = Sequence[Sequence[int]] | torch.Tensor
# One vision block: number of tokens, and its (t, h, w) ids counted from the block's start, [3, n].
Block = np.ndarray


def get_rope_index(
    input_ids: torch.Tensor,
    config: KeyeConfig,
    *,
    image_grid_thw: Grid | None = None,
    video_grid_thw: Grid | None = None,
    attention_mask: torch.Tensor | None = None,
    second_per_grid_ts: Sequence[float] | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary positions of a batch of prompts, by the rule of `config.version`.

    The ids are read on the host: call it once a prompt, not once a token.

    Args:
        input_ids: integer [B, L] with one pad token for every merged vision token.
        config: gives the version, the pad token ids, the merge size and tokens_per_second.
        image_grid_thw: (t, h, w) of every image in patches, in prompt order over the batch.
        video_grid_thw: the same for videos. For 1.5 a row may be one frame or a whole video;
            rows with t > 1 are split into frames.
        attention_mask: [B, L], 1 for tokens and 0 for padding at any place.
        second_per_grid_ts: seconds between the frames of each video (Preview only; default 1).

    Returns:
        position_ids int64 [3, B, L] (padding keeps 1) and deltas int64 [B, 1] with
        delta = largest id + 1 - L, both on the device of `input_ids`.

    Raises:
        ValueError: a grid the merge size does not divide, or vision tokens that do not fit it.
    """
    if input_ids.dim() != 2:
        raise ValueError(f"get_rope_index: input_ids must be [B, L], got {list(input_ids.shape)}")
    rule = {"preview": preview_blocks, "1.5": frame_blocks}[config.version]
    images, videos = rule(config, image_grid_thw, video_grid_thw, second_per_grid_ts)
    position_ids, deltas = _walk(input_ids, attention_mask, config, images, videos)
    device = input_ids.device
    return torch.from_numpy(position_ids).to(device), torch.from_numpy(deltas).to(device)


def preview_blocks(
    config: KeyeConfig,
    image_grid_thw: Grid | None,
    video_grid_thw: Grid | None,
    second_per_grid_ts: Sequence[float] | torch.Tensor | None = None,
) -> tuple[list[Block], list[Block]]:
    """The blocks of Keye-VL-8B-Preview: one an image, one a video."""
    merge, rate = config.vision.spatial_merge_size, config.vision.tokens_per_second
    videos = _rows("video_grid_thw", video_grid_thw)
    if second_per_grid_ts is None:
        seconds = [1.0] * len(videos)
    else:
        seconds = [float(value) for value in second_per_grid_ts]
    if len(seconds) != len(videos):
        raise ValueError(
            "get_rope_index: second_per_grid_ts must have one value per row of video_grid_thw "
            f"({len(videos)}), got {len(seconds)}"
        )
    return (
        [_block(row, merge) for row in _rows("image_grid_thw", image_grid_thw)],
        [_block(row, merge, second, rate) for row, second in zip(videos, seconds, strict=True)],
    )


def frame_blocks(
    config: KeyeConfig,
    image_grid_thw: Grid | None,
    video_grid_thw: Grid | None,
    second_per_grid_ts: Sequence[float] | torch.Tensor | None = None,
) -> tuple[list[Block], list[Block]]:
    """The blocks of Keye-VL-1.5: one a frame, of images and videos alike; seconds are not used."""
    merge = config.vision.spatial_merge_size

    def split(name: str, grid: Grid | None) -> list[Block]:
        blocks = []
        for t, h, w in _rows(name, grid):
            blocks += [_block((1, h, w), merge)] * t
        return blocks

    return split("image_grid_thw", image_grid_thw), split("video_grid_thw", video_grid_thw)


def _rows(name: str, grid: Grid | None) -> list[tuple[int, int, int]]:
    """A grid argument as host integers."""
    if grid is None:
        return []
    rows = grid.tolist() if isinstance(grid, torch.Tensor) else grid
    for row in rows:
        if len(row) != 3 or min(row) < 1:
            raise ValueError(
                f"get_rope_index: {name} rows must be three positive ints, got {list(row)}"
            )
    return [(int(t), int(h), int(w)) for t, h, w in rows]


def _block(
    grid: tuple[int, int, int], merge: int, seconds: float = 0.0, rate: float = 0.0
) -> Block:
    """Ids of one merged grid relative to its start, int64 [3, t * h/merge * w/merge]."""
    t, h, w = grid
    if h % merge or w % merge:
        raise ValueError(
            f"get_rope_index: grid height and width must be multiples of {merge}, got {grid}"
        )
    ids = np.indices((t, h // merge, w // merge)).reshape(3, -1)
    # fp32 as in the published model: 3 * (1/3) must floor to the same frame time.
    ids[0] = (ids[0].astype(np.float32) * np.float32(seconds) * np.float32(rate)).astype(np.int64)
    return ids


def _walk(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    config: KeyeConfig,
    images: list[Block],
    videos: list[Block],
) -> tuple[np.ndarray, np.ndarray]:
    """Lay text runs and blocks one after the other in every prompt."""
    tokens = input_ids.detach().cpu().numpy()
    mask = np.ones(tokens.shape, bool)
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                "get_rope_index: attention_mask must have the shape of input_ids "
                f"{list(input_ids.shape)}, got {list(attention_mask.shape)}"
            )
        mask = attention_mask.detach().cpu().numpy() != 0
    position_ids = np.ones((3, *tokens.shape), np.int64)
    deltas = np.empty((tokens.shape[0], 1), np.int64)
    kinds = (("image", config.image_token_id, images), ("video", config.video_token_id, videos))
    left = {token: _Queue(name, blocks) for name, token, blocks in kinds}
    for sample in range(tokens.shape[0]):
        ids = _sample_ids(tokens[sample][mask[sample]], left)
        position_ids[:, sample, mask[sample]] = ids
        deltas[sample] = ids.max(initial=-1) + 1 - tokens.shape[1]
    for queue in left.values():
        queue.check_empty()
    return position_ids, deltas


class _Queue:
    """The blocks of one kind that the prompts have not used yet."""

    def __init__(self, name: str, blocks: list[Block]) -> None:
        self.name, self.total, self.blocks = name, len(blocks), iter(blocks)
        self.used = 0

    def take(self, tokens: np.ndarray, start: int) -> Block:
        block = next(self.blocks, None)
        if block is None:
            raise ValueError(
                f"get_rope_index: the prompt has {self.name} tokens beyond the {self.total} "
                f"blocks of {self.name}_grid_thw"
            )
        run = tokens[start : start + block.shape[1]]
        found = int((run == tokens[start]).sum())
        if found != block.shape[1]:
            raise ValueError(
                f"get_rope_index: {self.name} block {self.used} needs {block.shape[1]} tokens, "
                f"the prompt has {found}"
            )
        self.used += 1
        return block

    def check_empty(self) -> None:
        if self.used != self.total:
            raise ValueError(
                f"get_rope_index: {self.name}_grid_thw describes {self.total} blocks, "
                f"the prompts use {self.used}"
            )


def _sample_ids(tokens: np.ndarray, left: dict[int, _Queue]) -> np.ndarray:
    """Ids [3, n] of one prompt without its padding."""
    vision = np.flatnonzero(np.isin(tokens, list(left)))
    parts, done, next_id = [], 0, 0
    while (place := np.searchsorted(vision, done)) < vision.size:
        start = int(vision[place])
        text = start - done
        block = left[int(tokens[start])].take(tokens, start) + (next_id + text)
        parts += [_text_ids(next_id, text), block]
        done, next_id = start + block.shape[1], int(block.max()) + 1
    parts.append(_text_ids(next_id, tokens.size - done))
    return np.concatenate(parts, axis=1)


def _text_ids(start: int, length: int) -> np.ndarray:
    return np.broadcast_to(np.arange(start, start + length), (3, length))
