"""From chat messages to everything that the model's forward takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keye_ops.json_file import read_json
from keye_ops.model_version import Version
from keye_ops.processing.clip import VideoOptions, VideoPatches
from keye_ops.processing.config import ProcessingConfig, existing_folder
from keye_ops.processing.decode import Progress
from keye_ops.processing.image import ImagePatches, process_image
from keye_ops.processing.messages import Media, Message, split_messages
from keye_ops.processing.prompt import (
    FAST_END,
    FAST_START,
    FRAME,
    IMAGE_PAD,
    VIDEO_PAD,
    clip_text,
    expand_placeholders,
    frames_text,
    load_chat_template,
    render_chat,
)
from keye_ops.processing.tokenizer import KeyeTokenizer
from keye_ops.processing.video import process_video

_STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True)
class KeyeInputs:
    """A batch ready for the model.

    input_ids, attention_mask: int64 [B, L], padded on the left; the mask is 0 on padding.
    pixel_values: float32 [N, 3, 14, 14] of all images, or None.
    image_grid_thw: int64 [num_images, 3], or None.
    pixel_values_videos: the same of all videos; video_grid_thw: int64 [rows, 3], a row a video
        (Keye-VL-8B-Preview) or a row a frame (Keye-VL-1.5).
    second_per_grid_ts: float32 [num_videos], Preview only.
    prompts: the expanded text of each conversation.
    images, videos: grids, timestamps and slow/fast flags, in order of appearance; their
        pixel_values are views of the tensors above.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    pixel_values_videos: Tensor | None
    video_grid_thw: Tensor | None
    second_per_grid_ts: Tensor | None
    prompts: tuple[str, ...]
    images: tuple[ImagePatches, ...]
    videos: tuple[VideoPatches, ...]

    def model_inputs(self) -> dict[str, Tensor]:
        """The tensors that are present, by the names of the model's forward."""
        names = (
            "input_ids",
            "attention_mask",
            "pixel_values",
            "image_grid_thw",
            "pixel_values_videos",
            "video_grid_thw",
            "second_per_grid_ts",
        )
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class KeyeProcessor:
    """Chat template, tokenizer and media processing of one checkpoint."""

    def __init__(
        self,
        config: ProcessingConfig,
        tokenizer: KeyeTokenizer,
        chat_template: str,
        stop_token_ids: tuple[int, ...],
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.stop_token_ids = stop_token_ids
        needed = (IMAGE_PAD, VIDEO_PAD, "<|vision_start|>", "<|vision_end|>")
        for token in (
            needed if config.version == "preview" else (*needed, FRAME, FAST_START, FAST_END)
        ):
            tokenizer.token_id(token)

    @classmethod
    def from_pretrained(cls, folder: str | Path, version: Version | None = None) -> KeyeProcessor:
        """Read tokenizer, chat template, image settings and stop tokens of a checkpoint folder.

        Args:
            folder: holds ``tokenizer.json``; ``config.json`` (unless ``version`` is given),
                ``preprocessor_config.json``, ``chat_template.*``, ``tokenizer_config.json`` and
                ``generation_config.json`` are read where they exist.
            version: "preview" or "1.5"; None reads it from ``config.json``.

        Raises:
            FileNotFoundError: the folder or a needed file is missing.
            ValueError: a broken file, an unknown version, or a tokenizer without a needed special
                token.
            ImportError: a needed package is missing.
        """
        folder = existing_folder("KeyeProcessor.from_pretrained", folder)
        config = ProcessingConfig.from_pretrained(folder, version)
        tokenizer = KeyeTokenizer.from_pretrained(folder)
        return cls(config, tokenizer, load_chat_template(folder), _stop_ids(folder, tokenizer))

    def __call__(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        add_generation_prompt: bool = True,
        progress: Progress = None,
        **template_variables: Any,
    ) -> KeyeInputs:
        """Process one conversation, or several of different lengths.

        Args:
            messages: one conversation (a list of messages, see :func:`split_messages`) or a list
                of them.
            add_generation_prompt: end each prompt with the opening of the assistant's turn.
            progress: as in :func:`process_video`, for each video.
            **template_variables: for the chat template, such as ``enable_thinking=False``.

        Raises:
            ValueError: malformed messages, unreadable media, or a text that contains a placeholder
                token.
            FileNotFoundError: a named file is missing.
        """
        batch = [messages] if not messages or isinstance(messages[0], dict) else list(messages)
        images: list[ImagePatches] = []
        videos: list[VideoPatches] = []
        prompts = []
        for conversation in batch:
            bare, media = split_messages(conversation)
            text = render_chat(
                bare,
                self.chat_template,
                add_generation_prompt=add_generation_prompt,
                **template_variables,
            )
            new_images = [self._image(item) for item in media if item.kind == "image"]
            new_videos = [self._video(item, progress) for item in media if item.kind == "video"]
            text = expand_placeholders(text, IMAGE_PAD, [self._image_text(i) for i in new_images])
            text = expand_placeholders(text, VIDEO_PAD, [self._video_text(v) for v in new_videos])
            prompts.append(text)
            images += new_images
            videos += new_videos
        input_ids, attention_mask = self._pad([self.tokenizer.encode(text) for text in prompts])
        pixel_values, images = _join(images)
        pixel_values_videos, videos = _join(videos)
        seconds = None
        if videos and self.config.version == "preview":
            seconds = torch.tensor([1 / video.fps for video in videos], dtype=torch.float32)
        return KeyeInputs(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_grid_thw=torch.tensor([i.grid_thw for i in images]) if images else None,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=torch.tensor([row for v in videos for row in v.grid_thw])
            if videos
            else None,
            second_per_grid_ts=seconds,
            prompts=tuple(prompts),
            images=tuple(images),
            videos=tuple(videos),
        )

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of generated token ids."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def _image(self, item: Media) -> ImagePatches:
        return process_image(item.source, self.config, **item.options)

    def _video(self, item: Media, progress: Progress) -> VideoPatches:
        options = VideoOptions(**item.options)
        return process_video(item.source, self.config, options, progress=progress)

    def _image_text(self, image: ImagePatches) -> str:
        return clip_text(IMAGE_PAD, image.grid_thw, merge_size=self.config.merge_size)

    def _video_text(self, video: VideoPatches) -> str:
        merge_size = self.config.merge_size
        if self.config.version == "preview":
            return clip_text(VIDEO_PAD, video.grid_thw[0], merge_size=merge_size)
        return frames_text(video.grid_thw, video.is_fast, video.timestamps, merge_size=merge_size)

    def _pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Left padding to the longest row."""
        length = max(map(len, rows))
        pad = 0 if all(len(row) == length for row in rows) else self.tokenizer.pad_token_id
        input_ids = torch.full((len(rows), length), pad, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, length - len(row) :] = torch.tensor(row, dtype=torch.int64)
            attention_mask[index, length - len(row) :] = 1
        return input_ids, attention_mask


def _join(media: list[Any]) -> tuple[Tensor | None, list[Any]]:
    """One tensor of all patches, and the media with views of it in place of their own tensors."""
    if not media:
        return None, []
    if len(media) == 1:
        return media[0].pixel_values, media
    joined = torch.cat([item.pixel_values for item in media])
    views = joined.split([item.pixel_values.shape[0] for item in media])
    return joined, [
        item._replace(pixel_values=view) for item, view in zip(media, views, strict=True)
    ]


def _stop_ids(folder: Path, tokenizer: KeyeTokenizer) -> tuple[int, ...]:
    """Stop ids that ``generation_config.json`` states, else those that end a turn and a text."""
    path = folder / "generation_config.json"
    stated = read_json(path).get("eos_token_id") if path.is_file() else None
    if stated is not None:
        return tuple(stated) if isinstance(stated, list) else (stated,)
    return tuple(tokenizer.token_id(token) for token in _STOP_TOKENS)
