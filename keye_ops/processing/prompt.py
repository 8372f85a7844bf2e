"""Chat messages to prompt text, with one placeholder for every merged row of the media."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keye_ops.json_file import read_json
from keye_ops.processing.config import existing_folder

IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"
FRAME = "<|frame|>"
FAST_START = "<|fast_start|>"
FAST_END = "<|fast_end|>"

DEFAULT_CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
  {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- else -%}
    {%- for part in message.content -%}
      {%- if part.type == 'image' -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- elif part.type == 'video' -%}
        {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
      {%- else -%}
        {{- part.text -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def load_chat_template(folder: str | Path) -> str:
    """The checkpoint's chat template.

    Looked for in ``chat_template.jinja``, ``chat_template.json`` and ``tokenizer_config.json``, in
    this order, because the last one can be for text only where there are two. Without any, a
    template of the form of Keye-VL-8B-Preview's is returned.
    """
    folder = existing_folder("load_chat_template", folder)
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        return plain.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        template = read_json(path).get("chat_template") if path.is_file() else None
        if isinstance(template, list):
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default")
        if template:
            return template
    return DEFAULT_CHAT_TEMPLATE


def render_chat(
    messages: Sequence[dict[str, Any]],
    template: str = DEFAULT_CHAT_TEMPLATE,
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """Render messages with a chat template in jinja2's sandbox.

    Args:
        messages: dicts with ``role`` and ``content``; content is a string or a list of
            ``{"type": "text", "text": ...}``, ``{"type": "image"}`` and ``{"type": "video"}``.
        template: jinja2 source.
        add_generation_prompt: end with the opening of the assistant's turn.
        **variables: anything else that the template reads, such as ``enable_thinking``.

    Raises:
        ValueError: the template is broken or refuses the messages.
        ImportError: jinja2 is missing.
    """
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError('chat templates need jinja2: pip install "keye-ops[model]"') from error

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **variables
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(f"render_chat: the chat template failed ({error})") from error


def expand_placeholders(prompt: str, token: str, replacements: Sequence[str]) -> str:
    """Replace the occurrences of ``token``, in order, by ``replacements``.

    Raises:
        ValueError: their numbers differ, for example because a text contains the token itself.
    """
    parts = prompt.split(token)
    if len(parts) - 1 != len(replacements):
        raise ValueError(
            f"expand_placeholders: the prompt has {len(parts) - 1} times {token}, "
            f"but {len(replacements)} media were given"
        )
    pieces = [parts[0]]
    for replacement, part in zip(replacements, parts[1:], strict=True):
        pieces += (replacement, part)
    return "".join(pieces)


def clip_text(token: str, grid_thw: Sequence[int], *, merge_size: int = 2) -> str:
    """``t*h*w / merge_size^2`` times ``token``: an image, or a video of Keye-VL-8B-Preview."""
    t, h, w = grid_thw
    if h % merge_size or w % merge_size:
        raise ValueError(
            f"clip_text: h and w must be multiples of {merge_size}, got {tuple(grid_thw)}"
        )
    return token * (t * h * w // merge_size**2)


def frames_text(
    grid_thw: Sequence[Sequence[int]],
    is_fast: Sequence[bool],
    timestamps: Sequence[float] | None,
    *,
    merge_size: int = 2,
) -> str:
    """The text of a video of Keye-VL-1.5.

    For each frame: the frame token, its second with one decimal, and its placeholders, which for a
    fast frame stand between the fast-start and fast-end tokens.

    Args:
        grid_thw: a row (1, h, w) a frame.
        is_fast: a flag a frame.
        timestamps: seconds, one a frame; None leaves them out.
        merge_size: patches per side of a merged token.
    """
    lengths = {len(grid_thw), len(is_fast), len(grid_thw if timestamps is None else timestamps)}
    if len(lengths) != 1:
        raise ValueError(
            "frames_text: grid_thw, is_fast and timestamps must have one entry a frame, got "
            f"{len(grid_thw)}, {len(is_fast)} and {timestamps and len(timestamps)}"
        )
    pieces = []
    for index, (grid, fast) in enumerate(zip(grid_thw, is_fast, strict=True)):
        pads = clip_text(VIDEO_PAD, grid, merge_size=merge_size)
        second = "" if timestamps is None else format(timestamps[index], ".1f")
        pieces.append(FRAME + second + (FAST_START + pads + FAST_END if fast else pads))
    return "".join(pieces)
