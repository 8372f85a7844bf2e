"""From messages to model inputs, on checkpoint folders of both versions."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from processing_helpers import (
    BLUE,
    SPECIAL_TOKENS,
    WHITE,
    flat,
    noise,
    one_thread,  # noqa: F401
    write_checkpoint,
    write_json,
    write_tokenizer,
    write_video,
)

from keye_ops.processing import (
    KeyeProcessor,
    ProcessingConfig,
    load_image,
    probe_video,
    process_image,
    process_video,
)

for package in ("av", "jinja2", "PIL", "tokenizers"):
    pytest.importorskip(package)

HEAD = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
PICTURE = noise(56, 84)


def vision(text):
    return f"<|vision_start|>{text}<|vision_end|>"


def ask(*parts):
    return [{"role": "user", "content": list(parts)}]


@pytest.fixture(scope="module")
def preview(tmp_path_factory):
    return KeyeProcessor.from_pretrained(
        write_checkpoint(tmp_path_factory.mktemp("preview"), "preview")
    )


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return KeyeProcessor.from_pretrained(write_checkpoint(tmp_path_factory.mktemp("1.5"), "1.5"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Two seconds at 10 a second with a cut in the middle, 6 x 8 tokens a frame."""
    frames = [flat(WHITE, 168, 224)] * 10 + [flat(BLUE, 168, 224)] * 10
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames, fps=10)


def test_image_question(released):
    image = {"type": "image", "image": PICTURE}
    out = released(ask(image, {"type": "text", "text": "What?"}))
    assert out.prompts == (HEAD + vision("<|image_pad|>" * 6) + "What?" + TAIL,)
    assert out.image_grid_thw.tolist() == [[1, 4, 6]]
    assert out.image_grid_thw.dtype == out.input_ids.dtype == torch.int64
    assert out.input_ids.tolist() == [released.tokenizer.encode(out.prompts[0])]
    assert out.attention_mask.tolist() == [[1] * out.input_ids.shape[1]]
    pad = released.tokenizer.token_id("<|image_pad|>")
    assert int((out.input_ids == pad).sum()) == 24 // 4
    assert torch.equal(out.pixel_values, process_image(PICTURE).pixel_values)
    assert set(out.model_inputs()) == {
        "input_ids",
        "attention_mask",
        "pixel_values",
        "image_grid_thw",
    }


def test_preview_video(preview, clip):
    out = preview(ask({"type": "video", "video": str(clip)}, {"type": "text", "text": "?"}))
    # 4 frames, scaled up by 1.633 to have 128 tokens at least: 10 x 14.
    assert out.video_grid_thw.tolist() == [[4, 20, 28]]
    assert out.prompts == (HEAD + vision("<|video_pad|>" * (4 * 10 * 14)) + "?" + TAIL,)
    assert out.second_per_grid_ts.tolist() == [0.5]
    expected = process_video(clip, ProcessingConfig(version="preview"))
    assert torch.equal(out.pixel_values_videos, expected.pixel_values)
    assert out.videos[0].timestamps == expected.timestamps
    slower = preview(ask({"type": "video", "video": str(clip), "fps": 1.0, "min_frames": 2}))
    assert slower.video_grid_thw[0, 0] == 2
    assert slower.second_per_grid_ts.tolist() == [1.0]


def test_slow_fast_video(released, clip):
    out = released(ask({"type": "video", "video": str(clip)}))
    assert out.videos[0].is_fast == (False, True, False, True)
    slow, fast = "<|video_pad|>" * 48, "<|fast_start|>" + "<|video_pad|>" * 48 + "<|fast_end|>"
    text = f"<|frame|>0.0{slow}<|frame|>0.6{fast}<|frame|>1.3{slow}<|frame|>1.9{fast}"
    assert out.prompts == (HEAD + vision(text) + TAIL,)
    assert out.video_grid_thw.tolist() == [[1, 12, 16]] * 4
    assert out.second_per_grid_ts is None
    assert out.pixel_values_videos.shape == (4 * 12 * 16, 3, 14, 14)
    assert "second_per_grid_ts" not in out.model_inputs()


def test_rows_and_placeholders_agree_for_mixed_media(released, preview, clip):
    other = noise(84, 56, seed=1)
    for processor in (preview, released):
        out = processor(
            ask(
                {"type": "image", "image": PICTURE},
                {"type": "video", "video": [PICTURE] * 4, "fps": 2.0},
                {"type": "image", "image": other},
                {"type": "video", "video": str(clip)},
            )
        )
        for pad, values, grid in (
            ("<|image_pad|>", out.pixel_values, out.image_grid_thw),
            ("<|video_pad|>", out.pixel_values_videos, out.video_grid_thw),
        ):
            rows = int(grid.prod(dim=1).sum())
            count = int((out.input_ids == processor.tokenizer.token_id(pad)).sum())
            assert values.shape == (rows, 3, 14, 14)
            assert count == rows // 4
        assert out.image_grid_thw.tolist() == [[1, 4, 6], [1, 6, 4]]
        config = processor.config
        assert torch.equal(out.images[1].pixel_values, process_image(other, config).pixel_values)
        assert out.images[1].pixel_values.data_ptr() == out.pixel_values[24:].data_ptr()
        assert len(out.videos) == 2


def test_batch_is_padded_on_the_left(released):
    image = {"type": "image", "image": PICTURE}
    long, short = ask(image, {"type": "text", "text": "What is it?"}), ask(image)
    out = released([long, short])
    length = out.input_ids.shape[1]
    first, second = (released.tokenizer.encode(prompt) for prompt in out.prompts)
    missing = len(first) - len(second)
    assert missing > 0
    assert length == len(first)
    assert out.input_ids[0].tolist() == first
    assert out.input_ids[1].tolist() == [released.tokenizer.pad_token_id] * missing + second
    assert out.attention_mask[1].tolist() == [0] * missing + [1] * len(second)
    assert out.image_grid_thw.tolist() == [[1, 4, 6]] * 2
    single = released(short)
    assert torch.equal(out.images[1].pixel_values, single.pixel_values)
    assert single.input_ids.tolist() == [second]


def test_text_only(preview):
    out = preview([{"role": "user", "content": "Hi"}], add_generation_prompt=False)
    assert out.prompts == (HEAD + "Hi<|im_end|>\n",)
    assert set(out.model_inputs()) == {"input_ids", "attention_mask"}
    assert preview.decode(out.input_ids[0].tolist()).endswith("user\nHi\n")


def test_settings_come_from_the_folder(tmp_path):
    write_checkpoint(tmp_path, "preview")
    assert KeyeProcessor.from_pretrained(tmp_path).stop_token_ids == (258, 256)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [7, 8]})
    write_json(tmp_path / "chat_template.json", {"chat_template": "{{ hello }}"})
    write_json(
        tmp_path / "preprocessor_config.json",
        {"max_pixels": 4 * 784, "image_mean": 0.5, "image_std": 0.5},
    )
    processor = KeyeProcessor.from_pretrained(tmp_path)
    assert processor.config.version == "preview"
    assert processor.stop_token_ids == (7, 8)
    out = processor([{"role": "user", "content": "Hi"}], hello="<|im_start|>")
    assert out.input_ids.tolist() == [[257]]
    write_json(tmp_path / "generation_config.json", {"eos_token_id": 9})
    write_json(tmp_path / "chat_template.json", {})
    processor = KeyeProcessor.from_pretrained(tmp_path)
    assert processor.stop_token_ids == (9,)
    out = processor(ask({"type": "image", "image": noise(300, 300)}))
    assert out.image_grid_thw.tolist() == [[1, 4, 4]]


def test_progress_reaches_the_decoder(released, clip):
    seen = []
    released(
        ask({"type": "video", "video": str(clip)}), progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_bad_input_is_refused(released, tmp_path):
    with pytest.raises(ValueError, match="at least one message, got none"):
        released([])
    text = {"type": "text", "text": "say <|image_pad|>"}
    with pytest.raises(ValueError, match=r"1 times <\|image_pad\|>, but 0 media"):
        released(ask(text))
    with pytest.raises(FileNotFoundError, match=r"no such file: .*x\.png"):
        released(ask({"type": "image", "image": str(tmp_path / "x.png")}))
    with pytest.raises(ValueError, match=r"num_frames does not exist in version '1\.5', got 4"):
        released(ask({"type": "video", "video": [PICTURE], "nframes": 4}))
    with pytest.raises(FileNotFoundError, match=r"KeyeProcessor\.from_pretrained: checkpoint"):
        KeyeProcessor.from_pretrained(tmp_path / "nowhere")
    write_tokenizer(tmp_path, SPECIAL_TOKENS)
    with pytest.raises(ValueError, match=r"has no token '<\|frame\|>'"):
        KeyeProcessor.from_pretrained(tmp_path, "1.5")
    assert KeyeProcessor.from_pretrained(tmp_path, "preview").config.version == "preview"


@pytest.mark.parametrize(
    ("module", "extra", "call"),
    [
        ("PIL", "image", lambda folder, clip: load_image(np.zeros((4, 4), np.uint8))),
        ("av", "video", lambda folder, clip: probe_video(clip)),
        ("tokenizers", "model", lambda folder, clip: KeyeProcessor.from_pretrained(folder)),
        ("tqdm", "cli", lambda folder, clip: process_video(clip, progress=True)),
    ],
)
def test_missing_packages_are_named(tmp_path, clip, monkeypatch, module, extra, call):
    write_checkpoint(tmp_path, "1.5")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'pip install "keye-ops\[{extra}\]"'):
        call(tmp_path, clip)


def test_missing_template_package_is_named(released, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'pip install "keye-ops\[model\]"'):
        released([{"role": "user", "content": "Hi"}])
