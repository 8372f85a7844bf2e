"""``keye-ops generate`` and ``keye-ops make-checkpoint``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from keye_ops.device import resolve_device

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_commands(commands: Any) -> None:
    """Add both commands to the parser."""
    text = "Answer a prompt about images and videos with a checkpoint."
    command = commands.add_parser("generate", help=text, description=text)
    command.add_argument("--checkpoint", required=True, metavar="DIR", type=Path)
    command.add_argument("--image", action="append", default=[], metavar="FILE", type=Path)
    command.add_argument("--video", action="append", default=[], metavar="FILE", type=Path)
    command.add_argument("--prompt", required=True)
    command.add_argument("--max-new-tokens", type=int, default=256)
    command.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--seed", type=int, help="makes sampling reproducible")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's")
    command.set_defaults(run=run_generate)

    text = "Write a random checkpoint in the true file formats, to try everything without weights."
    command = commands.add_parser("make-checkpoint", help=text, description=text)
    command.add_argument("folder", metavar="DIR", type=Path)
    command.add_argument("--tiny", action="store_true", required=True, help="a few megabytes")
    command.add_argument("--version", choices=("preview", "1.5"), default="1.5")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=run_make_checkpoint)


def conversation(images: list[Any], videos: list[Any], prompt: str) -> list[dict[str, Any]]:
    """One user message with its media first."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    content += [{"type": "video", "video": video} for video in videos]
    return [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]


def run_generate(arguments: argparse.Namespace) -> int:
    """Stream the answer to stdout."""
    from keye_ops.model import generate, load_checkpoint
    from keye_ops.processing import KeyeProcessor

    device = resolve_device(arguments.device)
    for path in (*arguments.image, *arguments.video):
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
    processor = KeyeProcessor.from_pretrained(arguments.checkpoint)
    inputs = processor(
        conversation(arguments.image, arguments.video, arguments.prompt), progress=True
    )
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    model = load_checkpoint(arguments.checkpoint, dtype=dtype, device=device)
    print_token = TokenPrinter(processor)
    generate(
        model,
        inputs,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        stop_token_ids=processor.stop_token_ids,
        seed=arguments.seed,
        callback=print_token,
    )
    print()
    return 0


class TokenPrinter:
    """Prints an answer as it grows, whole characters at a time."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._ids: list[int] = []
        self._printed = ""

    def __call__(self, token_ids: list[int | None]) -> None:
        """Take the next token of the only conversation."""
        self._ids += [i for i in token_ids[:1] if i is not None]
        text = self._processor.decode(self._ids)
        # A character of several tokens decodes to the replacement character until it is whole.
        if text.startswith(self._printed) and not text.endswith("\ufffd"):
            sys.stdout.write(text[len(self._printed) :])
            sys.stdout.flush()
            self._printed = text


def run_make_checkpoint(arguments: argparse.Namespace) -> int:
    """Write the tiny checkpoint and say where."""
    from keye_ops.model import make_tiny_checkpoint

    folder = make_tiny_checkpoint(arguments.folder, version=arguments.version, seed=arguments.seed)
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    print(f"{folder}: Keye-VL {arguments.version}, random weights, {size / 1e6:.1f} MB")
    return 0
