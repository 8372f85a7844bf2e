"""merge_norm against loops over merged squares, in both orders of norm and merge; gradients."""

import random

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import needs_native_kernel, on_each_lesser_instruction_set, rerun
from tolerance import assert_within_twice
from torch._dynamo.testing import CompileCounterWithBackend

import keye_ops
from keye_ops import PackedGrid, dispatch
from keye_ops.merge_norm import merge_norm_backward_reference, merge_norm_reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
WAYS = ["public", "registered"]
FORMS = ["preview", "1.5"]
BATCHES = {
    "keye": [(1, 16, 20), (2, 6, 8)],
    "small": [(1, 2, 2), (3, 2, 4), (1, 6, 2)],
    "one token": [(1, 2, 2)],
    "none": [],
}
needs_native = needs_native_kernel("merge_norm")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Products this small only get slower when threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def merge_norm(way, x, weight, bias, grid, eps=1e-5):
    if dispatch.kernel_device(x) == "cuda" and way == "registered":
        width = weight.shape[0]
        dispatch.use_native("merge_norm", x, dispatch.unsupported_rows(x, width, weight, bias))
    if way == "public":
        return keye_ops.merge_norm(x, weight, bias, grid, eps=eps)
    options = (grid.spatial_merge_size, grid.order == "block", eps)
    return torch.ops.keye_ops.merge_norm(x, weight, bias, grid.grid, grid.image_offsets, *options)


def make(total, form, dtype=torch.float64, hidden=24, seed=0, device="cpu"):
    """x, weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    normed = hidden if form == "preview" else 4 * hidden
    shapes = [(total, hidden), (normed,), (normed,)]
    tensors = [torch.randn(x, generator=generator, dtype=torch.float64) for x in shapes]
    return [x.to(device, dtype) for x in tensors]


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
def test_values(way, dtype, form, batch, order, device):
    grid = PackedGrid.from_grid_thw(BATCHES[batch], order=order, device=device)
    compare(way, make(grid.total, form, dtype, device=device), grid)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_the_width_of_keye(way, dtype, form, device):
    grid = PackedGrid.from_grid_thw([(1, 4, 6)], device=device)
    compare(way, make(grid.total, form, dtype, hidden=1152, device=device), grid)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_eps(way, form, device):
    grid = PackedGrid.from_grid_thw([(1, 4, 6)], device=device)
    x, weight, bias = make(grid.total, form, torch.float32, device=device)
    compare(way, (x * 0.1, weight, bias), grid, eps=0.5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_an_offset_does_not_cancel_the_variance(way, form, device):
    grid = PackedGrid.from_grid_thw([(1, 4, 6)], device=device)
    x, weight, bias = make(grid.total, form, torch.float32, device=device)
    compare(way, (x + 1e4, weight, bias), grid)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_strided_rows(way, form, device):
    grid = PackedGrid.from_grid_thw([(1, 4, 6)], device=device)
    x, weight, bias = make(grid.total, form, torch.float32, device=device)
    strided = torch.cat([x, x], 1)[:, : x.shape[1]]
    assert not strided.is_contiguous()
    want = merge_norm(way, x, weight, bias, grid)
    assert torch.equal(merge_norm(way, strided, weight, bias, grid), want)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_special_values_stay_in_their_token(way, form, value, device):
    grid = PackedGrid.from_grid_thw([(1, 4, 6)], device=device)
    x, weight, bias = make(grid.total, form, torch.float32, device=device)
    want = merge_norm(way, x, weight, bias, grid)
    x[9] = value  # row 1, column 3: the token of rows 0-1 and columns 2-3
    actual = merge_norm(way, x, weight, bias, grid)
    others = torch.arange(6, device=device) != 1
    assert torch.equal(actual[others], want[others])
    assert actual[1].isnan().sum() == (24 if form == "preview" else 96)


@pytest.mark.parametrize("merge", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_other_merge_sizes(way, merge, device):
    grid = PackedGrid.from_grid_thw([(2, 3, 6)], spatial_merge_size=merge, device=device)
    x, weight, bias = make(grid.total, "preview", torch.float32, device=device)
    normed = F.layer_norm(x, (24,), weight, bias)
    blocks = normed.view(2, 3 // merge, merge, 6 // merge, merge, 24).transpose(2, 3)
    want = blocks.reshape(-1, merge**2 * 24)
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
def test_gradients_within_twice_of_plain(way, dtype, form, device):
    grid = PackedGrid.from_grid_thw(BATCHES["keye"], device=device)
    inputs = make(grid.total, form, dtype, hidden=64, device=device)
    dout = torch.randn(grid.total_merged, 256, generator=torch.Generator()).to(device, dtype)

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
def test_gradcheck(form):
    """Many shapes, those with nothing in them included."""
    grids = [[], [(1, 1, 1)], [(1, 2, 1)], [(2, 1, 3)], [(1, 3, 2), (1, 1, 1)], [(3, 1, 2)]]
    cases = [(grid, 1, order) for grid in grids for order in ("raster", "block")]
    grids = [[], [(1, 2, 2)], [(1, 2, 4)], [(1, 4, 2), (1, 2, 2)], [(2, 4, 4)]]
    cases += [(grid, 2, order) for grid in grids for order in ("raster", "block")]
    cases += [([(1, 3, 6)], 3, order) for order in ("raster", "block")]
    shapes = [(*case, hidden) for case in cases for hidden in (0, 1, 5)]
    assert len(shapes) >= 50
    for grid_thw, merge, order, hidden in shapes:
        grid = PackedGrid.from_grid_thw(grid_thw, spatial_merge_size=merge, order=order)
        x, *_ = make(grid.total, form, hidden=hidden)
        normed = hidden if form == "preview" else merge**2 * hidden
        parameters = [torch.randn(normed, dtype=torch.float64) for _ in range(2)]
        inputs = [y.requires_grad_() for y in (x, *parameters)]
        options = (grid.grid, grid.image_offsets, merge, order == "block", 1e-2)
        op = torch.ops.keye_ops.merge_norm
        assert torch.autograd.gradcheck(lambda *y, op=op, o=options: op(*y, *o), inputs)


@pytest.mark.parametrize("order", ["raster", "block"])
@pytest.mark.parametrize("batch", ["small", "none"])
@pytest.mark.parametrize("form", FORMS)
def test_backward_op(form, batch, order):
    grid = PackedGrid.from_grid_thw(BATCHES[batch], order=order)
    x, weight, _ = make(grid.total, form, torch.float32)
    dout = make(grid.total_merged, form, torch.float32, hidden=96, seed=1)[0]
    options = (grid.grid, grid.image_offsets, 2, order == "block", 1e-5)
    op = torch.ops.keye_ops.merge_norm_backward
    torch.library.opcheck(op.default, (dout, x, weight, *options))
    exact = (y.double() for y in (dout, x, weight))
    results = op(dout, x, weight, *options)
    plain = merge_norm_backward_reference(dout, x, weight, *options)
    truth = merge_norm_backward_reference(*exact, *options)
    for triple in zip(results, plain, truth, strict=True):
        assert_within_twice(*triple)


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


# ---- what rows may look like and hold ----


@pytest.mark.parametrize("order", ["raster", "block"])
@pytest.mark.parametrize("merge", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_merge_sizes_of_odd_squares(form, merge, order, device):
    images = [(1, 3, 6), (2, 6, 3)]
    options = {"spatial_merge_size": merge, "order": order, "device": device}
    grid = PackedGrid.from_grid_thw(images, **options)
    x, *_ = make(grid.total, form, torch.float32, device=device)
    normed = 24 if form == "preview" else merge**2 * 24
    parameters = [torch.randn(normed, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    parameters = [y.to(device) for y in parameters]
    options = (grid.grid, grid.image_offsets, merge, order == "block")
    actual = keye_ops.merge_norm(x, *parameters, grid)
    plain = merge_norm_reference(x, *parameters, *options)
    exact = merge_norm_reference(*(y.double() for y in (x, *parameters)), *options)
    assert_within_twice(actual, plain, exact)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_strided_rows_have_the_bits_of_contiguous_ones(way, form, device):
    grid = PackedGrid.from_grid_thw(BATCHES["small"], device=device)
    x, weight, bias = make(grid.total, form, torch.bfloat16, device=device)
    wide = torch.cat([x, x, x], 1).repeat_interleave(2, 0)[::2, 24:48]
    want = merge_norm(way, x, weight, bias, grid)
    assert torch.equal(merge_norm(way, wide, weight, bias, grid), want)
    # sum() sends an expanded gradient of stride zero.
    leaves = [y.detach().requires_grad_() for y in (x, wide)]
    for leaf in leaves:
        merge_norm(way, leaf, weight, bias, grid).sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_extreme_values(dtype, form, device):
    grid = PackedGrid.from_grid_thw([(1, 2, 16)], order="block", device=device)
    x, weight, bias = make(grid.total, form, dtype, hidden=144, device=device)
    info = torch.finfo(dtype)
    scales = [info.max**0.25, info.tiny, info.tiny * info.eps, 0.0, info.eps, 1e3]
    for token, scale in enumerate(scales):
        x[4 * token : 4 * token + 4] *= scale
    x[24:28] += 1e4  # must not cancel in the variance
    inputs = (x, weight, bias)
    actual, plain = (f(*inputs, grid) for f in (keye_ops.merge_norm, plain_merge_norm))
    exact = oracle(*(y.double() for y in inputs), grid)
    # Token by token: the largest would hide the others.
    for triple in zip(actual, plain, exact, strict=True):
        assert_within_twice(*triple)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", FORMS)
def test_bad_numbers_stay_in_their_token(form, bad, dtype, device):
    grid = PackedGrid.from_grid_thw(BATCHES["keye"], device=device)
    x, weight, bias = make(grid.total, form, dtype, device=device)
    clean = keye_ops.merge_norm(x, weight, bias, grid)
    x[21, 5] = bad  # row 1, column 1 of the first image: patch 3 of token 0
    out = keye_ops.merge_norm(x, weight, bias, grid)
    normed = slice(72, 96) if form == "preview" else slice(0, 96)
    assert not out[0, normed].isfinite().any()
    out[0, normed] = clean[0, normed]
    assert torch.equal(out, clean)


@needs_native  # torch does not promise it
@pytest.mark.parametrize("form", FORMS)
def test_same_bits_for_any_number_of_threads(form):
    grid = PackedGrid.from_grid_thw([(3, 34, 40), (1, 2, 2), (1, 6, 80)])
    inputs = [y.requires_grad_() for y in make(grid.total, form, torch.bfloat16, hidden=72)]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            out = keye_ops.merge_norm(*inputs, grid)
            dout = torch.linspace(-1, 1, out.numel()).view_as(out).bfloat16()
            results.append([out, *torch.autograd.grad(out, inputs, dout)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_an_image_does_not_depend_on_its_neighbours(form, device):
    grids = [(1, 16, 20), (2, 6, 8), (1, 2, 2)]
    x, weight, bias = make(320 + 96 + 4, form, torch.bfloat16, device=device)
    together = keye_ops.merge_norm(x, weight, bias, grids)
    parts = zip(x.split([320, 96, 4]), grids, strict=True)
    alone = [keye_ops.merge_norm(part, weight, bias, [grid]) for part, grid in parts]
    assert torch.equal(torch.cat(alone), together)


def test_offsets_past_two_billion_elements(device):
    # Two pairs of rows 2**31 elements apart; only they take memory.
    grid = PackedGrid.from_grid_thw([(1, 2, 2)], device=device)
    for form in FORMS:
        x, weight, bias = make(4, form, torch.bfloat16, hidden=64, device=device)
        storage = torch.empty(3 * 2**31 + 64, dtype=torch.bfloat16, device=device)
        far = storage.as_strided((4, 64), (2**31, 1))
        far.copy_(x)
        want = merge_norm("public", x, weight, bias, grid)
        assert torch.equal(merge_norm("public", far, weight, bias, grid), want)
        args = (weight, grid.grid, grid.image_offsets, 2, False, 1e-5)
        backward = torch.ops.keye_ops.merge_norm_backward
        results = [backward(want, rows, *args) for rows in (far, x)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- grids that only a device sees ----

INT32_MAX = 2**31 - 1
IMAGES = [(1, 4, 4), (2, 2, 2), (1, 2, 4)]  # tokens 0 to 3, 4 and 5, 6 and 7
OF_GRID = "grid must hold positive (t, h, w) with h and w multiples of the merge, got "
OF_OFFSETS = "image_offsets must be the sums of t * h * w up to the patches, got "
# Which tensor is changed where to what; which tokens are bad then; what is reported.
HOSTILE = {
    "no rows": ("grid", (1, 1), 0, (4, 5), f"{OF_GRID}0"),
    "no columns": ("grid", (1, 2), 0, (4, 5), f"{OF_GRID}0"),
    "no frames": ("grid", (1, 0), 0, (4, 5), f"{OF_GRID}0"),
    "odd columns": ("grid", (0, 2), 3, range(4), f"{OF_GRID}3"),
    "odd rows": ("grid", (0, 1), 5, range(4), f"{OF_GRID}5"),
    "negative columns": ("grid", (2, 2), -4, (6, 7), f"{OF_GRID}-4"),
    "least rows": ("grid", (2, 1), -(2**31), (6, 7), f"{OF_GRID}-{2**31}"),
    "too many frames": ("grid", (1, 0), 3, (4, 5), f"{OF_OFFSETS}24"),
    "too many rows": ("grid", (1, 1), INT32_MAX - 1, (4, 5), f"{OF_OFFSETS}24"),
    "too few rows": ("grid", (0, 1), 2, range(4), f"{OF_OFFSETS}16"),
    "huge images": ("grid", slice(None), INT32_MAX - 1, range(8), OF_OFFSETS),
    "late start": ("image_offsets", 0, 4, range(4), f"{OF_OFFSETS}16"),
    "early start": ("image_offsets", 0, -4, range(4), f"{OF_OFFSETS}16"),
    "late border": ("image_offsets", 1, 20, range(6), OF_OFFSETS),
    "odd border": ("image_offsets", 1, 18, range(6), OF_OFFSETS),
    "early end": ("image_offsets", 3, 28, (6, 7), f"{OF_OFFSETS}28"),
    "late end": ("image_offsets", 3, INT32_MAX, (6, 7), f"{OF_OFFSETS}{INT32_MAX}"),
    "least offsets": ("image_offsets", slice(None), -(2**31), range(8), f"{OF_OFFSETS}-{2**31}"),
    "largest offsets": ("image_offsets", slice(None), INT32_MAX, range(8), OF_OFFSETS),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", HOSTILE)
def test_bad_grids_on_a_device_make_zeros_and_a_report(how, dtype, form, device):
    grid = PackedGrid.from_grid_thw(IMAGES, device=device)
    inputs = make(grid.total, form, dtype, device=device)
    name, place, value, bad, message = HOSTILE[how]
    index = {x: getattr(grid, x).clone() for x in ("grid", "image_offsets")}
    index[name][place] = value
    op, backward = torch.ops.keye_ops.merge_norm, torch.ops.keye_ops.merge_norm_backward
    if dispatch.kernel_device(inputs[0]) == "cpu":
        with pytest.raises(RuntimeError, match=r"merge_norm: .*must"):
            op(*inputs, *index.values())
        return
    is_bad = torch.zeros(grid.total_merged, dtype=torch.bool, device=device)
    is_bad[list(bad)] = True
    want = merge_norm("registered", *inputs, grid)
    keye_ops.check_errors()
    actual = op(*inputs, *index.values())
    assert not actual[is_bad].any()
    assert torch.equal(actual[~is_bad], want[~is_bad])
    with pytest.raises(RuntimeError, match=r"^merge_norm: ") as raised:
        keye_ops.check_errors()
    assert message in str(raised.value)

    # A bad token's patches have zero gradients, and no part in those of the parameters.
    dout = torch.randn(actual.shape, generator=torch.Generator()).to(device, dtype)
    options = (2, False, 1e-5)
    grads = backward(dout, *inputs[:2], *index.values(), *options)
    with pytest.raises(RuntimeError, match=r"^merge_norm: ") as raised:
        keye_ops.check_errors()
    assert message in str(raised.value)
    good = dout.masked_fill(is_bad[:, None], 0)
    wanted = backward(good, *inputs[:2], grid.grid, grid.image_offsets, *options)
    torch.testing.assert_close(grads, wanted)
    keye_ops.check_errors()


@pytest.mark.parametrize("form", FORMS)
def test_no_image_on_a_device(form, device):
    inputs = make(8, form, torch.float32, device=device)
    if dispatch.kernel_device(inputs[0]) == "cpu":
        pytest.skip("the CPU refuses it")
    integers = {"dtype": torch.int32, "device": device}
    index = [torch.zeros(shape, **integers) for shape in ((0, 3), (1,))]
    dispatch.use_native("merge_norm", inputs[0])
    assert not torch.ops.keye_ops.merge_norm(*inputs, *index).any()
    with pytest.raises(RuntimeError, match="merge_norm: image_offsets must be the sums"):
        keye_ops.check_errors()


def test_an_image_among_many(device):
    """More images than the lanes of a warp, squared: the search takes several steps."""
    grid = PackedGrid.from_grid_thw([(1, 2, 2 + 2 * (i % 3)) for i in range(1100)], device=device)
    x, weight, bias = make(grid.total, "1.5", torch.float32, hidden=4, device=device)
    compare("registered", (x, weight, bias), grid)


@pytest.mark.parametrize("form", FORMS)
def test_random_grids_on_a_device(form, device):
    grid = PackedGrid.from_grid_thw(IMAGES * 3, device=device)
    inputs = make(grid.total, form, torch.float32, hidden=8, device=device)
    if dispatch.kernel_device(inputs[0]) == "cpu":
        pytest.skip("the CPU refuses them")
    want = merge_norm("registered", *inputs, grid)
    numbers = random.Random(0)
    for _ in range(30):
        index = [grid.grid.clone(), grid.image_offsets.clone()]
        for _ in range(numbers.randint(1, 6)):
            flat = numbers.choice(index).view(-1)
            limit = numbers.choice([1, 5, 100, 2**31])
            flat[numbers.randrange(len(flat))] = numbers.randint(-limit, limit - 1)
        actual = torch.ops.keye_ops.merge_norm(*inputs, *index)
        assert actual.isfinite().all()
        same = (actual == want).all(1) | (actual == 0).all(1)
        if torch.equal(index[1], grid.image_offsets):  # a grid with its offsets is right or zeros
            others = (index[0] == grid.grid).all(1)
            owners = torch.bucketize(
                torch.arange(grid.total_merged, device=device) * 4, index[1][1:], right=True
            )
            assert same[others[owners]].all()
    with pytest.raises(RuntimeError, match=r"^merge_norm: "):
        keye_ops.check_errors()


# ---- every instruction set ----


@on_each_lesser_instruction_set
def test_this_file_on_a_lesser_instruction_set(isa):
    rerun(
        __file__,
        isa,
        "(test_values or width or twice or sizes or strided or numbers or bits) and not host_cuda",
    )


# ---- wrong input: the same message from the native op and from the reference ----


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


BAD_GRIDS = {
    "rank": ([[1, 4]], [0, 24], r"grid must be \[num_images, 3\], got \[1, 2\]"),
    "odd": ([[4, 3, 2]], [0, 24], r"grid must hold positive \(t, h, w\) with h and w multiples "
            r"of 2, got \[\[4, 3, 2\]\]"),
    "negative": ([[1, 4, 6], [-1, 2, 2]], [0, 24, 24], r"grid must hold .* got \[\[-1, 2, 2\]\]"),
    "too many": ([[1, 4, 8]], [0, 24], r"image_offsets must be the sums of t \* h \* w up to the "
                 r"24 patches, got \[0, 24\]"),
    "huge": ([[2**31 - 1, 2**31 - 2, 2**31 - 2]], [0, 24], r"image_offsets .* got \[0, 24\]"),
    "offsets": ([[1, 4, 2], [1, 4, 2], [1, 4, 2]], [0, 8, 17, 24], r"image_offsets .* "
                r"got \[8, 17, 24\]"),
    "first offset": ([[1, 4, 6]], [1, 24], r"image_offsets .* got \[1, 24\]"),
    "number of offsets": ([[1, 4, 6]], [0, 8, 24], r"image_offsets must be \[2\], got \[3\]"),
    "no image": ([], [0], r"image_offsets must be .* 24 patches, got \[0\]"),
}  # fmt: skip


@pytest.mark.parametrize("way", ["registered", "reference"])
@pytest.mark.parametrize("name", BAD_GRIDS)
def test_grids_that_lie(name, way):
    sizes, offsets, message = BAD_GRIDS[name]
    grid = torch.tensor(sizes, dtype=torch.int32).reshape(len(sizes), -1 if sizes else 3)
    offsets = torch.tensor(offsets, dtype=torch.int32)
    op = torch.ops.keye_ops.merge_norm if way == "registered" else merge_norm_reference
    with pytest.raises(RuntimeError, match=f"merge_norm: {message}"):
        op(zeros(24, 8), zeros(8), zeros(8), grid, offsets)
    with pytest.raises(RuntimeError, match="grid must be int32, got torch"):
        op(zeros(4, 8), zeros(8), zeros(8), torch.tensor([[1, 2, 2]]), torch.tensor([0, 4]).int())
    grid, offsets = torch.tensor([[1, 2, 2]]).int(), torch.tensor([0, 4])
    with pytest.raises(RuntimeError, match="image_offsets must be int32, got"):
        op(zeros(4, 8), zeros(8), zeros(8), grid, offsets)


@pytest.mark.parametrize("way", ["registered", "reference"])
def test_wrong_input_of_the_registered_ops(way):
    grid, offsets = torch.tensor([[1, 2, 2]]).int(), torch.tensor([0, 4]).int()
    x, weight = zeros(4, 8), zeros(8)
    native = way == "registered"
    op = torch.ops.keye_ops.merge_norm if native else merge_norm_reference
    for side in (0, -2, 40000):
        message = f"merge_norm: spatial_merge_size must be from 1 to 32768, got {side}"
        with pytest.raises(RuntimeError, match=message):
            op(x, weight, weight, grid, offsets, side)
    op = torch.ops.keye_ops.merge_norm_backward if native else merge_norm_backward_reference
    for dout, message in (
        (zeros(1, 31), r"dout must be \[1, 32\], got \[1, 31\]"),
        (zeros(1, 32).half(), r"dout must have the dtype and device of x \(torch.float32, cpu\)"),
    ):
        with pytest.raises(RuntimeError, match=f"merge_norm: {message}"):
            op(dout, x, weight, grid, offsets, 2, False, 1e-5)


@needs_native
def test_strides_fall_back_visibly():
    grid = PackedGrid.from_grid_thw([(1, 4, 6)])
    x, weight, bias = make(24, "preview", torch.float32)
    turned = x.T.contiguous().T
    with pytest.raises(RuntimeError, match="merge_norm: x must have unit last stride, got 24"):
        merge_norm("registered", turned, weight, bias, grid)
    apart = weight.repeat_interleave(2)[::2]
    with pytest.raises(RuntimeError, match="merge_norm: weight must be contiguous, got stride 2"):
        merge_norm("registered", x, apart, bias, grid)
    got = keye_ops.merge_norm(turned, weight, bias, grid)
    assert keye_ops.last_dispatch("merge_norm").implementation == "reference"
    assert "unit last stride" in keye_ops.last_dispatch("merge_norm").reason
    torch.testing.assert_close(got, keye_ops.merge_norm(x, weight, bias, grid))
    assert keye_ops.last_dispatch("merge_norm").implementation == "native"
    with (
        keye_ops.backend("native"),
        pytest.raises(RuntimeError, match="the native kernel was required, but it needs a unit"),
    ):
        keye_ops.merge_norm(turned, weight, bias, grid)


def test_a_grid_that_cannot_be_merged():
    message = r"grid height and width must be multiples of 2 to merge, got \(1, 3, 4\)"
    with pytest.raises(RuntimeError, match=message):
        keye_ops.merge_norm(zeros(12, 8), zeros(8), zeros(8), [(1, 3, 4)])
