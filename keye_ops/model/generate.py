"""Generation: greedy, or sampled with a temperature and top-p, for a batch of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from keye_ops.model.keye import KeyeModel

_FORWARD_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "attention_mask",
    "second_per_grid_ts",
)


@torch.no_grad()
def generate(
    model: KeyeModel,
    inputs: Mapping[str, Any] | object,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_token_ids: Sequence[int] | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[list[int | None]], None] | None = None,
) -> list[list[int]]:
    """Continue a batch of prompts of any lengths.

    A prompt that has met a stop token costs nothing from then on.

    Args:
        model: runs the prompt once, then one token a step with a key/value cache.
        inputs: a mapping (or object with attributes) of `KeyeModel.forward`'s arguments: input_ids
            [B, L], and where needed attention_mask, pixel_values, image_grid_thw,
            pixel_values_videos, video_grid_thw, second_per_grid_ts. Other entries are ignored.
        max_new_tokens: upper limit for every prompt.
        temperature: 0 takes the most likely token; above 0 divides the logits before sampling.
        top_p: sample among the most likely tokens whose probabilities just reach this sum.
        stop_token_ids: end a prompt's answer; the configuration's eos tokens by default.
        seed: makes sampling reproducible; or give a `generator` on the model's device.
        callback: called after every step with one token id a prompt, None for finished ones.

    Returns:
        The new tokens of every prompt; an answer that was not cut off ends with its stop token.

    Raises:
        ValueError: options out of range, inputs without input_ids, or a prompt without tokens.
    """
    _check_options(max_new_tokens, temperature, top_p, seed, generator)
    input_ids = _entry(inputs, "input_ids")
    if input_ids is None:
        raise ValueError("generate: inputs must hold input_ids, got none")
    if seed is not None:
        generator = torch.Generator(model.device).manual_seed(seed)
    stops = set(model.config.eos_token_ids if stop_token_ids is None else stop_token_ids)

    batch_size, length = input_ids.shape
    answers: list[list[int]] = [[] for _ in range(batch_size)]
    if max_new_tokens == 0 or batch_size == 0:
        return answers
    arguments = {name: _entry(inputs, name) for name in _FORWARD_INPUTS}
    _check_prompts(length, arguments["attention_mask"])
    cache = model.new_cache(batch_size, length + max_new_tokens)
    logits = model(input_ids, cache=cache, last_logits_only=True, **arguments)
    active = [True] * batch_size
    for step in range(max_new_tokens):
        tokens = _choose(logits[:, 0], temperature, top_p, generator)
        host_tokens = tokens.tolist()
        for b in range(batch_size):
            if active[b]:
                answers[b].append(host_tokens[b])
        if callback is not None:
            callback([t if on else None for t, on in zip(host_tokens, active, strict=True)])
        active = [on and t not in stops for t, on in zip(host_tokens, active, strict=True)]
        if not any(active) or step + 1 == max_new_tokens:
            break
        # A finished prompt is padding, so it is not computed. The mask stays on the host.
        logits = model(
            tokens[:, None],
            attention_mask=torch.tensor(active)[:, None],
            cache=cache,
            last_logits_only=True,
        )
    return answers


def _choose(
    logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> torch.Tensor:
    """One token id a row of [B, vocab_size] logits."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    # A token stays if those before it do not reach top_p yet, so the first always stays.
    ordered[ordered.cumsum(dim=-1) - ordered >= top_p] = 0
    choice = torch.multinomial(ordered, 1, generator=generator)
    return ids.gather(-1, choice)[:, 0]


def _entry(inputs: Mapping[str, Any] | object, name: str) -> Any:
    return inputs.get(name) if isinstance(inputs, Mapping) else getattr(inputs, name, None)


def _check_options(
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    generator: torch.Generator | None,
) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be >= 0, got {max_new_tokens}")
    if not temperature >= 0:
        raise ValueError(f"generate: temperature must be >= 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be above 0 and at most 1, got {top_p}")
    if seed is not None and generator is not None:
        raise ValueError(f"generate: give a seed or a generator, got both (seed {seed})")


def _check_prompts(length: int, attention_mask: torch.Tensor | None) -> None:
    empty = attention_mask is not None and not attention_mask.any(dim=1).all()
    if length == 0 or empty:
        raise ValueError("generate: every prompt must have at least one token, got an empty one")
