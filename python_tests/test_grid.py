"""PackedGrid against naive loops, its errors, devices, and the index of the merge."""

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from keye_ops import PackedGrid, patch_embed
from keye_ops.grid import as_packed_grid, merge_index

GRIDS = {
    "none": [],
    "one": [(1, 2, 2)],
    "images": [(1, 4, 6), (1, 2, 2), (1, 8, 2)],
    "clips": [(3, 2, 4), (1, 4, 4), (2, 6, 2)],
}


def frame_positions(h, w, merge, order):
    """(row, column) of a frame's patches, by loops."""
    if order == "raster":
        return [(row, column) for row in range(h) for column in range(w)]
    return [
        (top + i, left + j)
        for top in range(0, h, merge)
        for left in range(0, w, merge)
        for i in range(merge)
        for j in range(merge)
    ]


@pytest.mark.parametrize("order", ["raster", "block"])
@pytest.mark.parametrize("segment", ["clip", "frame"])
@pytest.mark.parametrize("grid_thw", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_against_loops(grid_thw, segment, order, as_tensor):
    positions, offsets, image_offsets = [], [0], [0]
    for t, h, w in grid_thw:
        for _ in range(t):
            positions += frame_positions(h, w, 2, order)
        offsets += [offsets[-1] + h * w * (i + 1) for i in range(t)][
            :: 1 if segment == "frame" else t
        ]
        offsets[-1] = len(positions)
        image_offsets.append(len(positions))
    given = torch.tensor(grid_thw).reshape(-1, 3).long() if as_tensor else grid_thw
    grid = PackedGrid.from_grid_thw(given, segment=segment, order=order)

    assert grid.grid_thw == tuple(grid_thw)
    assert (grid.segment, grid.order, grid.spatial_merge_size) == (segment, order, 2)
    assert grid.position_ids.tolist() == [list(x) for x in positions]
    assert grid.cu_seqlens.tolist() == offsets
    assert grid.image_offsets.tolist() == image_offsets
    assert grid.grid.tolist() == [list(x) for x in grid_thw]
    assert grid.max_seqlen == max(np.diff(offsets), default=0)
    assert grid.total == len(positions)
    assert grid.num_images == len(grid_thw)
    assert grid.num_segments == len(offsets) - 1
    assert grid.image_lengths == tuple(t * h * w for t, h, w in grid_thw)
    assert grid.merged_lengths == tuple(t * h * w // 4 for t, h, w in grid_thw)
    assert grid.total_merged == len(positions) // 4
    assert grid.device == torch.device("cpu")


def test_index_tensors_are_int32_and_shapes_hold_for_no_image():
    for grid_thw in ([], [(2, 2, 4)]):
        grid = PackedGrid.from_grid_thw(grid_thw)
        tensors = (grid.position_ids, grid.cu_seqlens, grid.grid, grid.image_offsets)
        assert {x.dtype for x in tensors} == {torch.int32}
        assert grid.position_ids.shape == (grid.total, 2)
        assert grid.grid.shape == (len(grid_thw), 3)


@pytest.mark.parametrize("merge", [1, 3])
def test_other_merge_sizes(merge):
    grid = PackedGrid.from_grid_thw([(2, 3, 6)], spatial_merge_size=merge, order="block")
    assert (
        grid.position_ids.tolist() == [list(x) for x in frame_positions(3, 6, merge, "block")] * 2
    )
    assert grid.total_merged == 36 // merge**2


@pytest.mark.parametrize(
    "grid_thw",
    [np.array([[1, 4, 6]]), [np.array([1, 4, 6])], torch.tensor([[1, 4, 6]], dtype=torch.int16)],
    ids=["array", "rows of arrays", "int16 tensor"],
)
def test_integers_of_any_kind(grid_thw):
    assert PackedGrid.from_grid_thw(grid_thw).grid_thw == ((1, 4, 6),)


def test_raster_takes_odd_grids_until_they_are_merged():
    grid = PackedGrid.from_grid_thw([(1, 2, 2), (1, 3, 5)])
    assert grid.total == 19
    message = r"PackedGrid: grid height and width must be multiples of 2 to merge, got \(1, 3, 5\)"
    with pytest.raises(RuntimeError, match=message):
        _ = grid.merged_lengths
    with pytest.raises(RuntimeError, match=message):
        _ = grid.total_merged
    with pytest.raises(RuntimeError, match=message):
        PackedGrid.from_grid_thw([(1, 2, 2), (1, 3, 5)], order="block")


@pytest.mark.parametrize(
    "row",
    [
        (1, -2, 2),
        (0, 2, 2),
        (1, 2),
        (1, 2, 2, 2),
        (1, 2.0, 2),
        (1, float("nan"), 2),
        (1, "2", 2),
        (1, None, 2),
        7,
    ],
    ids=str,
)
def test_rows_that_are_not_three_positive_integers(row):
    message = (
        r"PackedGrid: grid_thw must be \[num_images, 3\] positive integers .* on the host, got"
    )
    with pytest.raises(RuntimeError, match=message):
        PackedGrid.from_grid_thw([(1, 2, 2), row])


@pytest.mark.parametrize(
    ("grid_thw", "received"),
    [
        (torch.ones(2, 3), r"\[2, 3\] float32 on cpu"),
        (torch.ones(3, dtype=torch.int64), r"\[3\] int64 on cpu"),
        (torch.ones(2, 2, dtype=torch.int64), r"\[1, 1\]"),
        (torch.ones(2, 3, dtype=torch.int64, device="meta"), r"\[2, 3\] int64 on meta"),
    ],
)
def test_tensors_that_are_not_a_grid_on_the_host(grid_thw, received):
    with pytest.raises(
        RuntimeError, match=f"PackedGrid: grid_thw must be .* on the host, got {received}"
    ):
        PackedGrid.from_grid_thw(grid_thw)


def test_a_tensor_on_an_accelerator_is_refused_before_it_is_read():
    with FakeTensorMode():
        on_gpu = torch.empty(2, 3, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match=r"on the host, got \[2, 3\] int64 on cuda:0"):
        PackedGrid.from_grid_thw(on_gpu)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment": "image"}, """segment must be "clip" or "frame", got 'image'"""),
        ({"order": "zigzag"}, """order must be "raster" or "block", got 'zigzag'"""),
        ({"spatial_merge_size": 0}, "spatial_merge_size must be an integer >= 1, got 0"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(RuntimeError, match=f"PackedGrid: {message}"):
        PackedGrid.from_grid_thw([(1, 2, 2)], **options)


@pytest.mark.parametrize(
    "grid_thw",
    [
        [(1, 2**16, 2**15)],
        [(1, 2**32, 2**32)],  # the product is 0 in int64
        [(2**64, 1, 1)],
        [(1, 2**15, 2**15)] * 2,
    ],
)
def test_two_to_the_31_patches_are_too_many(grid_thw):
    with pytest.raises(RuntimeError, match=r"fewer than 2\*\*31 patches, got \d{10,}"):
        PackedGrid.from_grid_thw(grid_thw)


def test_a_thousand_frames():
    grid = PackedGrid.from_grid_thw([(1000, 16, 20)], segment="frame")
    assert grid.num_segments == 1000
    assert grid.max_seqlen == 320
    assert torch.equal(grid.cu_seqlens, torch.arange(0, 320_001, 320, dtype=torch.int32))
    frames = grid.position_ids.view(1000, 320, 2)
    assert torch.equal(frames, frames[:1].expand_as(frames))


@pytest.mark.parametrize("make", ["given to from_grid_thw", "moved with to"])
def test_device(make):
    if make == "moved with to":
        grid = PackedGrid.from_grid_thw([(1, 2, 4)]).to("meta")
    else:
        grid = PackedGrid.from_grid_thw([(1, 2, 4)], device="meta")
    tensors = (grid.position_ids, grid.cu_seqlens, grid.grid, grid.image_offsets)
    assert {x.device.type for x in tensors} == {"meta"}
    assert [list(x.shape) for x in tensors] == [[8, 2], [2], [1, 3], [2]]
    assert (grid.total, grid.max_seqlen, grid.grid_thw) == (8, 8, ((1, 2, 4),))


def test_to_the_same_device_is_the_grid_itself():
    grid = PackedGrid.from_grid_thw([(1, 2, 4)])
    assert grid.to("cpu") is grid
    assert grid.to(torch.device("cpu")) is grid


def test_as_packed_grid_takes_both_forms():
    grid = PackedGrid.from_grid_thw([(1, 2, 4)], segment="frame")
    assert as_packed_grid(grid, torch.device("cpu")) is grid
    made = as_packed_grid([(1, 2, 4)], torch.device("meta"))
    assert made.grid_thw == grid.grid_thw
    assert made.device.type == "meta"


def test_a_grid_is_immutable():
    grid = PackedGrid.from_grid_thw([(1, 2, 4)])
    with pytest.raises(AttributeError, match="cannot assign to field 'max_seqlen'"):
        grid.max_seqlen = 3


@pytest.mark.parametrize("order", ["raster", "block"])
@pytest.mark.parametrize("grid_thw", GRIDS.values(), ids=GRIDS)
def test_merge_index_against_loops(grid_thw, order):
    grid = PackedGrid.from_grid_thw(grid_thw, order=order)
    place, start = {}, 0
    for image, (t, h, w) in enumerate(grid_thw):
        for frame in range(t):
            for i, (row, column) in enumerate(frame_positions(h, w, 2, order)):
                place[image, frame, row, column] = start + i
            start += h * w
    want = [
        [place[image, frame, row + i, column + j] for i in range(2) for j in range(2)]
        for image, (t, h, w) in enumerate(grid_thw)
        for frame in range(t)
        for row in range(0, h, 2)
        for column in range(0, w, 2)
    ]
    index = merge_index(grid.grid, grid.image_offsets, grid.total, 2, order)
    assert index.shape == (grid.total_merged, 4)
    assert index.tolist() == want


# ---- the registered ops, given grid tensors that lie ----

BAD_GRIDS = {
    "zero": ([[1, 0, 4]], [0, 0], "grid must hold positive"),
    "negative": ([[1, -2, -2]], [0, 4], "grid must hold positive"),
    "too many": ([[1, 2, 4]], [0, 8], "image_offsets must be the sums"),
    "too few": ([[1, 2, 2], [1, 2, 2]], [0, 4, 8], "image_offsets must be the sums"),
    "false offsets": ([[1, 2, 2]], [0, 3], "image_offsets must be the sums"),
    "offsets start": ([[1, 2, 2]], [1, 4], "image_offsets must be the sums"),
    "offsets shape": ([[1, 2, 2]], [0, 1, 4], r"image_offsets must be \[2\], got \[3\]"),
    "grid shape": ([[1, 2]], [0, 4], r"grid must be \[num_images, 3\], got \[1, 2\]"),
}


@pytest.mark.parametrize("op", ["merge_norm", "patch_embed"])
@pytest.mark.parametrize("name", BAD_GRIDS)
def test_registered_ops_refuse_grids_that_lie(name, op):
    grid, offsets, message = BAD_GRIDS[name]
    grid = torch.tensor(grid, dtype=torch.int32)
    offsets = torch.tensor(offsets, dtype=torch.int32)
    arguments = {
        "merge_norm": (torch.ones(4, 8), torch.ones(8), torch.ones(8), grid, offsets),
        "patch_embed": (
            *(torch.ones(4, 12), torch.ones(6, 12), None, torch.ones(9, 6), grid, offsets),
            torch.zeros(4, 2, dtype=torch.int32),
        ),
    }
    with pytest.raises(RuntimeError, match=f"{op}: {message}"):
        getattr(torch.ops.keye_ops, op)(*arguments[op])


def test_registered_merge_norm_refuses_an_odd_grid():
    grid = torch.tensor([[4, 1, 1]], dtype=torch.int32)
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"merge_norm: grid must hold .* multiples of 2, got"):
        torch.ops.keye_ops.merge_norm(torch.ones(4, 8), torch.ones(8), torch.ones(8), grid, offsets)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5, 0.5), (0.5, 0.5, 0.5), r"must have 3 values for uint8 pixels, got \(2, 3\)"),
        ((0.5,) * 3, (0.5, 0.0, 0.5), "image_std must not hold 0"),
    ],
)
def test_normalisation_of_bytes_is_checked(mean, std, message):
    pixels = torch.zeros(4, 3, 14, 14, dtype=torch.uint8)
    weight, table = torch.ones(6, 3, 14, 14), torch.ones(9, 6)
    with pytest.raises(RuntimeError, match=f"patch_embed: .*{message}"):
        patch_embed(pixels, weight, None, table, [(1, 2, 2)], image_mean=mean, image_std=std)
