"""patch_embed against convolution and interpolate, image by image; gradients; wrong input."""

import os
import random

import pytest
import torch
import torch.nn.functional as F
from host_cuda import executor, host_cuda, take_reports, unavailable
from tolerance import assert_within_twice
from torch._dynamo.testing import CompileCounterWithBackend

import keye_ops
from keye_ops import PackedGrid, dispatch
from keye_ops.patch_embed import (
    _unsupported,
    patch_embed_backward_reference,
    patch_embed_reference,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
WAYS = ["public", "registered"]
BATCHES = {
    "keye": [(1, 16, 20), (2, 6, 8)],
    "odd": [(1, 3, 5), (1, 1, 7), (3, 1, 1)],
    "one": [(1, 1, 1)],
    "none": [],
    "larger than the table": [(1, 40, 2), (1, 30, 33)],
    "as large as the table": [(1, 7, 7)],
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Products this small only get slower when threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def patch_embed(way, pixel_values, weight, bias, table, grid, align_corners=False, **normalise):
    if dispatch.kernel_device(weight) == "cuda" and way == "registered":
        unsupported = _unsupported(pixel_values, weight, bias, table)
        if not dispatch.use_native("patch_embed", pixel_values, unsupported):
            pytest.skip(unsupported)
    if way == "public":
        options = {"align_corners": align_corners, **normalise}
        return keye_ops.patch_embed(pixel_values, weight, bias, table, grid, **options)
    index = (grid.grid, grid.image_offsets, grid.position_ids, align_corners)
    op = torch.ops.keye_ops.patch_embed
    return op(pixel_values, weight, bias, table, *index, *normalise.values())


def make(total, dtype=torch.float64, hidden=24, side=7, patch=4, seed=0, device="cpu"):
    """pixel_values, weight, bias and table."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(total, 3, patch, patch), (hidden, 3, patch, patch), (hidden,), (side * side, hidden)]
    scales = (1.0, 1 / 7, 1.0, 1.0)
    tensors = [torch.randn(x, generator=generator, dtype=torch.float64) for x in shapes]
    return [(x * scale).to(device, dtype) for x, scale in zip(tensors, scales, strict=True)]


def positions(table, grid, align_corners):
    """The resized table's rows at every patch, frame by frame."""
    side, offset = round(table.shape[0] ** 0.5), 0
    square = table.T.reshape(1, -1, side, side)
    rows = [table[:0]]
    for t, h, w in grid.grid_thw:
        mode = {"mode": "bilinear", "align_corners": align_corners}
        resized = F.interpolate(square, (h, w), **mode)[0]
        for row, column in grid.position_ids[offset : offset + t * h * w].tolist():
            rows.append(resized[:, row, column][None])
        offset += t * h * w
    return torch.cat(rows)


def plain_patch_embed(pixel_values, weight, bias, table, grid, align_corners=False):
    tokens = F.linear(pixel_values.flatten(1), weight.flatten(1), bias)
    return tokens + positions(table, grid, align_corners)


def oracle(pixel_values, weight, bias, table, grid, align_corners=False):
    """Every frame is put together from its patches and convolved."""
    size, offset = weight.shape[-1], 0
    outputs = [weight.new_zeros(0, weight.shape[0])]
    for t, h, w in grid.grid_thw:
        for _ in range(t):
            places = grid.position_ids[offset : offset + h * w].tolist()
            image = weight.new_zeros(3, h * size, w * size)
            for i, (row, column) in enumerate(places):
                patch = pixel_values[offset + i].reshape(3, size, size)
                top, left = row * size, column * size
                image[:, top : top + size, left : left + size] = patch
            features = F.conv2d(image[None], weight, bias, stride=size)[0]
            outputs.append(torch.stack([features[:, r, c] for r, c in places]))
            offset += h * w
    return torch.cat(outputs) + positions(table, grid, align_corners)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("batch", "order"), [*((x, "raster") for x in BATCHES), ("keye", "block"), ("none", "block")]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_values(way, dtype, batch, align_corners, order, device):
    grid = PackedGrid.from_grid_thw(BATCHES[batch], order=order, device=device)
    inputs = make(grid.total, dtype, device=device)
    actual = patch_embed(way, *inputs, grid, align_corners)
    plain = plain_patch_embed(*inputs, grid, align_corners)
    exact = oracle(*(x.double() for x in inputs), grid, align_corners)
    assert actual.is_contiguous()
    assert_within_twice(actual, plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_values_at_the_size_of_keye(way, dtype, device):
    grid = PackedGrid.from_grid_thw([(1, 4, 6), (1, 2, 2)], device=device)
    inputs = make(grid.total, dtype, hidden=1152, side=27, patch=14, device=device)
    actual = patch_embed(way, *inputs, grid)
    exact = oracle(*(x.double() for x in inputs), grid)
    assert_within_twice(actual, plain_patch_embed(*inputs, grid), exact)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("way", WAYS)
def test_flat_pixels_flat_weight_and_no_bias(way, dtype, align_corners, device):
    grid = PackedGrid.from_grid_thw([(1, 4, 6), (2, 3, 3)], device=device)
    pixel_values, weight, bias, table = make(grid.total, dtype, device=device)
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
    want = oracle(pixel_values, weight, None, table, grid, align_corners)
    flat = (pixel_values.flatten(1), weight.flatten(1), None, table)
    actual = patch_embed(way, *flat, grid, align_corners)
    torch.testing.assert_close(actual, want, **close)
    with_bias = patch_embed(way, pixel_values, weight, bias, table, grid, align_corners)
    torch.testing.assert_close(with_bias, want + bias, **close)


@pytest.mark.parametrize("normalise", [(), ((0.4, 0.5, 0.6), (0.2, 0.3, 0.1))])
@pytest.mark.parametrize("batch", ["keye", "one", "none"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("way", WAYS)
def test_uint8_pixels(way, dtype, batch, normalise, device):
    grid = PackedGrid.from_grid_thw(BATCHES[batch], device=device)
    _, *parameters = make(grid.total, dtype, device=device)
    shape = (grid.total, 3, 4, 4)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator())
    pixels = pixels.to(device)
    options = dict(zip(("image_mean", "image_std"), normalise, strict=False))
    actual = patch_embed(way, pixels, *parameters, grid, **options)

    mean, std = normalise or ((0.5,) * 3, (0.5,) * 3)
    tensors = (torch.tensor(x, dtype=torch.float64, device=device) for x in (mean, std))
    mean, std = (x[None, :, None, None] for x in tensors)
    floats = (pixels.double() / 255 - mean) / std
    plain = plain_patch_embed(floats.to(dtype), *parameters, grid)
    exact = oracle(floats, *(x.double() for x in parameters), grid)
    assert_within_twice(actual, plain, exact)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("patch", [3, 4])
def test_pixels_of_another_dtype_take_the_weights(patch, dtype, way, device):
    grid = PackedGrid.from_grid_thw([(1, 4, 6)], device=device)
    pixel_values, *parameters = make(grid.total, torch.bfloat16, patch=patch, device=device)
    actual = patch_embed(way, pixel_values.to(dtype), *parameters, grid)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, patch_embed(way, pixel_values, *parameters, grid))


LAYOUTS = {
    "channels last": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "rows": lambda x: torch.nn.functional.pad(x.flatten(1), (0, 4))[:, : x[0].numel()],
    "odd rows": lambda x: torch.nn.functional.pad(x.flatten(1), (1, 2))[:, 1 : 1 + x[0].numel()],
    "one row for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("pixel_dtype", [None, torch.float32, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_strided_pixels(way, layout, dtype, pixel_dtype, device):
    grid = PackedGrid.from_grid_thw([(1, 2, 6)], device=device)
    pixel_values, *parameters = make(grid.total, dtype, patch=5, device=device)
    pixel_values = (64 * pixel_values).abs().to(pixel_dtype or dtype)
    strided = LAYOUTS[layout](pixel_values)
    assert not strided.is_contiguous()
    actual = patch_embed(way, strided, *parameters, grid)
    want = patch_embed(way, strided.contiguous(), *parameters, grid)
    scale = want.double().abs().max().item()
    tolerance = 2 * torch.finfo(dtype).eps * scale  # torch's product may add in another order
    torch.testing.assert_close(actual, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("way", WAYS)
def test_special_values_stay_in_their_patch(way, value, device):
    grid = PackedGrid.from_grid_thw([(1, 4, 6)], device=device)
    pixel_values, *parameters = make(grid.total, torch.float32, device=device)
    want = patch_embed(way, pixel_values, *parameters, grid)
    pixel_values[5, 1, 2, 3] = value
    actual = patch_embed(way, pixel_values, *parameters, grid)
    others = torch.arange(24, device=device) != 5
    assert not actual[5].isfinite().any()
    torch.testing.assert_close(actual[others], want[others])


def test_host_integers_stand_for_a_grid():
    pixel_values, *parameters = make(24)
    want = keye_ops.patch_embed(pixel_values, *parameters, PackedGrid.from_grid_thw([(1, 4, 6)]))
    assert torch.equal(keye_ops.patch_embed(pixel_values, *parameters, [(1, 4, 6)]), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_transformers(dtype):
    models = pytest.importorskip("transformers.models.paddleocr_vl.modeling_paddleocr_vl")
    options = {"hidden_size": 24, "image_size": 28, "patch_size": 4, "num_attention_heads": 2}
    config = models.PaddleOCRVisionConfig(**options)
    module = models.PaddleOCRVisionEmbeddings(config).to(dtype)
    grid = PackedGrid.from_grid_thw([(1, 4, 6), (1, 3, 9), (1, 10, 8)])
    inputs = make(grid.total, dtype)
    with torch.no_grad():
        module.patch_embedding.weight.copy_(inputs[1])
        module.patch_embedding.bias.copy_(inputs[2])
        module.position_embedding.weight.copy_(inputs[3])
        theirs = module(inputs[0][None], grid_thw=torch.tensor(grid.grid_thw))
    exact = oracle(*(x.double() for x in inputs), grid)
    assert_within_twice(keye_ops.patch_embed(*inputs, grid), theirs, exact)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("grid_thw", [[(1, 4, 6), (2, 3, 1)], [(1, 9, 8)], []])
def test_gradients(grid_thw, align_corners):
    """The registered gradient, the reference's autograd and finite differences agree."""
    grid = PackedGrid.from_grid_thw(grid_thw)
    inputs = [x.requires_grad_() for x in make(grid.total, hidden=3, side=3, patch=2)]
    index = (grid.grid, grid.image_offsets, grid.position_ids, align_corners)
    out = patch_embed("registered", *inputs, grid, align_corners)
    dout = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator())
    actual = torch.autograd.grad(out, inputs, dout)
    want = torch.autograd.grad(patch_embed_reference(*inputs, *index), inputs, dout)
    torch.testing.assert_close(actual, want, rtol=1e-12, atol=1e-12)
    if grid.total:
        op = torch.ops.keye_ops.patch_embed
        assert torch.autograd.gradcheck(lambda *x: op(*x, *index), inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("align_corners", [False, True])
def test_gradients_within_twice_of_plain(align_corners, way, dtype, device):
    grid = PackedGrid.from_grid_thw([(1, 12, 10), (2, 4, 6), (1, 1, 7)], device=device)
    inputs = make(grid.total, dtype, patch=3, device=device)
    dout = torch.randn(grid.total, 24, dtype=torch.float64, generator=torch.Generator())
    dout = dout.to(device, dtype)

    def grads(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves, grid, align_corners)
        return torch.autograd.grad(out, leaves, dout.to(dtype))

    actual = grads(lambda *x: patch_embed(way, *x), dtype)
    plain, exact = grads(plain_patch_embed, dtype), grads(oracle, torch.float64)
    for triple in zip(actual, plain, exact, strict=True):
        assert_within_twice(*triple)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_with_uint8_pixels_and_without_bias(dtype, device):
    grid = PackedGrid.from_grid_thw([(1, 4, 6)], device=device)
    inputs = make(grid.total, dtype, hidden=8, device=device)
    _, weight, _, table = [x.requires_grad_() for x in inputs]
    pixels = torch.randint(0, 256, (24, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator())
    pixels = pixels.to(device)
    patch_embed("registered", pixels, weight, None, table, grid).square().sum().backward()
    floats = (pixels.float() / 127.5 - 1).to(dtype)
    out = oracle(floats, weight, None, table, grid).square().sum()
    want = torch.autograd.grad(out, (weight, table))
    torch.testing.assert_close((weight.grad, table.grad), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", range(4))
def test_a_frozen_input_gets_no_gradient(frozen, device):
    grid = PackedGrid.from_grid_thw([(1, 2, 2)], device=device)
    inputs = make(grid.total, torch.float32, device=device)
    inputs = [x.requires_grad_(i != frozen) for i, x in enumerate(inputs)]
    patch_embed("registered", *inputs, grid).sum().backward()
    assert [x.grad is None for x in inputs] == [i == frozen for i in range(4)]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("grid_thw", [[(1, 4, 6), (1, 2, 3)], []])
def test_opcheck(grid_thw, with_bias):
    grid = PackedGrid.from_grid_thw(grid_thw)
    inputs = [x.requires_grad_() for x in make(grid.total, torch.float32, hidden=3)]
    inputs[2] = inputs[2] if with_bias else None
    args = (*inputs, grid.grid, grid.image_offsets, grid.position_ids)
    torch.library.opcheck(torch.ops.keye_ops.patch_embed.default, args)


def test_compile_makes_one_graph_for_all_sizes():
    counter, graphs = CompileCounterWithBackend("aot_eager"), []

    def function(pixel_values, weight, bias, table, grid):
        return keye_ops.patch_embed(pixel_values.sin(), weight, bias, table, grid).cos()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for grid_thw in ([(1, 4, 6)] * 5, [(1, 3, 5), (2, 2, 3)] * 3, [(1, 2, 2)] * 7):
        grid = PackedGrid.from_grid_thw(grid_thw)
        inputs = [x.requires_grad_() for x in make(grid.total, hidden=8)]
        with keye_ops.backend("auto"):
            out, want = compiled(*inputs, grid), function(*inputs, grid)
        torch.testing.assert_close(out, want)
        gradients = [torch.autograd.grad(x.square().sum(), inputs) for x in (out, want)]
        torch.testing.assert_close(*gradients)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3


# ---- values that only a device sees ----

needs_host_cuda = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1
IMAGES = [(1, 3, 4), (2, 2, 1), (1, 1, 5)]  # patches 0 to 11, 12 to 15, 16 to 20
OF_GRID = "grid must hold positive (t, h, w), got "
OF_OFFSETS = "image_offsets must be the sums of t * h * w up to the patches, got "
OF_POSITIONS = "position_ids must lie inside their image's grid, got "
# Which tensor is changed where to what; which patches are bad then; what is reported.
HOSTILE = {
    "row before the first": ("position_ids", (3, 0), -1, [3], f"{OF_POSITIONS}-1"),
    "row behind the last": ("position_ids", (3, 0), 3, [3], f"{OF_POSITIONS}3"),
    "column past int32": ("position_ids", (0, 1), 2**40, [0], f"{OF_POSITIONS}{2**40}"),
    "largest row": ("position_ids", (20, 0), INT64_MAX, [20], OF_POSITIONS),
    "least column": ("position_ids", (12, 1), -INT64_MAX - 1, [12], OF_POSITIONS),
    "no rows": ("grid", (1, 1), 0, range(12, 16), f"{OF_GRID}0"),
    "no frames": ("grid", (1, 0), 0, range(12, 16), f"{OF_GRID}0"),
    "negative columns": ("grid", (0, 2), -4, range(12), f"{OF_GRID}-4"),
    "too many rows": ("grid", (1, 1), INT32_MAX, range(12, 16), f"{OF_OFFSETS}16"),
    "huge images": ("grid", slice(None), INT32_MAX, range(21), OF_OFFSETS),
    "late start": ("image_offsets", 0, 3, range(12), OF_OFFSETS),
    "early end": ("image_offsets", 3, 19, range(16, 21), OF_OFFSETS),
    "late end": ("image_offsets", 3, INT32_MAX, range(16, 21), f"{OF_OFFSETS}{INT32_MAX}"),
    "least offsets": ("image_offsets", slice(None), -(2**31), range(21), OF_OFFSETS),
    "largest offsets": ("image_offsets", slice(None), INT32_MAX, range(21), OF_OFFSETS),
}


def hostile_index(how, grid):
    """grid, image_offsets and position_ids with a change, the bad patches, the message."""
    name, place, value, bad, message = HOSTILE[how]
    index = {x: getattr(grid, x).clone() for x in ("grid", "image_offsets", "position_ids")}
    index["position_ids"] = index["position_ids"].long()
    index[name][place] = value
    is_bad = torch.zeros(grid.total, dtype=torch.bool, device=grid.grid.device)
    is_bad[list(bad)] = True
    return tuple(index.values()), is_bad, message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", HOSTILE)
def test_bad_values_on_a_device_make_zeros_and_a_report(how, dtype, device):
    grid = PackedGrid.from_grid_thw(IMAGES, device=device)
    inputs = make(grid.total, dtype, device=device)
    index, is_bad, message = hostile_index(how, grid)
    op = torch.ops.keye_ops.patch_embed
    if dispatch.kernel_device(inputs[0]) == "cpu":
        with pytest.raises(RuntimeError, match=r"patch_embed: .*must"):
            op(*inputs, *index)
        return
    want = patch_embed("registered", *inputs, grid)
    keye_ops.check_errors()
    actual = op(*inputs, *index)
    assert not actual[is_bad].any()
    assert torch.equal(actual[~is_bad], want[~is_bad])
    with pytest.raises(RuntimeError, match=r"^patch_embed: ") as raised:
        keye_ops.check_errors()
    assert message in str(raised.value)

    # A bad patch has no part in the gradient of the table.
    dout = torch.randn(actual.shape, generator=torch.Generator()).to(device, dtype)
    options = (False, False, False, [0.5] * 3, [0.5] * 3)
    backward = torch.ops.keye_ops.patch_embed_backward
    parameters = (inputs[0], inputs[1], inputs[3])
    dtable = backward(dout, *parameters, *index, *options)[3]
    with pytest.raises(RuntimeError, match=r"^patch_embed: "):
        keye_ops.check_errors()
    good = dout.masked_fill(is_bad[:, None], 0)
    index = (grid.grid, grid.image_offsets, grid.position_ids)
    torch.testing.assert_close(dtable, backward(good, *parameters, *index, *options)[3])
    keye_ops.check_errors()


def test_no_image_on_a_device(device):
    inputs = make(2, torch.float32, device=device)
    integers = {"dtype": torch.int32, "device": device}
    index = [torch.zeros(shape, **integers) for shape in ((0, 3), (1,), (2, 2))]
    if dispatch.kernel_device(inputs[0]) == "cpu":
        pytest.skip("the CPU refuses it")
    assert not torch.ops.keye_ops.patch_embed(*inputs, *index).any()
    dispatch.use_native("patch_embed", inputs[0])
    with pytest.raises(RuntimeError, match="patch_embed: image_offsets must be the sums"):
        keye_ops.check_errors()


def test_random_offsets_and_grids_on_a_device(device):
    grid = PackedGrid.from_grid_thw(IMAGES * 3, device=device)
    inputs = make(grid.total, torch.float32, hidden=8, patch=2, device=device)
    if dispatch.kernel_device(inputs[0]) == "cpu":
        pytest.skip("the CPU refuses them")
    want = patch_embed("registered", *inputs, grid)
    numbers = random.Random(0)
    for _ in range(20):
        index = [grid.grid.clone(), grid.image_offsets.clone(), grid.position_ids.clone()]
        for _ in range(numbers.randint(1, 9)):
            flat = numbers.choice(index).view(-1)
            limit = numbers.choice([1, 5, 70, 2**31])
            flat[numbers.randrange(len(flat))] = numbers.randint(-limit, limit - 1)
        actual = torch.ops.keye_ops.patch_embed(*inputs, *index)
        assert actual.isfinite().all()
        untouched = all(
            torch.equal(a, b)
            for a, b in zip(index, (grid.grid, grid.image_offsets, grid.position_ids), strict=True)
        )
        assert not untouched or torch.equal(actual, want)
    with pytest.raises(RuntimeError, match=r"^patch_embed: "):
        keye_ops.check_errors()


# ---- layouts and sizes that a device must stand ----


def test_pixels_and_positions_far_apart(device):
    """Rows 2**31 elements from one another; pages that nobody touches take no memory."""
    pixel_values, *parameters = make(2, torch.bfloat16, hidden=8, patch=3, device=device)
    grid = PackedGrid.from_grid_thw([(1, 1, 2)], device=device)
    want = patch_embed("registered", pixel_values, *parameters, grid)
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    far = far.as_strided((2, 3, 3, 3), (2**31 + 8, 9, 3, 1))
    far.copy_(pixel_values)
    positions = torch.empty(2**31 + 4, dtype=torch.int32, device=device)
    positions = positions.as_strided((2, 2), (2**31 + 1, 1))
    positions.copy_(grid.position_ids)
    index = (grid.grid, grid.image_offsets, positions)
    assert torch.equal(torch.ops.keye_ops.patch_embed(far, *parameters, *index), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_long_lists_of_patches_are_summed_in_parts(dtype, device):
    """Images of one patch all take the middle of the table."""
    total = 17000 if dispatch.kernel_device(torch.empty(0)) == "cpu" else 16400
    grid = PackedGrid.from_grid_thw([(1, 1, 1)] * total, device=device)
    inputs = make(total, dtype, hidden=8, side=2, patch=1, device=device)
    dout = torch.randn(total, 8, generator=torch.Generator()).to(device, dtype)
    leaves = [x.requires_grad_() for x in inputs]
    dtable = torch.autograd.grad(patch_embed("registered", *leaves, grid), leaves, dout)[3]
    exact = dout.double().sum(0).expand(4, 8) / 4
    plain = dout.sum(0).expand(4, 8) / 4
    assert_within_twice(dtable, plain, exact)


# ---- the same bits for any order of threads, and random problems ----


def random_problem(seed):
    """Arguments of the registered op, and the gradient of its output."""
    numbers = random.Random(seed)
    dtype = numbers.choice([torch.float32, torch.float16, torch.bfloat16])
    block = numbers.random() < 0.3
    sizes = [
        (numbers.randint(1, 2), *(numbers.randint(1, 4) * (2 if block else 1) for _ in range(2)))
        for _ in range(numbers.randint(0, 4))
    ]
    grid = PackedGrid.from_grid_thw(sizes, order="block" if block else "raster")
    hidden = numbers.choice([8, 8, 16, 24, 40])
    patch, side = numbers.randint(1, 5), numbers.randint(1, 5)
    pixel_values, weight, bias, table = make(grid.total, dtype, hidden, side, patch, seed)
    pixels = numbers.choice(["same", "float", "byte"])
    if pixels == "float":
        pixel_values = pixel_values.float()
    elif pixels == "byte":
        pixel_values = (pixel_values.double() * 64 + 128).clamp(0, 255).to(torch.uint8)
    layout = numbers.choice(["contiguous", *LAYOUTS])
    if layout != "contiguous" and grid.total:
        pixel_values = LAYOUTS[layout](pixel_values)
    index = [
        grid.grid,
        grid.image_offsets,
        grid.position_ids.to(numbers.choice([torch.int64, None])),
    ]
    if numbers.random() < 0.3:
        index[2] = index[2].T.contiguous().T
    bias = bias if numbers.random() < 0.7 else None
    options = (numbers.random() < 0.5, [0.48, 0.46, 0.41], [0.27, 0.26, 0.28])
    dout = torch.randn(grid.total, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return (pixel_values, weight, bias, table, *index, *options), dout


def outputs_and_gradients(function, backward, args, dout):
    """Of one implementation, all at once."""
    pixel_values, weight, bias, table, *index, align_corners, mean, std = args
    needs_dpixels = pixel_values.dtype != torch.uint8
    options = (needs_dpixels, bias is not None, align_corners, mean, std)
    gradients = backward(dout, pixel_values, weight, table, *index, *options)
    return [function(*args), *gradients]


def in_fp64(args, dout):
    """The same with floating tensors in fp64; bytes become the floats that they stand for."""
    pixel_values, weight, *rest, mean, std = args
    if pixel_values.dtype == torch.uint8:
        shift, factor = (torch.tensor(x, dtype=torch.float64)[:, None] for x in (mean, std))
        flat = pixel_values.flatten(1).unflatten(1, (3, -1)).double()
        pixel_values = ((flat / 255 - shift) / factor).flatten(1)
    rounded = pixel_values.to(weight.dtype).double()
    rest = [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in rest
    ]
    return (rounded, weight.double(), *rest, mean, std), dout.double()


EXAMPLES = int(os.environ.get("KEYE_OPS_EXECUTOR_EXAMPLES", "12"))


@needs_host_cuda
def test_random_problems_under_several_schedules():
    op, backward = torch.ops.keye_ops.patch_embed, torch.ops.keye_ops.patch_embed_backward
    order = executor().Order
    schedules = [(order.in_order, 0), (order.reversed, 1), (order.random, 4), (order.random, 16)]
    pools = {}
    for seed in range(EXAMPLES):
        args, dout = random_problem(seed)
        results = []
        for number, (kind, preempt_one_in) in enumerate(schedules):
            with host_cuda(seed=seed + number, order=kind, preempt_one_in=preempt_one_in):
                results.append(outputs_and_gradients(op, backward, args, dout))
                assert not any(report.findings for report in take_reports())
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), seed
        reference = (patch_embed_reference, patch_embed_backward_reference)
        plain = outputs_and_gradients(*reference, args, dout)
        exact = outputs_and_gradients(*reference, *in_fp64(args, dout))
        for place, triple in enumerate(zip(results[0], plain, exact, strict=True)):
            if triple[0].dtype != torch.uint8:  # bytes have no gradient
                key = place, triple[0].dtype
                pools.setdefault(key, []).append([x.flatten() for x in triple])
    # NOTE: pooled, for the mean error of a few elements says little.
    for pool in pools.values():
        got, plain, exact = (torch.cat(parts) for parts in zip(*pool, strict=True))
        assert_within_twice(got, plain.to(got.dtype), exact)


GOOD = dict(zip(("pixel_values", "weight", "bias", "table"), make(6, torch.float32), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight": GOOD["weight"].int()},
            "weight must be fp64, fp32, fp16 or bf16, got torch.int32",
        ),
        (
            {"weight": GOOD["weight"][0]},
            r"weight must be \[C, 3, 14, 14\] or \[C, K\], got \[3, 4, 4\]",
        ),
        (
            {"pixel_values": GOOD["pixel_values"].int()},
            r"pixel_values \(unless uint8\) must be fp64, fp32, fp16 or bf16, got torch.int32",
        ),
        (
            {"pixel_values": GOOD["pixel_values"][:, :2]},
            r"pixel_values must be \[N, ...\] with 48 values a patch, got \[6, 2, 4, 4\]",
        ),
        ({"pixel_values": GOOD["pixel_values"][:, 0, 0, 0]}, r"with 48 values a patch, got \[6\]"),
        (
            {"pixel_values": GOOD["pixel_values"][:5]},
            "pixel_values must hold the 6 patches of the grid, got 5",
        ),
        ({"bias": GOOD["bias"][1:]}, r"bias must be \[24\], got \[23\]"),
        (
            {"bias": GOOD["bias"].half()},
            r"bias must have the dtype and device of weight \(torch.float32, cpu\), got torch.f",
        ),
        (
            {"table": GOOD["table"][:, 1:]},
            r"position_embedding must be \[S\*S, 24\], got \[49, 23\]",
        ),
        (
            {"table": GOOD["table"].half()},
            "position_embedding must have the dtype and device of weight",
        ),
        (
            {"table": GOOD["table"][1:]},
            "position_embedding must have a square number of rows, got 48",
        ),
        (
            {"table": GOOD["table"][:0]},
            "position_embedding must have a square number of rows, got 0",
        ),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_wrong_input(way, changes, message):
    grid = PackedGrid.from_grid_thw([(1, 2, 3)])
    with pytest.raises(RuntimeError, match=f"patch_embed: .*{message}"):
        patch_embed(way, *{**GOOD, **changes}.values(), grid)


def test_wrong_position_ids():
    grid = PackedGrid.from_grid_thw([(1, 2, 3)])
    index = (grid.grid, grid.image_offsets, grid.position_ids.float())
    message = "patch_embed: position_ids must be int32 or int64 on cpu, got torch.float32 on cpu"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.keye_ops.patch_embed(*GOOD.values(), *index)


def test_pixels_on_another_device():
    grid = PackedGrid.from_grid_thw([(1, 2, 3)])
    inputs = {**GOOD, "pixel_values": GOOD["pixel_values"].to("meta")}
    with pytest.raises(RuntimeError, match="patch_embed: pixel_values must be on cpu, got meta"):
        patch_embed_reference(*inputs.values(), grid.grid, grid.image_offsets, grid.position_ids)
