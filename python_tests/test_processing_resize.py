"""Sizes of images and frames, and the settings read from a checkpoint folder."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processing_helpers import vendor_1_5, write_json

from keye_ops.processing import ProcessingConfig, detect_version, processor_resize, smart_resize

TOKEN = 784


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((1, 1), {}, (56, 56)),  # 28 x 28 is below 4 tokens: scaled by sqrt(3136)
        ((70, 42), {}, (56, 56)),  # 2.5 and 1.5 both round to even
        ((98, 126), {}, (112, 112)),  # 3.5 and 4.5 as well
        ((1080, 1920), {}, (1092, 1932)),
        ((1080, 1920), {"max_pixels": 1280 * TOKEN}, (728, 1316)),
        ((1080, 1920), {"max_pixels": 768 * TOKEN}, (560, 1008)),
        ((20, 4000), {"max_pixels": 100 * TOKEN}, (28, 3948)),  # floor gives 0, clamped to 28
        ((30, 30), {"min_pixels": 128 * TOKEN}, (336, 336)),
        ((300, 10), {}, (308, 28)),
    ],
)
def test_smart_resize_known_sizes(size, limits, expected):
    assert smart_resize(*size, **limits) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((10, 300), (28, 840)),  # scaled up by 2.8 first; smart_resize gives (28, 308)
        ((300, 10), (840, 28)),
        ((1, 1), (56, 56)),
        ((1092, 1932), (728, 1316)),
        ((280, 280), (280, 280)),
    ],
)
def test_processor_resize_known_sizes(size, expected):
    assert processor_resize(*size) == expected


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 20000), st.integers(1, 20000), st.integers(1, 200), st.integers(1, 30))
def test_smart_resize_keeps_its_promises(height, width, least, span):
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="ratio must be <= 200"):
            smart_resize(height, width)
        return
    limits = {"min_pixels": least * TOKEN, "max_pixels": least * span * TOKEN}
    new_height, new_width = smart_resize(height, width, **limits)
    assert new_height % 28 == new_width % 28 == 0
    assert min(new_height, new_width) >= 28
    if min(new_height, new_width) > 28:
        assert new_height * new_width <= limits["max_pixels"] or span == 1


def test_smart_resize_equals_the_released_one(monkeypatch):
    vendor = vendor_1_5(monkeypatch)
    sides = (1, 13, 14, 27, 28, 41, 42, 43, 70, 97, 333, 640, 1079, 4321, 9999)
    compared = 0
    for height in sides:
        for width in sides:
            for least, most in ((4, 20480), (48, 768), (48, 49), (48, 256), (128, 134.4)):
                if max(height, width) > 200 * min(height, width):
                    continue
                ours = smart_resize(
                    height, width, min_pixels=least * TOKEN, max_pixels=most * TOKEN
                )
                assert ours == vendor.smart_resize(height, width, 28, least * TOKEN, most * TOKEN)
                compared += 1
    assert compared > 900


@pytest.mark.parametrize("resize", [smart_resize, processor_resize])
def test_bad_sizes_are_refused(resize):
    with pytest.raises(ValueError, match=rf"{resize.__name__}: .* at least 1, got 0x5"):
        resize(0, 5)
    with pytest.raises(ValueError, match=r"ratio must be <= 200, got \d+x\d+"):
        resize(5, 1001)


def test_exact_ratio_200_is_allowed():
    assert smart_resize(5, 1000) == (28, 1008)


def test_defaults_of_both_versions():
    preview, released = ProcessingConfig(version="preview"), ProcessingConfig(version="1.5")
    assert (preview.resample, released.resample) == (3, 2)
    assert preview.min_pixels == released.min_pixels == 3136
    assert preview.max_pixels == released.max_pixels == 1003520
    assert preview.limits.video_total == 90316800
    assert released.limits.video_total == 51380224
    assert (preview.limits.frame_min, released.limits.frame_min) == (100352, 37632)
    assert preview.factor == 28


def test_config_file_overrides_defaults(tmp_path):
    write_json(
        tmp_path / "preprocessor_config.json",
        {
            "min_pixels": 784,
            "max_pixels": 7840,
            "image_mean": [0.1, 0.2, 0.3],
            "image_std": 0.25,
            "resample": 3,
        },
    )
    config = ProcessingConfig.from_pretrained(tmp_path, "1.5")
    assert (config.min_pixels, config.max_pixels, config.resample) == (784, 7840, 3)
    assert config.image_mean == (0.1, 0.2, 0.3)
    assert config.image_std == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    "size", [{"min_pixels": 784, "max_pixels": 1568}, {"shortest_edge": 784, "longest_edge": 1568}]
)
def test_limits_in_size_are_understood(tmp_path, size):
    write_json(tmp_path / "preprocessor_config.json", {"size": size})
    config = ProcessingConfig.from_pretrained(tmp_path, "1.5")
    assert (config.min_pixels, config.max_pixels) == (784, 1568)
    # A file without mean and std means the processor class's own, which are CLIP's.
    assert config.image_mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)


def test_version_is_told_from_config_json(tmp_path):
    for raw, version in (
        ({"architectures": ["KeyeForConditionalGeneration"]}, "preview"),
        ({"architectures": ["KeyeVL1_5ForConditionalGeneration"]}, "1.5"),
        ({"model_type": "Keye"}, "preview"),
        ({"model_type": "KeyeVL1_5"}, "1.5"),
        ({"model_type": "keye_vl_1_5"}, "1.5"),
    ):
        write_json(tmp_path / "config.json", raw)
        assert detect_version(tmp_path) == version
        assert ProcessingConfig.from_pretrained(tmp_path).version == version


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"version must be 'preview' or '1.5', got '2'"):
        ProcessingConfig(version="2")
    with pytest.raises(ValueError, match=r"0 < min_pixels <= max_pixels, got 10 and 5"):
        ProcessingConfig(min_pixels=10, max_pixels=5)
    with pytest.raises(FileNotFoundError, match=r"checkpoint folder not found: .*nowhere"):
        ProcessingConfig.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config\.json in "):
        ProcessingConfig.from_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        detect_version(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object, got list"):
        detect_version(tmp_path)
    for raw, message in (
        ({"architectures": ["LlamaForCausalLM"]}, "unknown architecture 'LlamaForCausalLM' in "),
        ({"architectures": None}, "neither architectures nor model_type is given"),
        (
            {"architectures": ["KeyeForConditionalGeneration"], "model_type": "KeyeVL1_5"},
            "architectures and model_type name different models",
        ),
    ):
        write_json(path, raw)
        with pytest.raises(ValueError, match=rf"{message}.*; or pass version='preview' or '1\.5'"):
            detect_version(tmp_path)
    for field, value, message in (
        ("temporal_patch_size", 2, "temporal_patch_size must be 1, got 2"),
        ("do_normalize", False, "do_normalize must be True, got False"),
        ("image_mean", [0.5], r"image_mean must be one or three numbers, got \[0.5\]"),
    ):
        write_json(tmp_path / "preprocessor_config.json", {field: value})
        with pytest.raises(ValueError, match=message):
            ProcessingConfig.from_pretrained(tmp_path, "1.5")
