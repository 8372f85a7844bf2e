"""Index tensors that lie: a RuntimeError that names the op, and nothing is read or written."""

import pytest
import torch
from fuzz_cases import embed

import keye_ops
from keye_ops import PackedGrid

OPS = torch.ops.keye_ops
INT_MAX = 2**31 - 1


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def rejects(op, function, inputs, *index):
    """Call with inputs amid a larger buffer, and require the error and the bits from before."""
    buffers = []
    inputs = [embed(x, buffers) for x in inputs]
    index = [
        embed(x, buffers) if isinstance(x, torch.Tensor) and x.is_contiguous() else x for x in index
    ]
    before = [x.clone() for x in buffers]
    with pytest.raises(RuntimeError, match=rf"^(keye_ops::)?{op}: "):
        function(*inputs, *index)
    for old, new in zip(before, buffers, strict=True):
        assert torch.equal(old.view(torch.uint8), new.view(torch.uint8))


# ---- cu_seqlens ----

CU_SEQLENS = {
    "not from 0": ints(1, 2, 6),
    "negative start": ints(-1, 2, 6),
    "decreasing": ints(0, 6, 4),
    "decreasing to 0": ints(0, 6, 0),
    "negative": ints(0, -3, 6),
    "least": ints(0, -(2**31), 6),
    "beyond": ints(0, 2, 7),
    "beyond in the middle": ints(0, 7, 7),
    "far beyond": ints(0, 2, INT_MAX),
    "difference overflows": ints(-(2**31), 0, INT_MAX),
    "all INT_MAX": ints(INT_MAX, INT_MAX, INT_MAX),
    "int64": ints(0, 2, 6, dtype=torch.int64),
    "float": torch.tensor([0.0, 2.0, 6.0]),
    "bool": torch.tensor([False, True, True]),
    "two dimensions": ints(0, 2, 6)[None],
    "a number": ints(6)[0],
    "nothing": ints(),
    "too few": ints(0, 6),
    "too many": ints(0, 2, 4, 6),
}


def attention_public(q, k, v, cu_q, cu_k):
    return keye_ops.varlen_attention(q, k, v, cu_q, cu_k)


def attention_backward(q, k, v, cu_q, cu_k):
    lse = torch.zeros(q.shape[1], q.shape[0])
    options = (None, None, None, False)
    return OPS.varlen_attention_backward(q, q, k, v, q, lse, cu_q, cu_k, *options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["q", "k", "both"])
@pytest.mark.parametrize("name", CU_SEQLENS)
@pytest.mark.parametrize(
    "function",
    [attention_public, OPS.varlen_attention, attention_backward],
    ids=["public", "registered", "backward"],
)
def test_cu_seqlens(function, name, which, dtype):
    if which == "both" and name in ("too few", "too many"):
        pytest.skip("one would be right")
    if function is attention_backward:
        dtype = torch.float32
    bad, good = CU_SEQLENS[name], ints(0, 2, 6)
    index = (bad if which != "k" else good, bad if which != "q" else good)
    rejects("varlen_attention", function, [torch.randn(6, 2, 8).to(dtype) for _ in "qkv"], *index)


def call_if_accepted(op, function, *args):
    """None where the op refuses, with its name."""
    try:
        return function(*args)
    except RuntimeError as error:
        message = str(error)
    assert message.startswith(f"{op}: ")
    return None


@pytest.mark.parametrize("function", [attention_public, OPS.varlen_attention])
def test_strided_cu_seqlens_are_refused_or_right(function):
    q, k, v = (torch.randn(6, 2, 8) for _ in "qkv")
    cu = ints(0, 2, 6)
    strided = ints(0, -5, 2, INT_MAX, 6, 9)[::2]
    assert not strided.is_contiguous()
    got = call_if_accepted("varlen_attention", function, q, k, v, strided, strided)
    if got is not None:
        want = keye_ops.varlen_attention(q, k, v, cu, cu)
        assert torch.equal(got if isinstance(got, torch.Tensor) else got[0], want)


@pytest.mark.parametrize("longest", [-1, 0, 3, -(2**62)])
@pytest.mark.parametrize("name", ["max_seqlen_q", "max_seqlen_k"])
def test_longest_segment(name, longest):
    cu = ints(0, 2, 6)

    def function(q, k, v):
        return keye_ops.varlen_attention(q, k, v, cu, cu, **{name: longest})

    rejects("varlen_attention", function, [torch.randn(6, 2, 8) for _ in "qkv"])


# ---- grids ----

GRIDS = {
    "zero": [[1, 0, 4]],
    "zero frames": [[0, 4, 4]],
    "negative": [[1, -4, -4]],
    "negative frames": [[-1, 4, 4]],
    "least": [[-(2**31), 4, 4]],
    "too many": [[1, 4, 8]],
    "too few": [[1, 4, 2]],
    "product past int32": [[1, 65536, 65536]],
    "product past int64": [[INT_MAX - 1, INT_MAX - 1, INT_MAX - 1]],
    "product is 16 modulo 2**32": [[1, 2**16 + 4, 2**30 + 4]],
    "sum past int32": [[1, 4, 4], [1, 32768, 65534], [1, 32768, 65534]],
}
ODD = {"odd height": [[1, 1, 16]], "odd width": [[1, 16, 1]], "odd both": [[16, 1, 1]]}


def offsets_of(sizes):
    """What the offsets would be, cut to int32 as an overflow would."""
    ends = torch.tensor([[0], *([t * h * w] for t, h, w in sizes)], dtype=torch.float64)
    cut = ends.cumsum(0).flatten().remainder(2.0**32)
    return torch.where(cut >= 2.0**31, cut - 2.0**32, cut).int()


def merge_inputs():
    return [torch.randn(16, 8), torch.randn(8), torch.randn(8)]


def patch_inputs():
    return [torch.randn(16, 3, 2, 2), torch.randn(8, 3, 2, 2), torch.randn(8), torch.randn(9, 8)]


def merge_backward(x, weight, bias, grid, image_offsets):
    args = (torch.randn(4, 32), x, weight, grid, image_offsets, 2, False, 1e-5)
    return OPS.merge_norm_backward(*args)


def patch_registered(*args):
    position_ids = PackedGrid.from_grid_thw([(1, 4, 4)]).position_ids
    return OPS.patch_embed(*args, position_ids)


FORMS = {
    "merge_norm": (merge_inputs, OPS.merge_norm),
    "merge_norm backward": (merge_inputs, merge_backward),
    "patch_embed": (patch_inputs, patch_registered),
}


@pytest.mark.parametrize("lying", [False, True], ids=["own offsets", "fitting offsets"])
@pytest.mark.parametrize("name", [*GRIDS, *ODD])
@pytest.mark.parametrize("form", FORMS)
def test_registered_grids(form, name, lying):
    if form == "patch_embed" and name in ODD:
        pytest.skip("patches need not be merged")
    sizes = (GRIDS | ODD)[name]
    offsets = torch.tensor([0] * len(sizes) + [16]).int() if lying else offsets_of(sizes)
    make, function = FORMS[form]
    rejects(form.split()[0], function, make(), ints(*sizes), offsets)


@pytest.mark.parametrize("name", [*GRIDS, *ODD])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["list", "tensor"])
@pytest.mark.parametrize("op", ["merge_norm", "patch_embed"])
def test_public_grids(op, as_tensor, name):
    if op == "patch_embed" and name in ODD:
        pytest.skip("patches need not be merged")
    sizes = (GRIDS | ODD)[name]
    grid = torch.tensor(sizes) if as_tensor else sizes
    make = merge_inputs if op == "merge_norm" else patch_inputs

    def function(*inputs):
        return getattr(keye_ops, op)(*inputs, grid)

    rejects(f"({op}|PackedGrid)", function, make())


OFFSETS = {
    "not from 0": ints(1, 8, 16),
    "negative": ints(0, -8, 16),
    "decreasing": ints(0, 16, 8),
    "elsewhere": ints(0, 4, 16),
    "too far": ints(0, 8, 24),
    "INT_MAX": ints(0, 8, INT_MAX),
    "least": ints(0, -(2**31), 16),
    "too few": ints(0, 16),
    "too many": ints(0, 8, 16, 16),
    "nothing": ints(),
    "two dimensions": ints(0, 8, 16)[None],
    "int64": ints(0, 8, 16, dtype=torch.int64),
    "float": torch.tensor([0.0, 8.0, 16.0]),
}


@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("form", FORMS)
def test_image_offsets(form, name):
    make, function = FORMS[form]
    grid = ints([1, 2, 4], [1, 4, 2])
    rejects(form.split()[0], function, make(), grid, OFFSETS[name])


@pytest.mark.parametrize(
    "grid",
    [
        ints(1, 4, 4),
        ints([1, 4]),
        ints([[1, 4, 4]]),
        ints([1, 4, 4], dtype=torch.int64),
        torch.ones(1, 3),
    ],
    ids=["one dimension", "two columns", "three dimensions", "int64", "float"],
)
@pytest.mark.parametrize("form", FORMS)
def test_shapes_and_dtypes_of_grids(form, grid):
    make, function = FORMS[form]
    rejects(form.split()[0], function, make(), grid, ints(0, 16))


# ---- positions ----

POSITIONS = {
    "negative": -1,
    "least": -(2**31),
    "least int64": -(2**63),
    "first too large": 2**24,
    "largest": INT_MAX,
    "0 modulo 2**32": 2**32,
    "largest int64": 2**63 - 1,
}


def rope_inplace(q, k, *table):
    return keye_ops.rope_(q, k, *table)


def rope_backward(q, k, *table):
    weight = torch.ones(q.shape[2])
    return OPS.rope_backward(q, k, q, k, *table, weight, weight, False, 1e-6)


ROPES = {
    "public": keye_ops.rope,
    "in place": rope_inplace,
    "registered": OPS.rope,
    "registered in place": OPS.rope_,
    "backward": rope_backward,
}


@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("form", ROPES)
def test_positions_of_rope(form, name):
    value = POSITIONS[name]
    dtypes = [torch.int64] + [torch.int32] * (-(2**31) <= value <= INT_MAX)
    for dtype in dtypes:
        for place in ((0, 0), (1, 5)):
            positions = torch.zeros(2, 6, dtype=dtype)
            positions[place] = value
            table = (positions, torch.rand(4), ints(0, 0, 1, 1))
            rejects("rope_?", ROPES[form], [torch.randn(6, 2, 8), torch.randn(6, 1, 8)], *table)


@pytest.mark.parametrize(
    "table",
    [
        (torch.zeros(2, 6).int(), torch.rand(4), ints(0, 0, 1, 2)),
        (torch.zeros(2, 6).int(), torch.rand(4), ints(0, 0, 1, -1)),
        (torch.zeros(2, 6).int(), torch.rand(4), ints(0, 0, 1, INT_MAX)),
        (torch.zeros(2, 6).int(), torch.rand(4), ints(0, 0, 1, 1, dtype=torch.int64)),
        (torch.zeros(2, 6).int(), torch.tensor([0.5, torch.nan, 0.1, 0]), ints(0, 0, 1, 1)),
        (torch.zeros(2, 6).int(), torch.tensor([0.5, torch.inf, 0.1, 0]), ints(0, 0, 1, 1)),
        (torch.zeros(2, 6).int(), torch.tensor([0.5, -0.1, 0.1, 0]), ints(0, 0, 1, 1)),
        (torch.zeros(2, 6), torch.rand(4), ints(0, 0, 1, 1)),
        (torch.zeros(2, 5).int(), torch.rand(4), ints(0, 0, 1, 1)),
        (torch.zeros(5, 6).int(), torch.rand(4), ints(0, 0, 1, 1)),
        (torch.zeros(0, 6).int(), torch.rand(4), ints(0, 0, 0, 0)),
        (torch.zeros(2, 6).int(), torch.rand(3), ints(0, 0, 1, 1)),
        (torch.zeros(2, 6).int(), torch.rand(4), ints(0, 0, 1)),
    ],
)
@pytest.mark.parametrize("form", ROPES)
def test_tables_of_rope(form, table):
    rejects("rope_?", ROPES[form], [torch.randn(6, 2, 8), torch.randn(6, 1, 8)], *table)


@pytest.mark.parametrize("value", [-1, 2**24, INT_MAX])
def test_positions_of_the_forms_of_rope(value):
    positions = torch.full((6, 3), value)
    section = {"mrope_section": (2, 1, 1)}
    heads = [torch.randn(6, 2, 8), torch.randn(6, 1, 8)]
    for function in (keye_ops.rope_2d, keye_ops.rope_2d_):
        rejects("rope_?", lambda *x, f=function: f(*x, positions[:, :2]), heads)
    for function in (keye_ops.rope_3d, keye_ops.rope_3d_):
        rejects("rope_?", lambda *x, f=function: f(*x, positions.T, **section), heads)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("value", [-1, 4, INT_MAX, -(2**31), 2**62, 2**63 - 1, -(2**63)])
def test_positions_of_patch_embed_outside_the_grid(value, dtype):
    if dtype == torch.int32 and not -(2**31) <= value <= INT_MAX:
        pytest.skip("not an int32")
    grid = PackedGrid.from_grid_thw([(1, 4, 4)])
    for place in ((0, 0), (15, 1)):
        positions = grid.position_ids.to(dtype)
        positions[place] = value
        rejects(
            "patch_embed", OPS.patch_embed, patch_inputs(), grid.grid, grid.image_offsets, positions
        )
