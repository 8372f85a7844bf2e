"""patchify against Pillow, torch's interpolation and the processors, which nobody here wrote."""

import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from host_cuda import executor, host_cuda, take_reports, unavailable
from instruction_sets import needs_native_kernel, on_each_lesser_instruction_set, rerun
from torch._dynamo.testing import CompileCounterWithBackend

import keye_ops
from keye_ops import PackedGrid
from keye_ops.patchify import ARITHMETIC, patchify_reference, resample_filter
from keye_ops.processing import ProcessingConfig, process_image
from keye_ops.processing import patchify as cut
from keye_ops.processing.slow_fast import resize_bilinear
from keye_ops.processing.video_preview import resize_bicubic

Image = pytest.importorskip("PIL.Image")
MODES = ["bilinear", "bicubic"]
# (frames, height, width) -> (height, width): of Keye's patches, but small for the executor.
SHAPES = {
    "shrinks": ((1, 61, 90), (28, 42)),
    "grows": ((1, 9, 11), (28, 28)),
    "shrinks and grows": ((2, 70, 10), (28, 56)),
    "grows and shrinks": ((1, 10, 150), (14, 98)),
    "same size": ((1, 28, 42), (28, 42)),
    "one pixel": ((1, 1, 1), (14, 28)),
    "one row": ((1, 1, 40), (14, 28)),
    "one column": ((2, 33, 1), (28, 14)),
    "many columns": ((1, 16, 200), (14, 182)),
    "much smaller": ((1, 300, 400), (14, 14)),
    "clip": ((5, 20, 31), (14, 28)),
}
needs_native = needs_native_kernel("patchify")


def pictures(shape, kind="noise", seed=0):
    """Frames [T, H, W, 3]: noise, or edges, at which cubic filters overshoot."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8)
    return x if kind == "noise" else (x > 127).to(torch.uint8) * 255


def pillow_is_vertical_first(source, size):
    """The order of the passes in the Pillow that is installed."""
    (height, width), (new_height, new_width) = source, size
    shrinks = height - new_height > max(0, 2 * (width - new_width))
    return shrinks and int(Image.__version__.split(".")[0]) >= 13


def pillow(frames, size, mode="bicubic", patch_size=14):
    code = {"bilinear": 2, "bicubic": 3}[mode]
    resized = [Image.fromarray(x.numpy()).resize(size[::-1], code) for x in frames]
    stacked = np.stack([np.array(x) for x in resized])
    return cut(torch.from_numpy(stacked), patch_size=patch_size)[0]


def interpolated(frames, size, mode, patch_size=14):
    """torch's own arithmetic in the dtype of the frames."""
    channels_first = frames.permute(0, 3, 1, 2)
    resized = F.interpolate(channels_first, list(size), mode=mode, antialias=True)
    return cut(resized, patch_size=patch_size)[0]


def exact(frames, size, mode, patch_size=14):
    """The filter in fp64, without any rounding."""
    x = frames.double()
    for dim, length in ((2, size[1]), (1, size[0])):
        axis = resample_filter(x.shape[dim], length, mode == "bicubic", 2)
        dense = torch.zeros(length, x.shape[dim], dtype=torch.float64)
        last = x.shape[dim] - 1
        for tap in range(axis.weights.shape[1]):
            at = (axis.first + tap).clamp(max=last)[:, None]
            dense.scatter_add_(1, at, axis.weights[:, tap : tap + 1])
        x = torch.tensordot(x, dense, ([dim], [1])).movedim(-1, dim)
    return cut(x.contiguous(), patch_size=patch_size)[0].clamp(0, 255)


def assert_rounded(patches, values):
    """Every level is that of a value, or of one within 1e-3 of it."""
    assert patches.dtype == torch.uint8
    assert patches.shape == values.shape
    assert ((patches.double() - values).abs() <= 0.5 + 1e-3).all()


# ---- values ----


@pytest.mark.parametrize("kind", ["noise", "edges"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_pillow(shape, mode, kind, device):
    (frames, *source), size = SHAPES[shape]
    x = pictures((frames, *source), kind)
    order = pillow_is_vertical_first(source, size)
    out = keye_ops.patchify(x.to(device), size, mode=mode, vertical_first=order)
    assert out.is_contiguous()
    assert torch.equal(out.cpu(), pillow(x, size, mode))


@pytest.mark.parametrize("kind", ["noise", "edges"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_uint8(shape, mode, kind, device):
    source, size = SHAPES[shape]
    x = pictures(source, kind)
    out = keye_ops.patchify(x.to(device), size, mode=mode, arithmetic="uint8")
    assert torch.equal(out.cpu(), interpolated(x, size, mode))


@pytest.mark.parametrize("kind", ["noise", "edges"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32(shape, mode, kind, device):
    source, size = SHAPES[shape]
    x = pictures(source, kind)
    out = keye_ops.patchify(x.to(device), size, mode=mode, arithmetic="float32").cpu()
    assert_rounded(out, exact(x, size, mode))
    peer = interpolated(x.float(), size, mode).clamp(0, 255).round()
    assert (out.float() - peer).abs().max() <= 1


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("patch_size", [2, 7, 16, 34])
def test_patch_sizes(patch_size, arithmetic, device):
    x = pictures((2, 50, 37))
    size = (patch_size * 2, patch_size * 3)
    out = keye_ops.patchify(x.to(device), size, patch_size=patch_size, arithmetic=arithmetic)
    args = (x, *size, patch_size, True, ARITHMETIC.index(arithmetic))
    if arithmetic == "float32":
        assert_rounded(out.cpu(), exact(x, size, "bicubic", patch_size))
    else:
        assert torch.equal(out.cpu(), patchify_reference(*args))


def test_order_is_that_of_packed_grid(device):
    """Every patch shows where it is."""
    grid = PackedGrid.from_grid_thw([(3, 4, 5)])
    x = torch.zeros(3, 56, 70, 3, dtype=torch.uint8)
    for frame in range(3):
        for row in range(4):
            for column in range(5):
                where = torch.tensor([frame, row, column], dtype=torch.uint8)
                x[frame, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14] = where
    out = keye_ops.patchify(x.to(device), grid=(4, 5)).cpu()
    assert (out == out[:, :, :1, :1]).all()
    assert out.shape == (grid.total, 3, 14, 14)
    assert torch.equal(out[:, 1:, 0, 0].int(), grid.position_ids.int())
    assert torch.equal(out[:, 0, 0, 0].int(), torch.arange(3).repeat_interleave(20).int())


def test_size_and_grid_and_none_are_the_same(device):
    x = pictures((1, 28, 42)).to(device)
    want = cut(x)[0]
    for arithmetic in ARITHMETIC:
        for arguments in ({}, {"size": (28, 42)}, {"grid": (2, 3)}):
            assert torch.equal(keye_ops.patchify(x, arithmetic=arithmetic, **arguments), want)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_no_frames(arithmetic, device):
    x = pictures((0, 30, 40)).to(device)
    out = keye_ops.patchify(x, (28, 28), arithmetic=arithmetic)
    assert out.shape == (0, 3, 14, 14)
    assert out.dtype == torch.uint8


def test_strided_frames(device):
    """A window of every second frame and row: nothing else is read."""
    base = pictures((4, 60, 50)).to(device)
    x = base[::2, 3:57:2, 5:38]
    out = keye_ops.patchify(x, (14, 28))
    assert torch.equal(out, keye_ops.patchify(x.clone(), (14, 28)))


@needs_native
def test_unpacked_pixels_fall_back_visibly():
    x = pictures((1, 20, 30)).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    out = keye_ops.patchify(x, (14, 14))
    last = keye_ops.last_dispatch("patchify")
    want = ("reference", "it needs packed pixels (strides 3 and 1)")
    assert (last.implementation, last.reason) == want
    assert torch.equal(out, keye_ops.patchify(x.contiguous(), (14, 14)))


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"vertical_first": True}, "it has no vertical_first on cuda"),
        ({"patch_size": 7}, "it has no patch_size 7 on cuda"),
        ({"patch_size": 56}, "it has no patch_size 56 on cuda"),
        ({"size": (56, 14)}, "it shrinks 96 times at most on cuda"),
    ],
)
def test_what_cuda_does_not_take_falls_back_visibly(options, reason):
    x = pictures((1, 4, 1345 if "size" in options else 4))
    options = {"size": (56, 56), **options}
    want = keye_ops.patchify(x, **options)
    with host_cuda():
        assert torch.equal(keye_ops.patchify(x, **options), want)
        assert take_reports() == []
    assert keye_ops.last_dispatch("patchify").reason == reason


@needs_native
def test_frames_far_apart():
    """More than 2**31 bytes; only the pages of the frames are touched."""
    stride = 2**31 + 64
    base = torch.empty(stride + 4000, dtype=torch.uint8)
    x = base.as_strided((2, 30, 40, 3), (stride, 121, 3, 1))
    x.copy_(pictures((2, 30, 40)))
    assert torch.equal(keye_ops.patchify(x, (14, 28)), keye_ops.patchify(x.clone(), (14, 28)))


@needs_native
def test_a_side_of_16384():
    x = pictures((1, 3, 16384))
    assert torch.equal(keye_ops.patchify(x, (14, 2800)), pillow(x, (14, 2800)))
    x = pictures((1, 16384, 2))
    order = pillow_is_vertical_first((16384, 2), (1400, 14))
    out = keye_ops.patchify(x, (1400, 14), vertical_first=order)
    assert torch.equal(out, pillow(x, (1400, 14)))
    out = keye_ops.patchify(pictures((1, 2, 3)), (14, 16380))
    assert torch.equal(out, pillow(pictures((1, 2, 3)), (14, 16380)))


@needs_native
@pytest.mark.parametrize("order", [False, True])
def test_both_orders_of_the_passes(order):
    for seed, (source, size) in enumerate(SHAPES.values()):
        x = pictures(source, seed=seed)
        args = (x, *size, 14, True, 0, order)
        assert torch.equal(torch.ops.keye_ops.patchify(*args), patchify_reference(*args))


# ---- the processors ----


def test_images_of_the_processor(device):
    x = pictures((1, 107, 160))
    patches, (_, *grid) = process_image(x[0].numpy(), keep_uint8=True)
    size = (grid[0] * 14, grid[1] * 14)
    order = pillow_is_vertical_first(x.shape[1:3], size)
    out = keye_ops.patchify(x.to(device), grid=tuple(grid), vertical_first=order)
    assert torch.equal(out.cpu(), patches)


def test_frames_of_both_processors(device):
    x = pictures((2, 70, 90))
    slow_fast = cut(torch.stack([resize_bilinear(one.numpy(), (28, 56)) for one in x]))[0]
    out = keye_ops.patchify(x.to(device), (28, 56), mode="bilinear", arithmetic="uint8")
    assert torch.equal(out.cpu(), slow_fast)

    preview = cut(np.stack([resize_bicubic(one.numpy(), (28, 56)) for one in x]))[0]
    out = keye_ops.patchify(x.to(device), (28, 56), arithmetic="float32").cpu()
    assert (out.int() - preview.int()).abs().max() <= 1
    assert (out != preview).float().mean() < 1e-3


def test_patches_go_into_patch_embed(device):
    """A clip from decoded frames to tokens, with nothing of it on the host."""
    grid = PackedGrid.from_grid_thw([(2, 2, 4)])
    x = pictures((2, 40, 70))
    weight, table = torch.randn(8, 588), torch.randn(4, 8)
    patches = keye_ops.patchify(x.to(device), grid=(2, 4))
    config = ProcessingConfig()
    assert (config.image_mean, config.image_std) == ((0.5,) * 3, (0.5,) * 3)
    want = keye_ops.patch_embed(patches.cpu().float() / 127.5 - 1, weight, None, table, grid)
    with keye_ops.backend("reference"):
        got = keye_ops.patch_embed(patches.cpu(), weight, None, table, grid)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# ---- random configurations ----


def random_case(rng, sides, patches):
    patch_size = rng.choice([14, 14, 2, 4, 16, 6])
    side = lambda most: rng.choice([1, 2, rng.randint(1, 9), rng.randint(1, most)])  # noqa: E731
    source = (rng.choice([1, 1, 2, 3]), side(sides), side(sides))
    most = max(1, patches // patch_size)
    size = (patch_size * rng.randint(1, most), patch_size * rng.randint(1, most))
    arithmetic, bicubic = rng.randrange(3), rng.random() < 0.6
    base = pictures((source[0], source[1] + rng.choice([0, 2]), source[2] + rng.choice([0, 5])),
                    rng.choice(["noise", "edges"]), rng.randrange(2**30))  # fmt: skip
    x = base[:, : source[1], : source[2]]
    return x, *size, patch_size, bicubic, arithmetic


@needs_native
def test_random_configurations():
    rng = random.Random(0)
    for _ in range(300):
        args = random_case(rng, 200, 200)
        x, *size, patch_size, bicubic, arithmetic = args
        out = torch.ops.keye_ops.patchify(*args)
        mode = "bicubic" if bicubic else "bilinear"
        if arithmetic == 0:
            order = pillow_is_vertical_first(x.shape[1:3], size)
            out = torch.ops.keye_ops.patchify(*args, order)
            assert torch.equal(out, pillow(x, size, mode, patch_size)), args[1:]
        elif arithmetic == 1:
            assert torch.equal(out, interpolated(x, size, mode, patch_size)), args[1:]
        else:
            assert_rounded(out, exact(x, size, mode, patch_size))


@needs_native
@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_random_configurations_and_orders_of_cuda_threads():
    """300 configurations under 4 schedules: no finding, and the CPU kernel's bits."""
    order, completion = executor().Order, executor().Completion
    schedules = [
        {"order": order.in_order, "completion": completion.early},
        {"order": order.reversed, "completion": completion.late, "preempt_one_in": 1},
        {"order": order.random, "completion": completion.random, "preempt_one_in": 16},
        {"order": order.random, "seed": 5, "preempt_one_in": 4},
    ]
    rng = random.Random(1)
    for _ in range(300):
        args = random_case(rng, 24, 32)
        want = torch.ops.keye_ops.patchify(*args)
        for schedule in schedules:
            with host_cuda(**schedule):
                out = torch.ops.keye_ops.patchify(*args)
                assert [len(report.findings) for report in take_reports()] == [0]
            assert torch.equal(out, want), args[1:]


@needs_native
def test_threads_do_not_change_bits():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x = pictures((2, 700, 900))
            for arithmetic in ARITHMETIC:
                results.append(keye_ops.patchify(x, (700, 700), arithmetic=arithmetic))
    finally:
        torch.set_num_threads(before)
    for i, result in enumerate(results):
        assert torch.equal(result, results[i % 3])


# ---- weights ----


@pytest.mark.parametrize(("source", "size"), [(1080, 672), (31, 14), (9, 28), (4000, 28), (1, 14)])
@pytest.mark.parametrize("bicubic", [False, True])
def test_weights_sum_to_one(source, size, bicubic):
    for arithmetic, name in enumerate(ARITHMETIC):
        axis = resample_filter(source, size, bicubic, arithmetic)
        total = axis.weights.double().sum(1)
        unit = 1.0 if name == "float32" else 2.0**axis.precision
        taps = axis.weights.shape[1]
        assert ((total / unit - 1).abs() <= taps / 2 / unit + 1e-12).all()
        assert name != "uint8" or int(axis.weights.max()) < 2**15


# ---- errors ----


CALLS = {
    "public": lambda x, height=28, width=28, **options: keye_ops.patchify(
        x, (height, width), **options
    ),
    "registered": lambda x, height=28, width=28, **options: torch.ops.keye_ops.patchify(
        x, height, width, **options
    ),
    "reference": lambda x, height=28, width=28, **options: patchify_reference(
        x, height, width, **options
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda x: x.float(), {}, "frames must be uint8, got torch.float32"),
        (lambda x: x[0], {}, r"frames must be \[T, H, W, 3\], got \[30, 40, 3\]"),
        (lambda x: x[..., :2], {}, r"frames must be \[T, H, W, 3\], got \[1, 30, 40, 2\]"),
        (lambda x: x[:, :0], {}, r"frames must have sides from 1 to 32768, got \[0, 40\]"),
        (
            lambda x: x[:, :1, :1].expand(1, 1, 32769, 3).contiguous(),
            {},
            r"frames must have sides from 1 to 32768, got \[1, 32769\]",
        ),
        (None, {"patch_size": 0}, "patch_size must be from 1 to 64, got 0"),
        (None, {"patch_size": 65}, "patch_size must be from 1 to 64, got 65"),
        (None, {"height": 30}, "height must be a multiple of 14 up to 32768, got 30"),
        (None, {"height": -14}, "height must be a multiple of 14 up to 32768, got -14"),
        (None, {"width": 0}, "width must be a multiple of 14 up to 32768, got 0"),
        (None, {"width": 32774}, "width must be a multiple of 14 up to 32768, got 32774"),
    ],
)
def test_errors(call, change, options, message):
    x = pictures((1, 30, 40))
    x = change(x) if change else x
    with pytest.raises(RuntimeError, match="^patchify: " + message + "$"):
        CALLS[call](x, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            partial(keye_ops.patchify, mode="area"),
            "mode must be one of bilinear, bicubic, got area",
        ),
        (
            partial(keye_ops.patchify, arithmetic="fp8"),
            "arithmetic must be one of pillow, uint8, float32, got fp8",
        ),
        (
            partial(keye_ops.patchify, size=(28, 28), grid=(2, 2)),
            r"size or grid must be None, got \(\(28, 28\), \(2, 2\)\)",
        ),
        (
            partial(keye_ops.patchify, arithmetic="uint8", vertical_first=True),
            "vertical_first must be False but for pillow, got True",
        ),
        (
            lambda x: torch.ops.keye_ops.patchify(x, 28, 28, arithmetic=3),
            r"arithmetic must be 0 \(pillow\), 1 \(uint8\) or 2 \(float32\), got 3",
        ),
        (
            lambda x: patchify_reference(x, 28, 28, arithmetic=-1),
            r"arithmetic must be 0 \(pillow\), 1 \(uint8\) or 2 \(float32\), got -1",
        ),
    ],
)
def test_errors_of_options(call, message):
    with pytest.raises(RuntimeError, match="^patchify: " + message + "$"):
        call(pictures((1, 28, 28)))


@needs_native
def test_the_registered_op_refuses_unpacked_pixels():
    message = r"frames must have packed pixels \(strides 3 and 1\), got strides 6 and 1"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.keye_ops.patchify(pictures((1, 28, 56))[:, :, ::2], 28, 28)


# ---- torch ----


@pytest.mark.parametrize("arithmetic", range(3))
def test_opcheck(arithmetic, device):
    x = pictures((2, 20, 33)).to(device)
    torch.library.opcheck(torch.ops.keye_ops.patchify, (x, 14, 28, 14, True, arithmetic))


def test_one_graph_for_all_shapes():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(x, height, width):
        return keye_ops.patchify(x, (height, width))

    for shape, size in (((2, 40, 50), (28, 56)), ((3, 30, 66), (42, 70)), ((4, 90, 31), (84, 98))):
        x = pictures(shape)
        assert torch.equal(compiled(x, *size), keye_ops.patchify(x, size))
    assert counter.frame_count == 1


def test_a_graph_takes_unpacked_pixels():
    x = pictures((1, 20, 30)).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    compiled = torch.compile(keye_ops.patchify, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, (14, 14)), keye_ops.patchify(x, (14, 14)))


@on_each_lesser_instruction_set
def test_this_file_on_a_lesser_instruction_set(isa):
    rerun(__file__, isa, "not lesser and not compile and not graph and not host_cuda and not cuda")
