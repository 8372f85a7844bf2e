"""The same bits for every run, number of threads and company in the batch; native kernels only."""

import pytest
import torch
from instruction_sets import needs_native_kernel

import keye_ops
from keye_ops import PackedGrid

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LENGTHS = [700, 3, 0, 260]
GRID = [(3, 34, 40), (1, 2, 2), (1, 6, 80)]


def randoms(dtype):
    generator = torch.Generator().manual_seed(3)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def attention(dtype, causal=False):
    randn, total = randoms(dtype), sum(LENGTHS) + 2
    leaves = [randn(total, heads, 72) for heads in (4, 2, 2)]
    cu = offsets(LENGTHS)
    options = {"causal": causal, "return_lse": True}
    return leaves, lambda *x: keye_ops.varlen_attention(*x, cu, **options)


def causal_attention(dtype):
    return attention(dtype, causal=True)


def rope(dtype, norm=False):
    randn, total = randoms(dtype), 3001
    leaves = [randn(total, 8, 72), randn(total, 4, 72), *(randn(72) for _ in "qk" if norm)]
    positions = torch.arange(2 * total).view(2, total) % 977
    frequencies = 10000.0 ** -torch.linspace(0, 0.95, 36)
    axis = (torch.arange(36) % 2).int()

    def function(q, k, *weights):
        names = ("q_norm_weight", "k_norm_weight")
        norms = dict(zip(names, weights, strict=False))
        return keye_ops.rope(q, k, positions, frequencies, axis, **norms)

    return leaves, function


def normed_rope(dtype):
    return rope(dtype, norm=True)


def add_layer_norm(dtype):
    randn = randoms(dtype)
    leaves = [randn(1777, 144), randn(1777, 144), randn(144), randn(144)]
    return leaves, lambda *x: keye_ops.add_layer_norm(*x)


def add_rms_norm(dtype):
    randn = randoms(dtype)
    leaves = [randn(1777, 144), randn(1777, 144), randn(144)]
    return leaves, lambda *x: keye_ops.add_rms_norm(*x)


def merge_norm(dtype, width=72):
    randn, grid = randoms(dtype), PackedGrid.from_grid_thw(GRID)
    leaves = [randn(grid.total, 72), randn(width), randn(width)]
    return leaves, lambda *x: (keye_ops.merge_norm(*x, grid),)


def merge_then_norm(dtype):
    return merge_norm(dtype, width=288)


def linear_gelu(dtype):
    randn = randoms(dtype)
    leaves = [randn(700, 288) / 17, randn(320, 288), randn(320)]
    return leaves, lambda *x: (keye_ops.linear_gelu(*x),)


def patch_embed(dtype):
    randn, grid = randoms(dtype), PackedGrid.from_grid_thw([(2, 20, 16), (1, 7, 9)])
    leaves = [randn(grid.total, 588), randn(144, 588) / 24, randn(144), randn(81, 144)]
    return leaves, lambda *x: (keye_ops.patch_embed(*x, grid),)


CASES = {
    "varlen_attention": (attention, causal_attention),
    "rope": (rope, normed_rope),
    "add_layer_norm": (add_layer_norm,),
    "add_rms_norm": (add_rms_norm,),
    "merge_norm": (merge_norm, merge_then_norm),
    "linear_gelu": (linear_gelu,),
    "patch_embed": (patch_embed,),
}


def cases():
    return [
        pytest.param(make, marks=needs_native_kernel(op), id=make.__name__)
        for op, makes in CASES.items()
        for make in makes
    ]


def results(leaves, function):
    """Outputs and gradients."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    outputs = function(*leaves)
    wanted = [x for x in outputs if x.requires_grad]
    generator = torch.Generator().manual_seed(4)
    douts = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in wanted]
    return [*outputs, *torch.autograd.grad(wanted, leaves, douts)]


def assert_equal_bits(results, others):
    for i, (x, y) in enumerate(zip(results, others, strict=True)):
        assert torch.equal(x, y), f"tensor {i} differs by {(x.double() - y.double()).abs().max()}"


# torch's matrix product may divide its inner dimension among threads, as it likes.
PRODUCT_OF_TORCH = (linear_gelu, patch_embed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", cases())
def test_same_bits_for_every_run_and_number_of_threads(make, dtype):
    case = make(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = results(*case)
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            again = results(*case)
            assert_equal_bits(results(*case), again)
            if make not in PRODUCT_OF_TORCH:
                assert_equal_bits(again, first)
    finally:
        torch.set_num_threads(before)


# ---- what one part of a batch gives does not depend on the others ----


@needs_native_kernel("varlen_attention")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_segments_of_attention(dtype, causal):
    leaves, function = attention(dtype, causal)
    together = results(leaves, function)
    generator = torch.Generator().manual_seed(4)
    dout = torch.randn(together[0].shape, generator=generator).to(dtype)
    start = 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        start += length
        alone = [x[rows].detach().requires_grad_() for x in leaves]
        out, lse = keye_ops.varlen_attention(
            *alone, offsets([length]), causal=causal, return_lse=True
        )
        grads = torch.autograd.grad(out, alone, dout[rows])
        want = [together[0][rows], together[1][:, rows], *(x[rows] for x in together[2:])]
        assert_equal_bits([out, lse, *grads], want)


@needs_native_kernel("rope")
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_of_rope(dtype, norm):
    randn, total = randoms(dtype), 301
    heads = [randn(total, 8, 72), randn(total, 4, 72)]
    weights = dict(zip(("q_norm_weight", "k_norm_weight"), (randn(72), randn(72)), strict=True))
    weights = weights if norm else {}
    positions = torch.arange(2 * total).view(2, total)
    table = (10000.0 ** -torch.linspace(0, 0.95, 36), (torch.arange(36) % 2).int())
    together = keye_ops.rope(*heads, positions, *table, **weights)
    for rows in (slice(0, 1), slice(7, 40), slice(100, 301)):
        alone = keye_ops.rope(*(x[rows] for x in heads), positions[:, rows], *table, **weights)
        assert_equal_bits(alone, [x[rows] for x in together])


@needs_native_kernel("add_layer_norm")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_add_layer_norm(dtype):
    (x, residual, *parameters), function = add_layer_norm(dtype)
    together = function(x, residual, *parameters)
    for rows in (slice(0, 1), slice(1776, 1777), slice(7, 40), slice(100, 1301)):
        alone = function(x[rows], residual[rows], *parameters)
        assert_equal_bits(alone, [y[rows] for y in together])


@needs_native_kernel("add_rms_norm")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_add_rms_norm(dtype):
    (x, residual, weight), function = add_rms_norm(dtype)
    together = function(x, residual, weight)
    for rows in (slice(0, 1), slice(1776, 1777), slice(7, 40), slice(100, 1301)):
        alone = function(x[rows], residual[rows], weight)
        assert_equal_bits(alone, [y[rows] for y in together])


@needs_native_kernel("merge_norm")
@pytest.mark.parametrize("make", [merge_norm, merge_then_norm])
@pytest.mark.parametrize("dtype", DTYPES)
def test_images_of_merge_norm(dtype, make):
    (x, *parameters), function = make(dtype)
    together = function(x, *parameters)[0]
    sizes = [t * h * w for t, h, w in GRID]
    parts = zip(GRID, x.split(sizes), together.split([n // 4 for n in sizes]), strict=True)
    for size, part, want in parts:
        assert_equal_bits([keye_ops.merge_norm(part, *parameters, [size])], [want])
