"""Reading config.json of either version, and refusing what would be read wrongly."""

import copy
import json

import pytest
import torch

from keye_ops.model import KeyeConfig, KeyeModel, VisionConfig
from keye_ops.processing import detect_version

PREVIEW = {
    "architectures": ["KeyeForConditionalGeneration"],
    "model_type": "Keye",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151645,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
    },
}


def changed(path, value):
    """PREVIEW with one field replaced, or removed by the value None."""
    fields = copy.deepcopy(PREVIEW)
    *parents, name = path.split(".")
    table = fields
    for parent in parents:
        table = table[parent]
    table[name] = value
    if value is None:
        del table[name]
    return fields


def test_preview_file():
    config = KeyeConfig.from_dict(PREVIEW)
    assert config.version == "preview"
    assert config.vision.segment == "clip"
    assert config.vision.head_dim == 72
    assert config.vision.position_table_size == 27
    assert config.vision.layer_norm_eps == 1e-6
    assert config.vision.rope_theta == 10000
    assert config.vision.tokens_per_second == 2
    assert config.text.mrope_section == (16, 24, 24)
    assert config.text.rope_theta == 1e6
    assert config.text.num_kv_heads == 8
    assert config.eos_token_ids == (151645,)
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("names", "projector"),
    [
        (("KeyeForConditionalGeneration", "Keye"), 40_119_040),
        (("KeyeVL1_5ForConditionalGeneration", "KeyeVL1_5"), 40_125_952),
    ],
)
def test_parameter_counts_of_the_released_models(names, projector):
    fields = PREVIEW | {"architectures": [names[0]], "model_type": names[1]}
    with torch.device("meta"):
        model = KeyeModel(KeyeConfig.from_dict(fields))

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(model.visual) == 412_987_248
    assert count(model.mlp_AR) == projector
    # 36 layers of q, k, v, o, gate, up, down, four norms; two tables; the final norm.
    layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 12288 * 4096 + 2 * 4096 + 2 * 128
    assert count(model) - count(model.visual) - projector == 36 * layer + 2 * 151936 * 4096 + 4096


def test_1_5_file_with_nested_text_and_rope_parameters():
    text_names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    text_names += ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")
    fields = {k: v for k, v in PREVIEW.items() if k not in (*text_names, "rope_theta")}
    del fields["rope_scaling"], fields["torch_dtype"]
    rope = {"rope_type": "default", "rope_theta": 8e6, "mrope_section": [16, 24, 24]}
    fields |= {
        "architectures": ["KeyeVL1_5ForConditionalGeneration"],
        "model_type": "KeyeVL1_5",
        "tie_word_embeddings": True,
        "dtype": "float16",
        "text_config": {k: PREVIEW[k] for k in text_names} | {"rope_parameters": rope},
    }
    fields["vision_config"] = PREVIEW["vision_config"] | {"rope_theta": 500.0}
    config = KeyeConfig.from_dict(fields)
    assert config.version == "1.5"
    assert config.vision.segment == "frame"
    assert config.vision.rope_theta == 500
    assert config.text.rope_theta == 8e6
    assert config.text.tie_word_embeddings
    assert config.dtype == "float16"


def test_both_halves_tell_the_same_version(tmp_path):
    for name in ("Keye", "KeyeVL1_5", "keye_vl_1_5"):
        fields = changed("architectures", None) | {"model_type": name}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        assert KeyeConfig.from_pretrained(tmp_path).version == detect_version(tmp_path)


def test_generation_config_adds_stop_tokens(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PREVIEW))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert KeyeConfig.from_pretrained(tmp_path).eos_token_ids == (5, 6)


def test_paddleocr_vision_tower(tmp_path):
    fields = {"architectures": ["PaddleOCRVLForConditionalGeneration"], "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = VisionConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.num_hidden_layers, config.segment) == (1152, 27, "frame")
    with pytest.raises(ValueError, match="unknown architecture 'PaddleOCRVLForCond"):
        KeyeConfig.from_pretrained(tmp_path)


def test_keye_vision_tower(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PREVIEW))
    assert VisionConfig.from_pretrained(tmp_path) == KeyeConfig.from_dict(PREVIEW).vision


REQUIRED = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_config",
    "vision_config.hidden_size",
    "vision_config.image_size",
    "vision_config.intermediate_size",
    "vision_config.num_attention_heads",
    "vision_config.num_hidden_layers",
    "rope_scaling.mrope_section",
]


@pytest.mark.parametrize("path", REQUIRED)
def test_a_missing_field_is_named(path):
    name = path.split(".")[-1]
    with pytest.raises(ValueError, match=rf"config: the field {name} is missing in config\.json"):
        KeyeConfig.from_dict(changed(path, None))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("hidden_size", "4096", "hidden_size must be a positive integer, got '4096'"),
        ("num_hidden_layers", 0, "num_hidden_layers must be a positive integer, got 0"),
        ("vocab_size", True, "vocab_size must be a positive integer, got True"),
        ("rms_norm_eps", -1e-6, "rms_norm_eps must be a positive number, got -1e-06"),
        ("rope_theta", "big", "rope_theta must be a positive number, got 'big'"),
        ("rope_theta", float("nan"), "rope_theta must be a positive number, got nan"),
        ("image_token_id", -1, "image_token_id must be a token id, got -1"),
        ("tie_word_embeddings", 1, "tie_word_embeddings must be true or false, got 1"),
        ("vision_config", [], r"vision_config must be an object, got \[\]"),
        ("num_key_value_heads", 5, "num_key_value_heads must be a divisor of 32, got 5"),
        ("hidden_act", "gelu", "hidden_act must be silu, got 'gelu'"),
        ("vision_config.hidden_act", "gelu", "must be gelu_pytorch_tanh, got 'gelu'"),
        ("vision_config.hidden_size", 1150, "hidden_size must be a multiple of .* = 64, got 1150"),
        ("vision_config.image_size", 7, "image_size must be at least patch_size = 14, got 7"),
        ("use_sliding_window", True, "use_sliding_window must be false"),
        ("rope_scaling.type", "yarn", "type must be default or mrope .* got 'yarn'"),
        ("rope_scaling.mrope_section", [16, 48], r"must be three sizes, got \[16, 48\]"),
        ("rope_scaling.mrope_section", [16, 24, 23], "sum to head_dim / 2 = 64, got"),
        ("eos_token_id", "<eos>", "eos_token_id must be a token id or a list of them"),
        (
            "architectures",
            ["LlamaForCausalLM"],
            "unknown architecture 'LlamaForCausalLM' in config",
        ),
        ("model_type", "KeyeVL1_5", "architectures and model_type name different models"),
    ],
)
def test_a_wrong_field_is_named(path, value, message):
    with pytest.raises(ValueError, match=message):
        KeyeConfig.from_dict(changed(path, value))


def test_no_architecture_at_all():
    fields = changed("architectures", None)
    del fields["model_type"]
    with pytest.raises(ValueError, match="neither architectures nor model_type is given"):
        KeyeConfig.from_dict(fields)


def test_files_that_are_missing_or_broken(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
        KeyeConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": ')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        KeyeConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object, got list"):
        KeyeConfig.from_pretrained(tmp_path)
