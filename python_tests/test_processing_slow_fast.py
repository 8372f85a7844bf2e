"""Keye-VL-1.5's slow and fast frames."""

from __future__ import annotations

import weakref

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
)

from keye_ops.processing import classify_frames, frame_similarity, rgb_to_hsv, slow_fast_sizes
from keye_ops.processing.slow_fast import hsv_patches

TOKEN = 784


def hsv_of(*rgb):
    return tuple(rgb_to_hsv(torch.tensor(rgb, dtype=torch.uint8)).tolist())


@pytest.mark.parametrize(
    ("rgb", "hsv"),
    [
        ((0, 0, 0), (0, 0, 0)),
        ((255, 255, 255), (0, 0, 255)),
        ((255, 0, 0), (0, 255, 255)),
        ((0, 255, 0), (60, 255, 255)),
        ((0, 0, 255), (120, 255, 255)),
        ((255, 255, 0), (30, 255, 255)),
        ((255, 0, 255), (150, 255, 255)),
        ((255, 0, 1), (0, 255, 255)),  # a hue of -30/255 rounds to 0
        ((255, 0, 9), (179, 255, 255)),  # and one of -1.06 becomes 180 - 1
        ((100, 50, 25), (10, 191, 100)),
        ((1, 2, 3), (105, 170, 3)),
    ],
)
def test_known_colours(rgb, hsv):
    assert hsv_of(*rgb) == hsv


def test_hsv_equals_opencv():
    cv2 = pytest.importorskip("cv2")
    levels = np.array([*range(0, 256, 7), 1, 2, 3, 127, 128, 254, 255], dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1)
    rgb = grid.reshape(levels.size, -1, 3)
    expected = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)
    ours = rgb_to_hsv(torch.from_numpy(rgb).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    assert np.array_equal(ours, expected)


def test_hsv_refuses_other_inputs():
    with pytest.raises(ValueError, match=r"need uint8 of shape \[3, ...\], got torch.float32"):
        rgb_to_hsv(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"got torch.uint8 \(4, 3\)"):
        rgb_to_hsv(torch.zeros(4, 3, dtype=torch.uint8))


def patches_of(frame):
    return hsv_patches(torch.from_numpy(frame).permute(2, 0, 1))


def test_similarity_counts_patches():
    first = flat(WHITE, 56, 84)
    assert patches_of(first).shape == (6, 2352)
    second = first.copy()
    assert frame_similarity(patches_of(first), patches_of(second)) == 1.0
    # White is (0, 0, 255) and blue (120, 255, 255): their cosine is 0.671, below 0.7.
    second[:28, :28] = BLUE
    assert frame_similarity(patches_of(first), patches_of(second)) == pytest.approx(5 / 6)
    # Red is (0, 255, 255): cosine 0.707, above 0.7.
    second[:28, :28] = (255, 0, 0)
    assert frame_similarity(patches_of(first), patches_of(second)) == 1.0


def test_dark_patches_do_not_count():
    black = flat((0, 0, 0), 56, 84)
    assert frame_similarity(patches_of(black), patches_of(black)) == 1.0
    first, second = black.copy(), black.copy()
    first[:28, :28], second[:28, :28] = WHITE, BLUE
    first[28:, :28] = second[28:, :28] = WHITE
    assert frame_similarity(patches_of(first), patches_of(second)) == 0.5
    # A patch that is dark in only one of the frames counts, and is not similar.
    second[28:, :28] = 0
    assert frame_similarity(patches_of(first), patches_of(second)) == 0.0


def test_two_scene_cuts_give_three_slow_frames():
    frames = [flat(WHITE)] * 4 + [flat(BLUE)] * 3 + [flat(GRAY)] * 2
    flags = classify_frames(frames)
    assert [index for index, fast in enumerate(flags) if not fast] == [0, 4, 7]


def test_frames_are_compared_with_the_last_slow_one():
    # Blue creeps in, a tenth of the width each time; it is the sum that must cross the threshold.
    frames = []
    for step in range(6):
        frame = flat(WHITE, 280, 280)
        frame[:, : 14 * step] = BLUE
        frames.append(frame)
    flags = classify_frames(frames)
    assert flags[0] is False
    assert flags[1] is True
    assert False in flags[2:]
    assert classify_frames(frames, min_frame_similarity=0.0) == [False] + [True] * 5
    assert classify_frames(frames[:1] * 3, min_frame_similarity=1.1) == [False] * 3


def test_classification_streams():
    frames = []

    def source():
        for index in range(6):
            frame = flat((WHITE, BLUE)[index % 2])
            frames.append(weakref.ref(frame))
            assert sum(ref() is not None for ref in frames) <= 2
            yield frame

    assert classify_frames(source()) == [False] * 6
    assert len(frames) == 6
    assert classify_frames([]) == []


def clip(seed):
    """Frames with moving parts, drift and cuts, at a size that is reduced for the comparison."""
    rng = np.random.default_rng(seed)
    colours = np.array([WHITE, BLUE, (0, 40, 0), (250, 20, 20), (0, 0, 0)], dtype=np.uint8)
    frame = noise(480, 800, seed)
    for _ in range(10):
        if rng.random() < 0.4:
            row, column = rng.integers(0, 300), rng.integers(0, 500)
            frame = frame.copy()
            frame[row : row + 260, column : column + 400] = colours[rng.integers(5)]
        yield frame


@pytest.mark.parametrize("seed", [2, 3, 6])
def test_classification_equals_the_released_one(monkeypatch, seed):
    vendor = vendor_1_5(monkeypatch)
    frames = list(clip(seed))
    stacked = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    for threshold in (0.9, 0.97):
        expected = vendor.extract_slow_fast_frames(stacked, threshold).tolist()
        flags = classify_frames(frames, min_frame_similarity=threshold)
        assert [int(flag) for flag in flags] == expected
    assert 0 in expected[1:]
    assert 1 in expected


@pytest.mark.parametrize(
    ("size", "counts", "options", "expected"),
    [
        # One slow frame may have 768 tokens; 480 x 640 then keeps its size, 17 x 23 tokens. A
        # fast one gets int(0.3 * 391) = 117.
        ((480, 640), (1, 5), {}, ((476, 644), (252, 336))),
        # 1365 slow frames: 48 tokens each fit, so the search returns 49.
        ((480, 640), (1365, 0), {}, ((168, 224), (168, 224))),
        # 10 x + 90 max(int(0.3 x), 48) <= 6000 up to x = 163; 164 is returned, enough for 10 x 10.
        ((280, 280), (10, 90), {"total_pixels": 6000 * TOKEN}, ((280, 280), (168, 168))),
        # A minimum below 48 tokens has no effect, a larger one raises fast frames too.
        ((56, 56), (1, 1), {"min_pixels": 784}, ((196, 196), (196, 196))),
        ((280, 280), (1, 1), {"min_pixels": 100 * TOKEN}, ((280, 280), (168, 168))),
        ((480, 640), (1, 1), {"max_pixels": 100 * TOKEN}, ((224, 308), (168, 224))),
    ],
)
def test_sizes(size, counts, options, expected):
    num_slow, num_fast = counts
    assert slow_fast_sizes(*size, num_slow=num_slow, num_fast=num_fast, **options) == expected


@pytest.mark.parametrize(
    ("num_frames", "options"),
    [
        (12, {}),
        (400, {}),
        (12, {"video_total_pixels": 1000 * TOKEN}),
        (12, {"min_pixels": 60 * TOKEN, "max_pixels": 300 * TOKEN}),
        (12, {"min_pixels": 51000.5, "video_total_pixels": 900 * TOKEN}),
    ],
)
def test_sizes_equal_the_released_ones(monkeypatch, num_frames, options):
    vendor = vendor_1_5(monkeypatch)
    for height, width in ((360, 640), (1080, 1920), (200, 30)):
        for num_fast in (0, num_frames // 3, num_frames - 1):
            types = torch.zeros(num_frames, dtype=torch.int32)
            types[num_frames - num_fast :] = 1
            frames = torch.empty(1, 3, height, width).expand(num_frames, -1, -1, -1)
            monkeypatch.setattr(
                vendor,
                "_read_video_decord",
                lambda ele, frames=frames, types=types: (frames, None, types),
            )
            _, kwargs = vendor.fetch_video({"video": "clip", **options})
            renamed = {
                "total_pixels" if name == "video_total_pixels" else name: value
                for name, value in options.items()
            }
            ours = slow_fast_sizes(
                height, width, num_slow=num_frames - num_fast, num_fast=num_fast, **renamed
            )
            assert ours.slow == (kwargs["height"], kwargs["width"])
            assert ours.fast == (kwargs["fast_height"], kwargs["fast_width"])
