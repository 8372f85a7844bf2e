"""A tiny random checkpoint in the true file formats, for tests and trials without a download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from keye_ops.model.config import KeyeConfig
from keye_ops.model.init import init_random
from keye_ops.model.keye import KeyeModel
from keye_ops.model_version import check_version

_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<think>",
    "</think>",
    "<|point_start|>",
    "<|point_end|>",
    "<|ocr_text_start|>",
    "<|ocr_text_end|>",
    "<|clip_time_start|>",
    "<|clip_time_end|>",
)
_FRAME_TOKENS = ("<|frame|>", "<|fast_start|>", "<|fast_end|>")  # Keye-VL-1.5 alone
_NUM_BYTES = 256

_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' -%}
{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- else -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


def make_tiny_checkpoint(folder: str | Path, *, version: str = "1.5", seed: int = 0) -> Path:
    """Write a checkpoint folder of about 3 MB with random bf16 weights.

    It holds config.json, generation_config.json, preprocessor_config.json, tokenizer.json and
    tokenizer_config.json (a byte-level tokenizer with the special tokens and a chat template), and
    two safetensors shards with their index. Head sizes are the real ones (72 and 128).

    Args:
        folder: created if needed; files of the same names are replaced.
        version: "preview" (Keye-VL-8B-Preview) or "1.5" (Keye-VL-1.5).
        seed: of the weights.

    Returns:
        The folder.

    Raises:
        ValueError: another version.
        ImportError: safetensors or tokenizers is not installed.
    """
    check_version("make_tiny_checkpoint", version)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = _SPECIAL_TOKENS + (_FRAME_TOKENS if version == "1.5" else ())
    token_ids = {name: _NUM_BYTES + i for i, name in enumerate(names)}
    fields = _config_fields(version, token_ids)
    _write_json(folder / "config.json", fields)
    _write_json(
        folder / "generation_config.json",
        {
            "eos_token_id": [token_ids["<|im_end|>"], token_ids["<|endoftext|>"]],
            "pad_token_id": token_ids["<|endoftext|>"],
        },
    )
    _write_json(
        folder / "preprocessor_config.json",
        {
            "min_pixels": 4 * 28 * 28,
            "max_pixels": 64 * 28 * 28,
            "patch_size": 14,
            "temporal_patch_size": 1,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    )
    _write_tokenizer(folder, token_ids)
    model = init_random(KeyeModel(KeyeConfig.from_dict(fields)).bfloat16(), seed)
    _write_shards(folder, model)
    return folder


def _config_fields(version: str, token_ids: dict[str, int]) -> dict[str, Any]:
    """A config.json with every size reduced but the heads'."""
    preview = version == "preview"
    fields = {
        "architectures": [
            "KeyeForConditionalGeneration" if preview else "KeyeVL1_5ForConditionalGeneration"
        ],
        "model_type": "Keye" if preview else "KeyeVL1_5",
        "attention_bias": False,
        "bos_token_id": token_ids["<|endoftext|>"],
        "eos_token_id": token_ids["<|im_end|>"],
        "vision_start_token_id": token_ids["<|vision_start|>"],
        "vision_end_token_id": token_ids["<|vision_end|>"],
        "image_token_id": token_ids["<|image_pad|>"],
        "video_token_id": token_ids["<|video_pad|>"],
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 128,
        "intermediate_size": 256,
        "max_position_embeddings": 40960,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000 if preview else 8000000,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 320,
        "vision_config": {
            "hidden_size": 144,
            "image_size": 384,
            "intermediate_size": 288,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
        },
    }
    return fields


def _write_tokenizer(folder: Path, token_ids: dict[str, int]) -> None:
    """A byte-level BPE without merges: every byte is a token, so any text round-trips."""
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ImportError as error:
        raise ImportError(
            'make_tiny_checkpoint needs tokenizers: pip install "keye-ops[model]"'
        ) from error
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in token_ids])
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(i): {"content": name, "normalized": False, "special": True}
        for name, i in token_ids.items()
    }
    _write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": added,
            "chat_template": _CHAT_TEMPLATE,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "Qwen2Tokenizer",
        },
    )


def _write_shards(folder: Path, model: KeyeModel) -> None:
    """Two shards of similar size, with the unused vision weights that released files carry."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(
            'make_tiny_checkpoint needs safetensors: pip install "keye-ops[model]"'
        ) from error
    tensors = {name: t.clone() for name, t in sorted(model.state_dict().items())}
    channels = model.config.vision.hidden_size
    unused = {"head.probe": (1, 1, channels), "head.layernorm.weight": (channels,)}
    unused["embeddings.packing_position_embedding.weight"] = (64, channels)
    for name, shape in unused.items():
        tensors[f"visual.vision_model.{name}"] = torch.ones(shape, dtype=torch.bfloat16)

    total = sum(t.nbytes for t in tensors.values())
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    written = 0
    for name, tensor in tensors.items():
        shards[0 if written < total / 2 else 1][name] = tensor
        written += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
