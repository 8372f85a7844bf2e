"""Files and oracles for the tests of keye_ops.processing."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types

import numpy as np
import pytest
import torch

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SLOW_FAST_TOKENS = ("<|frame|>", "<|fast_start|>", "<|fast_end|>")

# Blue differs from white and from gray as frames are compared: an HSV cosine of 0.671.
WHITE, BLUE, GRAY = (255, 255, 255), (0, 0, 255), (128, 128, 128)


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors here are small: threads that wait for each other would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def vendor_1_5(monkeypatch):
    """keye_vl_utils 1.5.x, with empty modules for what it imports but does not run here."""
    for name in ("cv2", "einops", "keye_vl_utils"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    vision = types.ModuleType("torchvision")
    vision.io = types.ModuleType("torchvision.io")
    vision.transforms = types.ModuleType("torchvision.transforms")
    vision.transforms.InterpolationMode = None
    with monkeypatch.context() as patch:
        stubs = (vision, vision.io, vision.transforms, types.ModuleType("requests"))
        for module in stubs:
            patch.setitem(sys.modules, module.__name__, module)
        process = importlib.import_module("keye_vl_utils.vision_process")
    if not hasattr(process, "extract_slow_fast_frames"):
        pytest.skip("keye_vl_utils is not of version 1.5")
    return process


def codec():
    av = pytest.importorskip("av")
    for name in ("libx264", "mpeg4"):
        try:
            av.Codec(name, "w")
        except av.error.FFmpegError:
            continue
        return name
    pytest.skip("PyAV has no video encoder")


def write_video(path, frames, fps=10, **options):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec(), rate=fps, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def flat(colour, height=112, width=168):
    return np.full((height, width, 3), colour, dtype=np.uint8)


def gray_ramp(count, height=64, width=96, step=8):
    """Frames that can be told by their brightness: 16, 16 + step, ..."""
    return [flat((16 + step * i,) * 3, height, width) for i in range(count)]


def noise(height, width, seed=0, channels=3):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def write_tokenizer(folder, tokens=SPECIAL_TOKENS + SLOW_FAST_TOKENS):
    """A byte-level tokenizer: one token a byte, and the special tokens behind them."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(tokens))
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def write_checkpoint(folder, version):
    preview = version == "preview"
    name = "KeyeForConditionalGeneration" if preview else "KeyeVL1_5ForConditionalGeneration"
    write_tokenizer(folder, SPECIAL_TOKENS if preview else SPECIAL_TOKENS + SLOW_FAST_TOKENS)
    write_json(folder / "config.json", {"architectures": [name]})
    write_json(
        folder / "preprocessor_config.json",
        {
            "min_pixels": 3136,
            "max_pixels": 1003520,
            "patch_size": 14,
            "temporal_patch_size": 1,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    )
    return folder


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
