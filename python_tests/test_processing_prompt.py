"""Chat templates, placeholders, messages and the tokenizer."""

from __future__ import annotations

import json

import pytest
from processing_helpers import SPECIAL_TOKENS, write_json, write_tokenizer

from keye_ops.processing import (
    DEFAULT_CHAT_TEMPLATE,
    KeyeTokenizer,
    clip_text,
    expand_placeholders,
    frames_text,
    load_chat_template,
    render_chat,
    split_messages,
)

pytest.importorskip("jinja2")
pytest.importorskip("tokenizers")

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"


# ---- chat template ----


def test_default_template():
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "What is <this> & that?\n"},
                {"type": "video"},
            ],
        },
        {"role": "assistant", "content": "  A cat.\n"},
        {"role": "user", "content": "Sure?"},
    ]
    expected = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is <this> & that?\n"
        "<|vision_start|><|video_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\n  A cat.\n<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
    )
    assert render_chat(messages, add_generation_prompt=False) == expected
    assert render_chat(messages) == expected + "<|im_start|>assistant\n"


def test_a_system_message_replaces_the_default_one():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert render_chat(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_template_files_by_rank(tmp_path):
    assert load_chat_template(tmp_path) == DEFAULT_CHAT_TEMPLATE
    write_json(tmp_path / "tokenizer_config.json", {"pad_token": "x"})
    assert load_chat_template(tmp_path) == DEFAULT_CHAT_TEMPLATE
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "a"}]
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": named})
    assert load_chat_template(tmp_path) == "a"
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": "b"})
    assert load_chat_template(tmp_path) == "b"
    write_json(tmp_path / "chat_template.json", {"chat_template": "c"})
    assert load_chat_template(tmp_path) == "c"
    (tmp_path / "chat_template.jinja").write_text("d")
    assert load_chat_template(tmp_path) == "d"
    with pytest.raises(FileNotFoundError, match="load_chat_template: checkpoint folder not found"):
        load_chat_template(tmp_path / "nowhere")


def test_template_variables_and_failures():
    user = [{"role": "user", "content": "Hi"}]
    assert render_chat(user, "{{ enable_thinking }}", enable_thinking=False) == "False"
    with pytest.raises(ValueError, match="render_chat: the chat template failed"):
        render_chat(user, "{% if %}")
    with pytest.raises(ValueError, match=r"the chat template failed .no tools here"):
        render_chat(user, "{{ raise_exception('no tools here') }}")
    with pytest.raises(ValueError, match=r"the chat template failed .*concatenate"):
        render_chat([{"role": "user", "content": []}], "{{ 'a' + messages[0].content }}")
    with pytest.raises(ValueError, match=r"the chat template failed .*unsafe"):
        render_chat(user, "{{ messages.__class__.__mro__ }}")


# ---- placeholders ----


def test_clip_text():
    assert clip_text(IMAGE, (1, 4, 6)) == IMAGE * 6
    assert clip_text(VIDEO, (3, 2, 4)) == VIDEO * 6
    with pytest.raises(ValueError, match=r"multiples of 2, got \(1, 3, 4\)"):
        clip_text(IMAGE, (1, 3, 4))


def test_frames_text():
    grid = [(1, 4, 4), (1, 2, 2), (1, 2, 4)]
    flags = [False, True, False]
    assert frames_text(grid, flags, [0.0, 0.5, 12.25]) == (
        f"<|frame|>0.0{VIDEO * 4}"
        f"<|frame|>0.5<|fast_start|>{VIDEO}<|fast_end|>"
        f"<|frame|>12.2{VIDEO * 2}"
    )
    assert frames_text(grid[1:], flags[1:], None) == (
        f"<|frame|><|fast_start|>{VIDEO}<|fast_end|><|frame|>{VIDEO * 2}"
    )
    with pytest.raises(ValueError, match="one entry a frame, got 3, 3 and 2"):
        frames_text(grid, flags, [0.0, 0.5])
    with pytest.raises(ValueError, match="one entry a frame, got 3, 2 and None"):
        frames_text(grid, flags[:2], None)


def test_expand_placeholders():
    assert expand_placeholders("a<i>b<i>c", "<i>", ["1<i>", "2"]) == "a1<i>b2c"
    assert expand_placeholders("plain", "<i>", []) == "plain"
    with pytest.raises(ValueError, match="the prompt has 2 times <i>, but 1 media were given"):
        expand_placeholders("<i><i>", "<i>", ["1"])


# ---- messages ----


def test_split_messages():
    bare, media = split_messages(
        [
            {"role": "system", "content": "S"},
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": "a.png", "max_pixels": 784},
                    {"type": "text", "text": "T"},
                    {"video": "b.mp4", "nframes": 4, "video_total_pixels": 10},
                ],
            },
        ]
    )
    assert bare[0] == {"role": "system", "content": "S"}
    assert bare[1]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "T"},
        {"type": "video"},
    ]
    assert media == [
        ("image", "a.png", {"max_pixels": 784}),
        ("video", "b.mp4", {"num_frames": 4, "total_pixels": 10}),
    ]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "needs at least one message, got none"),
        (["hello"], "a message needs role and content, got 'hello'"),
        ([{"role": "user"}], "a message needs role and content"),
        ([{"role": "user", "content": ["x"]}], "a part of content must be a dict, got 'x'"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "got type 'audio' with fields"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            r"type 'image' with fields \['type'\]",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "image": "a", "fps": 2}]}],
            "unknown option 'fps' of a part of type 'image'; known are min_pixels, max_pixels",
        ),
    ],
)
def test_bad_messages_are_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        split_messages(messages)


# ---- tokenizer ----


def test_round_trip(tmp_path):
    backend = write_tokenizer(tmp_path)
    tokenizer = KeyeTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 256 + 10
    text = "<|im_start|>user\nGrüße, 世界!<|frame|>0.5"
    ids = tokenizer.encode(text)
    assert ids == backend.encode(text, add_special_tokens=False).ids
    assert ids[0] == tokenizer.token_id("<|im_start|>") == 257
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == "user\nGrüße, 世界!0.5"
    assert tokenizer.encode("") == []
    assert tokenizer.pad_token_id == 256


def test_stored_truncation_and_padding_are_ignored(tmp_path):
    backend = write_tokenizer(tmp_path)
    backend.enable_truncation(3)
    backend.enable_padding(length=7)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(KeyeTokenizer.from_pretrained(tmp_path).encode("hello")) == 5


def test_tokens_listed_beside_the_tokenizer_are_added(tmp_path):
    write_tokenizer(tmp_path, SPECIAL_TOKENS)
    listed = {
        "257": {"content": "<|im_start|>", "special": True},
        "263": {"content": "<think>", "special": False},
        "264": {"content": "<|frame|>", "special": True, "normalized": False},
    }
    path = tmp_path / "tokenizer_config.json"
    write_json(path, {"added_tokens_decoder": listed, "pad_token": {"content": "<|im_end|>"}})
    tokenizer = KeyeTokenizer.from_pretrained(tmp_path)
    assert tokenizer.token_id("<|frame|>") == 264
    assert tokenizer.encode("<think><|frame|>") == [263, 264]
    assert tokenizer.decode([263, 264]) == "<think>"
    assert tokenizer.pad_token == "<|im_end|>"
    listed["300"] = {"content": "<|far|>", "special": True}
    write_json(path, {"added_tokens_decoder": listed})
    with pytest.raises(ValueError, match=r"'<\|far\|>' must have id 300, tokenizer.json gives 265"):
        KeyeTokenizer.from_pretrained(tmp_path)


def test_missing_tokens_and_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*tokenizer\.json"):
        KeyeTokenizer.from_pretrained(tmp_path)
    write_tokenizer(tmp_path, SPECIAL_TOKENS)
    tokenizer = KeyeTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json has no token '<\|fast_end\|>'"):
        tokenizer.token_id("<|fast_end|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(ValueError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        KeyeTokenizer.from_pretrained(tmp_path)
