"""Small models and prompts that the model tests share."""

from __future__ import annotations

from dataclasses import replace

import torch

from keye_ops.model import KeyeConfig, KeyeModel, TextConfig, VisionConfig, init_random

IMAGE, VIDEO, START, END, EOS = 90, 91, 92, 93, 94
FIRST_SPECIAL = 90

VISION = VisionConfig(
    hidden_size=144,
    intermediate_size=96,
    num_hidden_layers=2,
    num_heads=2,
    image_size=112,  # an 8 x 8 position table
    segment="frame",
)
TEXT = TextConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    mrope_section=(4, 6, 6),
)


def make_config(version="1.5", **text):
    return KeyeConfig(
        version=version,
        vision=replace(VISION, segment="clip" if version == "preview" else "frame"),
        text=replace(TEXT, **text),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        eos_token_ids=(EOS,),
    )


def randomise(module, seed=0):
    """init_random plus norm weights and biases that differ from one and zero."""
    init_random(module, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * noise.to(parameter.dtype))
    return module


def make_model(version="1.5", seed=0, dtype=torch.float32, **text):
    return randomise(KeyeModel(make_config(version, **text)).to(dtype), seed).eval()


def patches(grids, seed=0, dtype=torch.float32):
    total = sum(t * h * w for t, h, w in grids)
    # Another stream than the weights': their first tensor would otherwise be these very numbers.
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(total, 3, 14, 14, generator=generator).to(dtype)


def text_ids(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, FIRST_SPECIAL, (length,), generator=generator).tolist()


def vision_ids(token, grids, merge=2):
    """One vision_start, pads, vision_end run an image or clip."""
    return [i for t, h, w in grids for i in [START] + [token] * (t * h * w // merge**2) + [END]]


def relative_error(got, want):
    got, want = got.detach(), want.detach()
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())
