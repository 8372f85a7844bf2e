"""Chat messages in the usual form: checking them, and finding the images and videos in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from keye_ops.processing.clip import VideoOptions

Message = dict[str, Any]

_IMAGE_OPTIONS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
_VIDEO_OPTIONS = tuple(field.name for field in fields(VideoOptions))
_VIDEO_ALIASES = {"nframes": "num_frames", "video_total_pixels": "total_pixels"}


class Media(NamedTuple):
    """One image or video of a message, with the options given beside it."""

    kind: str
    source: Any
    options: dict[str, Any]


def split_messages(messages: Sequence[Message]) -> tuple[list[Message], list[Media]]:
    """Separate the media from the messages.

    Args:
        messages: dicts with ``role`` and ``content``, the latter a string or a list of parts
            ``{"type": "text", "text": str}``, ``{"type": "image", "image": source, **options}`` or
            ``{"type": "video", "video": source, **options}``. Image options are ``min_pixels``,
            ``max_pixels``, ``resized_height`` and ``resized_width``; video options are the fields
            of :class:`VideoOptions`, ``nframes`` and ``video_total_pixels`` also being understood.

    Returns:
        the messages with bare parts for the chat template, and the media in order.

    Raises:
        ValueError: a message, part or option of another form.
    """
    if not messages:
        raise ValueError("split_messages: a conversation needs at least one message, got none")
    bare: list[Message] = []
    media: list[Media] = []
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"split_messages: a message needs role and content, got {message!r}")
        content = message["content"]
        if not isinstance(content, str):
            content = [_split_part(part, media) for part in content]
        bare.append({**message, "content": content})
    return bare, media


def _split_part(part: Any, media: list[Media]) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise ValueError(f"split_messages: a part of content must be a dict, got {part!r}")
    kind = part.get("type") or next((k for k in ("image", "video", "text") if k in part), None)
    if kind not in ("image", "video", "text") or kind not in part:
        raise ValueError(
            "split_messages: a part needs type 'text', 'image' or 'video' and a field of that "
            f"name, got type {part.get('type')!r} with fields {sorted(part)}"
        )
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    allowed = _IMAGE_OPTIONS if kind == "image" else _VIDEO_OPTIONS
    options = {}
    for name, value in part.items():
        if name in ("type", kind):
            continue
        option = _VIDEO_ALIASES.get(name, name) if kind == "video" else name
        if option not in allowed:
            raise ValueError(
                f"split_messages: unknown option {name!r} of a part of type {kind!r}; "
                f"known are {', '.join(allowed)}"
            )
        options[option] = value
    media.append(Media(kind, part[kind], options))
    return {"type": kind}
