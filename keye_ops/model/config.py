"""Keye-VL configurations, read from the config.json of a Hugging Face checkpoint folder.

Shapes, eps, rope bases and token ids come from the file. A field that would silently change the
result when it is absent (sizes, eps, rope base, mrope sections, token ids) is required; defaults
exist only for the fields that released files leave out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keye_ops.json_file import read_json
from keye_ops.model.config_fields import FieldReader
from keye_ops.model_version import Version, model_names, version_of

# PaddleOCR-VL shares the vision tower (same names, one attention segment per frame), nothing else.
_VISION_ONLY_NAMES = ("PaddleOCRVLForConditionalGeneration", "paddleocr_vl")
_PADDLEOCR_VISION_SIZES = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
}


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower: a SigLIP-shaped encoder with 2-D rotary positions."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_heads: int
    image_size: int
    segment: str  # what attends jointly: "clip" (Keye-VL-8B-Preview) or "frame" (1.5, PaddleOCR-VL)
    patch_size: int = 14
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    spatial_merge_size: int = 2
    tokens_per_second: float = 2.0

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def position_table_size(self) -> int:
        """Side of the square table of learned positions (27 for 384-pixel images)."""
        return self.image_size // self.patch_size

    @classmethod
    def from_dict(
        cls, fields: dict[str, Any], *, segment: str, where: str = "vision_config"
    ) -> VisionConfig:
        """Read the `vision_config` part of a config.json; `where` names it in errors."""
        read = FieldReader(fields, where)
        activation = read.text("hidden_act", default="gelu_pytorch_tanh")
        if activation != "gelu_pytorch_tanh":
            read.fail("hidden_act", "gelu_pytorch_tanh", activation)
        config = cls(
            hidden_size=read.size("hidden_size"),
            intermediate_size=read.size("intermediate_size"),
            num_hidden_layers=read.size("num_hidden_layers"),
            num_heads=read.size("num_attention_heads"),
            image_size=read.size("image_size"),
            segment=segment,
            patch_size=read.size("patch_size", default=14),
            num_channels=read.size("num_channels", default=3),
            layer_norm_eps=read.number("layer_norm_eps", default=1e-6),
            rope_theta=_rope_field(read, "rope_theta", default=10000.0),
            spatial_merge_size=read.size("spatial_merge_size", default=2),
            tokens_per_second=read.number("tokens_per_second", default=2.0),
        )
        if config.hidden_size % (4 * config.num_heads):
            read.fail(
                "hidden_size",
                f"a multiple of 4 * num_attention_heads = {4 * config.num_heads}",
                config.hidden_size,
            )
        if config.position_table_size == 0:
            read.fail("image_size", f"at least patch_size = {config.patch_size}", config.image_size)
        return config

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VisionConfig:
        """Read `folder`/config.json of a Keye-VL or PaddleOCR-VL checkpoint."""
        fields, where = _read_config_file(folder)
        if any(name in _VISION_ONLY_NAMES for name in model_names(fields, where)):
            vision = _PADDLEOCR_VISION_SIZES | FieldReader(fields, where).table("vision_config")
            return cls.from_dict(vision, segment="frame", where=f"{where}: vision_config")
        return KeyeConfig.from_dict(fields, where=where).vision


@dataclass(frozen=True)
class TextConfig:
    """The Qwen3 text model with multimodal (t, h, w) rotary positions."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    mrope_interleaved: bool = False
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768

    @classmethod
    def from_dict(cls, fields: dict[str, Any], *, where: str = "text_config") -> TextConfig:
        """Read the text fields of a config.json; `where` names it in errors."""
        read = FieldReader(fields, where)
        _require_supported_text(read)
        num_heads = read.size("num_attention_heads")
        hidden_size = read.size("hidden_size")
        config = cls(
            vocab_size=read.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=read.size("intermediate_size"),
            num_hidden_layers=read.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=read.size("num_key_value_heads"),
            head_dim=read.size("head_dim", default=hidden_size // num_heads),
            rms_norm_eps=read.number("rms_norm_eps"),
            rope_theta=_rope_field(read, "rope_theta"),
            mrope_section=_mrope_section(read),
            mrope_interleaved=read.rope().flag("mrope_interleaved", default=False),
            attention_bias=read.flag("attention_bias", default=False),
            tie_word_embeddings=read.flag("tie_word_embeddings", default=False),
            max_position_embeddings=read.size("max_position_embeddings", default=32768),
        )
        if num_heads % config.num_kv_heads:
            read.fail("num_key_value_heads", f"a divisor of {num_heads}", config.num_kv_heads)
        if sum(config.mrope_section) * 2 != config.head_dim:
            read.fail(
                "mrope_section",
                f"three sizes that sum to head_dim / 2 = {config.head_dim // 2}",
                list(config.mrope_section),
            )
        return config


@dataclass(frozen=True)
class KeyeConfig:
    """A whole model: vision tower, projector (its form follows `version`) and text model."""

    version: Version
    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str | None = None  # name of the dtype the weights are meant to run in, if the file says

    @classmethod
    def from_dict(cls, fields: dict[str, Any], *, where: str = "config.json") -> KeyeConfig:
        """Read a parsed config.json. Raises ValueError naming the field and `where`."""
        read = FieldReader(fields, where)
        version = version_of(fields, where)
        # Newer tools keep the text fields apart, but for tie_word_embeddings.
        text_fields, text_where = fields, where
        if fields.get("text_config") is not None:
            text_fields = {
                "tie_word_embeddings": fields.get("tie_word_embeddings", False),
                **read.table("text_config"),
            }
            text_where = f"{where}: text_config"
        dtype = fields.get("torch_dtype", fields.get("dtype"))
        return cls(
            version=version,
            vision=VisionConfig.from_dict(
                read.table("vision_config"),
                segment="clip" if version == "preview" else "frame",
                where=f"{where}: vision_config",
            ),
            text=TextConfig.from_dict(text_fields, where=text_where),
            image_token_id=read.token("image_token_id"),
            video_token_id=read.token("video_token_id"),
            vision_start_token_id=read.token("vision_start_token_id"),
            vision_end_token_id=read.token("vision_end_token_id"),
            eos_token_ids=_token_list(fields.get("eos_token_id", text_fields.get("eos_token_id"))),
            pad_token_id=fields.get("pad_token_id", text_fields.get("pad_token_id")),
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> KeyeConfig:
        """Read config.json, and the stop and pad tokens of generation_config.json if there.

        Raises FileNotFoundError without a config.json and ValueError for a file that is not JSON,
        another architecture, or a missing or wrong field.
        """
        fields, where = _read_config_file(folder)
        generation_file = Path(folder) / "generation_config.json"
        if generation_file.is_file():
            generation = read_json(generation_file)
            for name in ("eos_token_id", "pad_token_id"):
                if generation.get(name) is not None:
                    fields[name] = generation[name]
        return cls.from_dict(fields, where=where)


def _rope_field(read: FieldReader, name: str, default: float | None = None) -> float:
    if read.rope().fields.get(name) is not None:
        return read.rope().number(name)
    return read.number(name, default=default)


def _mrope_section(read: FieldReader) -> tuple[int, int, int]:
    section = read.rope().value("mrope_section")
    is_sizes = isinstance(section, list) and all(type(n) is int and n >= 0 for n in section)
    if not is_sizes or len(section) != 3:
        read.rope().fail("mrope_section", "three sizes", section)
    return tuple(section)


def _require_supported_text(read: FieldReader) -> None:
    activation = read.text("hidden_act", default="silu")
    if activation != "silu":
        read.fail("hidden_act", "silu", activation)
    if read.flag("use_sliding_window", default=False):
        read.fail("use_sliding_window", "false (sliding windows are not supported)", True)
    rope = read.rope()
    for name in ("rope_type", "type"):
        kind = rope.text(name, default="default")
        if kind not in ("default", "mrope"):
            rope.fail(name, "default or mrope (scaled rotary embeddings are not supported)", kind)


def _token_list(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise ValueError(
            f"config: eos_token_id must be a token id or a list of them, got {value!r}"
        )
    return tuple(ids)


def _read_config_file(folder: str | Path) -> tuple[dict[str, Any], str]:
    path = Path(folder) / "config.json"
    return read_json(path), str(path)
