"""Whole videos and sequences of images to patches."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from processing_helpers import (
    BLUE,
    GRAY,
    WHITE,
    flat,
    noise,
    one_thread,  # noqa: F401
    vendor_1_5,
    write_video,
)

from keye_ops.processing import (
    ProcessingConfig,
    VideoOptions,
    decode_frames,
    probe_video,
    process_video,
    unpatchify,
    video,
    video_slow_fast,
)
from keye_ops.processing.video_preview import frame_size

av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")

PREVIEW, RELEASED = ProcessingConfig(version="preview"), ProcessingConfig(version="1.5")
TOKEN = 784


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    """Five seconds with two scene cuts: white, blue from 2 s, gray from 4 s."""
    frames = [flat(WHITE, 240, 320)] * 20 + [flat(BLUE, 240, 320)] * 20
    frames += [flat(GRAY, 240, 320)] * 10
    return write_video(tmp_path_factory.mktemp("video") / "cuts.mp4", frames, fps=10)


def test_preview_video(cuts):
    out = process_video(cuts, PREVIEW)
    # 10 frames; 240 x 320 lies below 128 tokens, so it is scaled up by 1.143.
    assert out.grid_thw == ((10, 20, 28),)
    assert out.pixel_values.shape == (10 * 20 * 28, 3, 14, 14)
    assert out.pixel_values.dtype == torch.float32
    assert out.is_fast == (False,) * 10
    assert out.fps == 2.0
    assert out.timestamps == tuple(
        float(np.float32(index / 10)) for index in (0, 5, 11, 16, 22, 27, 33, 38, 44, 49)
    )
    first = out.pixel_values[: 20 * 28]
    assert (first > 0.95).all()


def test_slow_fast_video(cuts):
    out = process_video(cuts, RELEASED)
    assert [index for index, fast in enumerate(out.is_fast) if not fast] == [0, 4, 8]
    slow, fast = (1, 18, 22), (1, 12, 16)
    assert out.grid_thw == tuple(fast if flag else slow for flag in out.is_fast)
    assert out.pixel_values.shape[0] == sum(h * w for _, h, w in out.grid_thw)
    assert (out.pixel_values[: 18 * 22] > 0.95).all()
    assert [f"{second:.1f}" for second in out.timestamps[:4]] == ["0.0", "0.5", "1.1", "1.6"]


def test_too_many_bytes_to_hold_are_decoded_again(cuts, monkeypatch):
    passes = []

    def counted(source, indices):
        passes.append(len(indices))
        return decode_frames(source, indices)

    monkeypatch.setattr(video, "decode_frames", counted)
    held = process_video(cuts, RELEASED, keep_uint8=True)
    assert passes == [10]
    monkeypatch.setattr(video_slow_fast, "HELD_BYTES", 10 * 240 * 320 * 3 - 1)
    again = process_video(cuts, RELEASED, keep_uint8=True)
    assert passes == [10, 10, 10]
    assert torch.equal(held.pixel_values, again.pixel_values)


def test_progress_is_reported(cuts):
    for config in (PREVIEW, RELEASED):
        seen = []
        process_video(
            cuts, config, progress=lambda done, total, seen=seen: seen.append((done, total))
        )
        assert seen == [(done, 10) for done in range(1, 11)]


def test_progress_bar(cuts, capsys):
    pytest.importorskip("tqdm")
    process_video(cuts, RELEASED, progress=True)
    assert "10/10" in capsys.readouterr().err


def test_bytes_become_the_same_floats(cuts):
    for config in (PREVIEW, RELEASED):
        raw = process_video(cuts, config, keep_uint8=True).pixel_values
        assert raw.dtype == torch.uint8
        normal = process_video(cuts, config).pixel_values
        torch.testing.assert_close(normal, raw / 127.5 - 1, rtol=0, atol=1e-6)


def test_options(cuts):
    def grid(config, **options):
        return process_video(cuts, config, VideoOptions(**options)).grid_thw

    assert grid(PREVIEW, num_frames=4) == ((4, 20, 28),)
    assert grid(PREVIEW, fps=0.8, min_pixels=50 * TOKEN) == ((4, 18, 22),)
    assert grid(PREVIEW, num_frames=4, resized_height=112, resized_width=168) == ((4, 8, 12),)
    assert len(grid(RELEASED, fps=1.0)) == 5
    assert len(grid(RELEASED, max_frames=3)) == 3
    similar = process_video(cuts, RELEASED, VideoOptions(min_frame_similarity=0.0))
    assert similar.is_fast == (False,) + (True,) * 9
    ranged = process_video(cuts, RELEASED, VideoOptions(video_start=2.0, video_end=3.5))
    assert (ranged.timestamps[0], ranged.timestamps[-1]) == (2.0, 3.5)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (RELEASED, {"num_frames": 4}, "num_frames does not exist in version '1.5', got 4"),
        (RELEASED, {"resized_height": 28}, "resized_height does not exist in version '1.5'"),
        (PREVIEW, {"min_frame_similarity": 0.5}, "does not exist in version 'preview', got 0.5"),
        (PREVIEW, {"resized_height": 28}, "go together, got 28 and None"),
    ],
)
def test_options_of_the_other_version_are_refused(cuts, config, options, message):
    with pytest.raises(ValueError, match=message):
        process_video(cuts, config, VideoOptions(**options))


@pytest.mark.parametrize(
    ("size", "count", "options", "expected"),
    [
        ((1080, 1920), 10, {}, (560, 1008)),  # 768 tokens
        ((1080, 1920), 768, {}, (336, 644)),  # 90316800 / 768 * 2 = 300 tokens
        ((1080, 1920), 10, {"total_pixels": 10}, (224, 420)),  # 1.05 * 128 tokens
        ((1080, 1920), 10, {"max_pixels": 200 * TOKEN}, (280, 504)),
        ((1080, 1920), 10, {"max_pixels": 5000 * TOKEN}, (560, 1008)),
        ((64, 64), 10, {}, (336, 336)),
    ],
)
def test_preview_frame_sizes(size, count, options, expected):
    assert frame_size(*size, count, PREVIEW, VideoOptions(**options)) == expected


def test_preview_resize_is_antialiased_bicubic_rounded_to_bytes(tmp_path):
    path = write_video(tmp_path / "noise.mp4", [noise(96, 160, seed) for seed in range(4)])
    out = process_video(path, PREVIEW, VideoOptions(num_frames=2), keep_uint8=True)
    (grid,) = out.grid_thw
    assert grid == (2, 18, 30)
    ours = unpatchify(out.pixel_values, grid)
    for frame, resized in zip(decode_frames(path, [0, 3]), ours, strict=True):
        picture = torch.from_numpy(frame).permute(2, 0, 1)[None].double()
        exact = torch.nn.functional.interpolate(
            picture, [252, 420], mode="bicubic", antialias=True
        ).clamp(0, 255)
        assert (resized - exact).abs().max() <= 0.5 + 0.01  # float32 against float64


def test_released_resize_and_flags_equal_the_released_utilities(tmp_path, monkeypatch):
    """The released reader on the same decoded frames, and the resize that follows it."""
    vendor = vendor_1_5(monkeypatch)
    frames = [noise(240, 400, 0)] * 12 + [flat(GRAY, 240, 400)] * 8
    path = write_video(tmp_path / "clip.mp4", frames, fps=5)
    reader = types.ModuleType("decord")
    reader.VideoReader = FakeReader
    monkeypatch.setitem(sys.modules, "decord", reader)
    frames, kwargs = vendor.fetch_video({"video": str(path)})
    ours = process_video(path, RELEASED, keep_uint8=True)
    assert [int(flag) for flag in ours.is_fast] == kwargs["frame_types"].tolist()
    assert list(ours.timestamps) == kwargs["timestamps"].tolist()
    assert sum(ours.is_fast) not in (0, len(ours.is_fast))
    row = 0
    for frame, fast, grid in zip(frames, ours.is_fast, ours.grid_thw, strict=True):
        prefix = "fast_" if fast else ""
        size = [kwargs[prefix + "height"], kwargs[prefix + "width"]]
        expected = torch.nn.functional.interpolate(
            frame[None], size, mode="bilinear", antialias=True
        )
        count = grid[1] * grid[2]
        assert torch.equal(unpatchify(ours.pixel_values[row : row + count], grid), expected)
        row += count


class FakeReader:
    """The interface of the released reader over this package's decoder."""

    def __init__(self, path):
        self.path = path
        self.info = probe_video(path)

    def __len__(self):
        return self.info.num_frames

    def get_avg_fps(self):
        return self.info.fps

    def get_batch(self, indices):
        stacked = np.stack(list(decode_frames(self.path, indices)))
        return types.SimpleNamespace(asnumpy=lambda: stacked)


# ---- sequences of images ----


def test_preview_sequence_is_made_even():
    frames = [noise(112, 168, seed) for seed in range(3)]
    out = process_video(frames, PREVIEW, VideoOptions(fps=4.0), keep_uint8=True)
    assert out.grid_thw == ((4, 8, 12),)
    assert out.fps == 4.0
    restored = unpatchify(out.pixel_values, out.grid_thw[0]).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(restored, np.stack([*frames, frames[-1]]))
    # All frames take the size of the first.
    mixed = process_video([noise(112, 168), noise(56, 56)], PREVIEW)
    assert mixed.grid_thw == ((2, 8, 12),)


def test_released_sequence():
    frames = [flat(WHITE, 196, 196)] * 2 + [flat(BLUE, 196, 196)] * 2
    out = process_video(frames, RELEASED)
    assert out.timestamps is None
    assert out.is_fast == (False, True, False, True)
    # A slow frame has 49 tokens, so a fast one may have 48 and is made 6 x 6.
    assert out.grid_thw == ((1, 14, 14), (1, 12, 12)) * 2
    timed = process_video(
        [Image.fromarray(frame) for frame in frames], RELEASED, VideoOptions(fps=4.0)
    )
    assert timed.timestamps == (0.0, 0.25, 0.5, 0.75)


def test_bad_sequences_are_refused():
    with pytest.raises(ValueError, match="the sequence of frames is empty"):
        process_video([], RELEASED)
    with pytest.raises(ValueError, match=r"one size after resizing, got \[\(196, 196\), \(196, 2"):
        process_video([noise(196, 196), noise(196, 224)], RELEASED)
    with pytest.raises(ValueError, match=r"max_frames applies to video files, .* got 3"):
        process_video([noise(56, 56)] * 2, PREVIEW, VideoOptions(max_frames=3))
