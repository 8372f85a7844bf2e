"""Rotary positions: the published numbers of both versions, then every rule around them."""

import pytest
import torch
from model_helpers import IMAGE, VIDEO, make_config

from keye_ops.model import get_rope_index

TEXT, FRAME, FAST = 1, 2, 3
PREVIEW, V15 = make_config("preview"), make_config("1.5")


def positions(ids, config, **grids):
    got, deltas = get_rope_index(torch.tensor([ids]), config, **grids)
    return got[:, 0].tolist(), int(deltas)


@pytest.mark.parametrize("config", [PREVIEW, V15], ids=["preview", "1.5"])
def test_text_image_text(config):
    ids = [TEXT] + [IMAGE] * 4 + [TEXT] * 2
    got, delta = positions(ids, config, image_grid_thw=[(1, 4, 4)])
    assert got == [
        [0, 1, 1, 1, 1, 3, 4],
        [0, 1, 1, 2, 2, 3, 4],
        [0, 1, 2, 1, 2, 3, 4],
    ]
    assert delta == -2


FRAMES = [TEXT, FRAME, TEXT] + [VIDEO] * 2 + [FAST, TEXT] + [VIDEO] * 2 + [TEXT] * 2
FRAMES_WANT = [
    [0, 1, 2, 3, 3, 5, 6, 7, 7, 9, 10],
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
    [0, 1, 2, 3, 3, 5, 6, 7, 7, 9, 10],
]


@pytest.mark.parametrize(
    "grid",
    [[(1, 4, 2), (1, 4, 2)], [(2, 4, 2)], torch.tensor([[2, 4, 2]])],
    ids=["a row per frame", "one merged row", "tensor"],
)
def test_1_5_slow_and_fast_frames(grid):
    got, delta = positions(FRAMES, V15, video_grid_thw=grid)
    assert got == FRAMES_WANT
    assert delta == 0


def test_1_5_ignores_seconds():
    got, _ = positions(FRAMES, V15, video_grid_thw=[(2, 4, 2)], second_per_grid_ts=[7.0])
    assert got == FRAMES_WANT


@pytest.mark.parametrize(
    ("seconds", "t", "after"), [([0.5], [7, 7, 8, 8], 9), (None, [7, 7, 9, 9], 10)]
)
def test_preview_video(seconds, t, after):
    ids = [TEXT] * 7 + [VIDEO] * 4 + [TEXT]
    grid = [(2, 4, 2)]
    got, _ = positions(ids, PREVIEW, video_grid_thw=grid, second_per_grid_ts=seconds)
    assert [row[7:] for row in got] == [[*t, after], [7, 8, 7, 8, after], [7, 7, 7, 7, after]]


def test_preview_time_is_floored_in_fp32():
    # 3 frames a second: i / 3 * 2 = 0, 0.67, 1.33, 2, ...; fp32 keeps 3 * (1/3) at 1.
    ids = [VIDEO] * 7
    grids = {"video_grid_thw": [(7, 2, 2)], "second_per_grid_ts": torch.tensor([1 / 3])}
    got, _ = positions(ids, PREVIEW, **grids)
    assert got[0] == [0, 0, 1, 2, 2, 3, 4]
    assert got[1] == got[2] == [0] * 7


def test_neighbouring_images_are_two_blocks():
    got, _ = positions([IMAGE] * 2, V15, image_grid_thw=[(1, 2, 2), (1, 2, 2)])
    assert got == [[0, 1]] * 3


def test_image_and_video_in_one_prompt():
    ids = [TEXT, VIDEO, VIDEO, TEXT, IMAGE, IMAGE, TEXT]
    grids = {"image_grid_thw": [(1, 2, 4)], "video_grid_thw": [(1, 4, 2)]}
    want = [[0, 1, 1, 3, 4, 4, 6], [0, 1, 2, 3, 4, 4, 6], [0, 1, 1, 3, 4, 5, 6]]
    for config in (PREVIEW, V15):
        got, delta = positions(ids, config, **grids)
        assert got == want
        assert delta == 0


def test_padding_keeps_one_and_grids_run_over_the_batch():
    short, long = [TEXT, IMAGE], [TEXT] + [IMAGE] * 4 + [TEXT]
    ids = torch.tensor([[0] * 4 + short, long])
    mask = torch.tensor([[0] * 4 + [1] * 2, [1] * 6])
    grids = [(1, 2, 2), (1, 4, 4)]
    got, deltas = get_rope_index(ids, V15, image_grid_thw=grids, attention_mask=mask)
    assert got[:, 0].tolist() == [[1, 1, 1, 1, 0, 1]] * 3
    assert got[1, 1].tolist() == [0, 1, 1, 2, 2, 3]
    assert deltas.tolist() == [[2 - 6], [4 - 6]]


def test_text_alone_counts_up():
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    got, deltas = get_rope_index(torch.ones(2, 3, dtype=torch.long), V15, attention_mask=mask)
    assert got[0].tolist() == [[0, 1, 2], [1, 0, 1]]
    assert deltas.tolist() == [[0], [-1]]


def test_empty_batch_and_empty_prompt():
    got, deltas = get_rope_index(torch.empty(0, 5, dtype=torch.long), V15)
    assert got.shape == (3, 0, 5)
    assert deltas.shape == (0, 1)
    assert get_rope_index(torch.empty(1, 0, dtype=torch.long), V15)[0].shape == (3, 1, 0)


def test_a_long_video():
    frames, ids = 1000, []
    for _ in range(frames):
        ids += [FRAME] + [VIDEO] * 4
    got, _ = positions(ids, V15, video_grid_thw=[(frames, 4, 4)])
    assert got[0][::5] == list(range(0, 3 * frames, 3))  # text 1, then a block of 2 positions


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([IMAGE] * 3, {"image_grid_thw": [(1, 4, 4)]}, "image block 0 needs 4 tokens.* has 3"),
        ([IMAGE], {}, "image tokens beyond the 0 blocks of image_grid_thw"),
        ([TEXT], {"video_grid_thw": [(1, 2, 2)]}, "describes 1 blocks, the prompts use 0"),
        ([IMAGE], {"image_grid_thw": [(1, 3, 2)]}, r"multiples of 2, got \(1, 3, 2\)"),
        ([IMAGE], {"image_grid_thw": [(0, 2, 2)]}, r"three positive ints, got \[0, 2, 2\]"),
        ([IMAGE], {"image_grid_thw": [(2, 2)]}, r"three positive ints, got \[2, 2\]"),
    ],
)
def test_prompts_that_do_not_fit_the_grids(ids, grids, message):
    with pytest.raises(ValueError, match="get_rope_index: .*" + message):
        positions(ids, V15, **grids)


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"input_ids must be \[B, L\], got \[3\]"):
        get_rope_index(torch.ones(3, dtype=torch.long), V15)
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"shape of input_ids \[1, 3\], got \[1, 4\]"):
        get_rope_index(ids, V15, attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"one value per row of video_grid_thw \(1\), got 2"):
        positions([VIDEO], PREVIEW, video_grid_thw=[(1, 2, 2)], second_per_grid_ts=[1, 2])
