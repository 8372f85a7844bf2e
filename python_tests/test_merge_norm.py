"""merge_norm against loops over merged squares, in both orders of norm and merge; gradients."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_within_twice
from torch._dynamo.testing import CompileCounterWithBackend

import keye_ops
from keye_ops import PackedGrid
from keye_ops.merge_norm import merge_norm_reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
WAYS = ["public", "registered"]
FORMS = ["preview", "1.5"]
BATCHES = {
    "keye": [(1, 16, 20), (2, 6, 8)],
    "small": [(1, 2, 2), (3, 2, 4), (1, 6, 2)],
    "one token": [(1, 2, 2)],
    "none": [],
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Products this small only get slower when threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def merge_norm(way, x, weight, bias, grid, eps=1e-5):
    if way == "public":
        return keye_ops.merge_norm(x, weight, bias, grid, eps=eps)
    options = (grid.spatial_merge_size, grid.order == "block", eps)
    return torch.ops.keye_ops.merge_norm(x, weight, bias, grid.grid, grid.image_offsets, *options)


def make(total, form, dtype=torch.float64, hidden=18, seed=0):
    """x, weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    normed = hidden if form == "preview" else 4 * hidden
    shapes = [(total, hidden), (normed,), (normed,)]
    return [torch.randn(x, generator=generator, dtype=torch.float64).to(dtype) for x in shapes]


def squares(x, grid):
    """The 4 patches of every merged token, found by their places."""
    tokens, start = [x.new_zeros(0, 4, x.shape[1])], 0
    for t, h, w in grid.grid_thw:
        for _ in range(t):
            places = map(tuple, grid.position_ids[start : start + h * w].tolist())
            where = {place: start + i for i, place in enumerate(places)}
            for row in range(0, h, 2):
                for column in range(0, w, 2):
                    square = [(0, 0), (0, 1), (1, 0), (1, 1)]
                    rows = [where[row + i, column + j] for i, j in square]
                    tokens.append(torch.stack([x[i] for i in rows])[None])
            start += h * w
    return torch.cat(tokens)


def oracle(x, weight, bias, grid, eps=1e-5):
    """Mean and variance by hand."""
    tokens = squares(x, grid)
    if len(weight) != x.shape[1]:
        tokens = tokens.flatten(1)
    centred = tokens - tokens.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return (centred / (variance + eps).sqrt() * weight + bias).reshape(-1, 4 * x.shape[1])


def plain_merge_norm(x, weight, bias, grid, eps=1e-5):
    tokens = squares(x, grid)
    if len(weight) != x.shape[1]:
        tokens = tokens.flatten(1)
    return F.layer_norm(tokens, weight.shape, weight, bias, eps).reshape(-1, 4 * x.shape[1])


def compare(way, inputs, grid, **options):
    actual = merge_norm(way, *inputs, grid, **options)
    exact = oracle(*(x.double() for x in inputs), grid, **options)
    assert actual.is_contiguous()
    assert_within_twice(actual, plain_merge_norm(*inputs, grid, **options), exact)


@pytest.mark.parametrize("order", ["raster", "block"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_values(way, dtype, form, batch, order):
    grid = PackedGrid.from_grid_thw(BATCHES[batch], order=order)
    compare(way, make(grid.total, form, dtype), grid)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_the_width_of_keye(way, dtype, form):
    grid = PackedGrid.from_grid_thw([(1, 4, 6)])
    compare(way, make(grid.total, form, dtype, hidden=1152), grid)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_eps(way, form):
    grid = PackedGrid.from_grid_thw([(1, 4, 6)])
    x, weight, bias = make(grid.total, form)
    compare(way, (x * 0.1, weight, bias), grid, eps=0.5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_an_offset_does_not_cancel_the_variance(way, form):
    grid = PackedGrid.from_grid_thw([(1, 4, 6)])
    x, weight, bias = make(grid.total, form, torch.float32)
    compare(way, (x + 1e4, weight, bias), grid)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_strided_rows(way, form):
    grid = PackedGrid.from_grid_thw([(1, 4, 6)])
    x, weight, bias = make(grid.total, form)
    strided = torch.cat([x, x], 1)[:, : x.shape[1]]
    assert not strided.is_contiguous()
    want = merge_norm(way, x, weight, bias, grid)
    assert torch.equal(merge_norm(way, strided, weight, bias, grid), want)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_special_values_stay_in_their_token(way, form, value):
    grid = PackedGrid.from_grid_thw([(1, 4, 6)])
    x, weight, bias = make(grid.total, form, torch.float32)
    want = merge_norm(way, x, weight, bias, grid)
    x[9] = value  # row 1, column 3: the token of rows 0-1 and columns 2-3
    actual = merge_norm(way, x, weight, bias, grid)
    others = torch.arange(6) != 1
    assert torch.equal(actual[others], want[others])
    assert actual[1].isnan().sum() == (18 if form == "preview" else 72)


@pytest.mark.parametrize("merge", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_other_merge_sizes(way, merge):
    grid = PackedGrid.from_grid_thw([(2, 3, 6)], spatial_merge_size=merge)
    x, weight, bias = make(grid.total, "preview")
    normed = F.layer_norm(x, (18,), weight, bias)
    blocks = normed.view(2, 3 // merge, merge, 6 // merge, merge, 18).transpose(2, 3)
    want = blocks.reshape(-1, merge**2 * 18)
    torch.testing.assert_close(merge_norm(way, x, weight, bias, grid), want)


def test_host_integers_stand_for_a_grid():
    inputs = make(24, "preview")
    want = keye_ops.merge_norm(*inputs, PackedGrid.from_grid_thw([(1, 4, 6)]))
    assert torch.equal(keye_ops.merge_norm(*inputs, [(1, 4, 6)]), want)


@pytest.mark.parametrize("order", ["raster", "block"])
@pytest.mark.parametrize("batch", ["small", "none"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients(form, batch, order):
    """The registered gradient, the reference's autograd and finite differences agree."""
    grid = PackedGrid.from_grid_thw(BATCHES[batch], order=order)
    inputs = [x.requires_grad_() for x in make(grid.total, form, hidden=4)]
    index = (grid.grid, grid.image_offsets, 2, order == "block")
    out = merge_norm("registered", *inputs, grid)
    dout = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator())
    actual = torch.autograd.grad(out, inputs, dout)
    others = [merge_norm_reference(*inputs, *index)]
    others += [oracle(*inputs, grid)] if grid.total else []  # no token, no graph
    for other in others:
        want = torch.autograd.grad(other, inputs, dout)
        torch.testing.assert_close(actual, want, rtol=1e-10, atol=1e-11)
    if grid.total:
        op = torch.ops.keye_ops.merge_norm
        assert torch.autograd.gradcheck(lambda *x: op(*x, *index), inputs, fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_within_twice_of_plain(way, dtype, form):
    grid = PackedGrid.from_grid_thw(BATCHES["keye"])
    inputs = make(grid.total, form, dtype, hidden=64)
    dout = torch.randn(grid.total_merged, 256, generator=torch.Generator()).to(dtype)

    def grads(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves, grid), leaves, dout.to(dtype))

    actual = grads(lambda *x: merge_norm(way, *x), dtype)
    plain, exact = grads(plain_merge_norm, dtype), grads(oracle, torch.float64)
    for triple in zip(actual, plain, exact, strict=True):
        assert_within_twice(*triple)


@pytest.mark.parametrize("order", ["raster", "block"])
@pytest.mark.parametrize("batch", ["small", "none"])
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form, batch, order):
    grid = PackedGrid.from_grid_thw(BATCHES[batch], order=order)
    inputs = [x.requires_grad_() for x in make(grid.total, form, torch.float32)]
    args = (*inputs, grid.grid, grid.image_offsets, 2, order == "block", 1e-5)
    torch.library.opcheck(torch.ops.keye_ops.merge_norm.default, args)


@pytest.mark.parametrize("form", FORMS)
def test_compile_makes_one_graph_for_all_sizes(form):
    counter, graphs = CompileCounterWithBackend("aot_eager"), []

    def function(x, weight, bias, grid):
        return keye_ops.merge_norm(x.sin(), weight, bias, grid).cos()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for grid_thw in ([(1, 4, 6)] * 5, [(1, 2, 2), (2, 6, 4)] * 3, [(1, 2, 2)] * 7):
        grid = PackedGrid.from_grid_thw(grid_thw)
        inputs = [x.requires_grad_() for x in make(grid.total, form)]
        with keye_ops.backend("auto"):
            out, want = compiled(*inputs, grid), function(*inputs, grid)
        torch.testing.assert_close(out, want)
        gradients = [torch.autograd.grad(x.square().sum(), inputs) for x in (out, want)]
        torch.testing.assert_close(*gradients)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": zeros(24, 8).int()}, "x must be fp64, fp32, fp16 or bf16, got torch.int32"),
        ({"x": zeros(24, 4, 2)}, r"x must be \[N, C\], got \[24, 4, 2\]"),
        (
            {"weight": zeros(16)},
            r"weight must be \[8\] \(norm, then merge\) or \[32\] \(after\), got \[16\]",
        ),
        ({"weight": zeros(8, 1)}, r"weight must be \[8\] .*, got \[8, 1\]"),
        (
            {"weight": zeros(8).half()},
            r"weight must have the dtype and device of x \(torch.float32, cpu\), got torch.float16",
        ),
        ({"bias": zeros(7)}, r"bias must be \[8\], got \[7\]"),
        ({"bias": zeros(8).half()}, "bias must have the dtype and device of x"),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_wrong_input(way, changes, message):
    inputs = {"x": zeros(24, 8), "weight": zeros(8), "bias": zeros(8), **changes}
    with pytest.raises(RuntimeError, match=f"merge_norm: {message}"):
        merge_norm(way, *inputs.values(), PackedGrid.from_grid_thw([(1, 4, 6)]))


def test_rows_that_do_not_fit_the_grid():
    grid = PackedGrid.from_grid_thw([(1, 4, 6)])
    for x, shape in ((zeros(20, 8), r"\[20, 8\]"), (zeros()[()], r"\[\]")):
        with pytest.raises(RuntimeError, match=f"merge_norm: x must have .* 24 rows, got {shape}"):
            keye_ops.merge_norm(x, zeros(8), zeros(8), grid)
    with pytest.raises(RuntimeError, match="merge_norm: x must have a multiple of 4 rows, got 23"):
        merge_norm("registered", zeros(23, 8), zeros(8), zeros(8), grid)


def test_a_grid_that_cannot_be_merged():
    message = r"grid height and width must be multiples of 2 to merge, got \(1, 3, 4\)"
    with pytest.raises(RuntimeError, match=message):
        keye_ops.merge_norm(zeros(12, 8), zeros(8), zeros(8), [(1, 3, 4)])
