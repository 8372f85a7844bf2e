"""varlen_attention against a dense block-diagonal mask, in every form of segments; gradients."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from attention_oracle import (
    SEGMENTS,
    attention,
    compare,
    ints,
    make,
    offsets,
    oracle,
    plain_attention,
    zeros,
)
from instruction_sets import on_each_lesser_instruction_set, rerun
from tolerance import assert_within_twice
from torch._dynamo.testing import CompileCounterWithBackend

import keye_ops
from keye_ops.varlen_attention import varlen_attention_reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
WAYS = ["public", "registered"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Products this small only get slower when threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_values(way, dtype, segments, causal):
    compare(way, make(SEGMENTS[segments], dtype), causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_head_dims(way, dtype, head_dim, causal):
    compare(way, make(SEGMENTS["odd"], dtype, head_dim=head_dim), causal=causal)


@pytest.mark.parametrize("segments", ["odd", "q shorter", "q longer"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (8, 1), (32, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_grouped_queries(way, dtype, heads, kv_heads, segments):
    inputs = make(SEGMENTS[segments], dtype, heads=heads, kv_heads=kv_heads)
    compare(way, inputs, causal=True)


@pytest.mark.parametrize("scale", [0.0, 0.5, -1.0])
@pytest.mark.parametrize("way", WAYS)
def test_softmax_scale(way, scale):
    compare(way, make(SEGMENTS["odd"], torch.float32), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_views_of_a_packed_qkv(way, dtype):
    heads, head_dim = 4, 72
    qkv = torch.randn(20, 3, heads, head_dim, generator=torch.Generator()).to(dtype)
    q, k, v = qkv.unbind(1)
    assert not q.is_contiguous()
    cu_seqlens = offsets([8, 12])
    inputs = (q, k, v, cu_seqlens, cu_seqlens)
    compare(way, inputs)
    copies = [x.contiguous() for x in (q, k, v)]
    want = attention(way, *copies, cu_seqlens, cu_seqlens)[0]
    torch.testing.assert_close(attention(way, *inputs)[0], want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_huge_logits(way, dtype):
    q, k, v, *cu = make(SEGMENTS["odd"], dtype)
    compare(way, (q * 60, k * 60, v, *cu))  # scores up to 1e4 and beyond
    out, _ = attention(way, q * 60, k * 60, v, *cu)
    assert out.isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("way", WAYS)
def test_special_values_stay_in_their_segment(way, which, value, causal):
    inputs = list(make(([5, 7, 6], [5, 7, 6], 2, 2), torch.float32))
    want, want_lse = attention(way, *inputs, causal=causal)
    inputs["qkv".index(which)][8] = value
    inputs["qkv".index(which)][19] = value  # belongs to no segment
    out, lse = attention(way, *inputs, causal=causal)
    others = [*range(5), *range(12, 20)]
    assert torch.equal(out[others], want[others])
    assert torch.equal(lse[:, others], want_lse[:, others])
    # PyTorch's attention turns a row of NaN scores to zeros, so that of q is seen in lse only.
    assert not (lse[:, 8] if which == "q" else out[11]).isfinite().any()


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_see_no_key_are_zero_whatever_they_hold(way):
    inputs = make(([3, 4], [0, 5], 0, 0), torch.float32)
    inputs[0][1] = torch.nan
    out, lse = attention(way, *inputs)
    assert torch.equal(out[:3], torch.zeros(3, 2, 8))
    assert (lse[:, :3] == -torch.inf).all()
    assert out[3:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_a_segment_does_not_depend_on_its_neighbours(way, dtype):
    q, k, v, cu, _ = make(([9, 30, 14], [9, 30, 14], 0, 0), dtype)
    out, lse = attention(way, q, k, v, cu, cu)
    alone = [x[9:39] for x in (q, k, v)]
    out_alone, lse_alone = attention(way, *alone, offsets([30]), offsets([30]))
    assert torch.equal(out[9:39], out_alone)
    assert torch.equal(lse[:, 9:39], lse_alone)


def test_cu_seqlens_k_defaults_to_those_of_q():
    q, k, v, cu, _ = make(SEGMENTS["odd"])
    want = keye_ops.varlen_attention(q, k, v, cu, cu)
    assert torch.equal(keye_ops.varlen_attention(q, k, v, cu), want)


@pytest.mark.parametrize(
    ("options", "longest"),
    [
        ({"max_seqlen_q": 40}, (40, 40)),
        ({"max_seqlen_q": 41, "max_seqlen_k": 50}, (41, 50)),
        ({"max_seqlen_k": 50}, (None, 50)),
        ({}, (None, None)),
    ],
)
def test_max_seqlen_k_defaults_to_that_of_q_where_the_segments_are_the_same(
    monkeypatch, options, longest
):
    seen = []

    def reference(*args):
        seen.append(args[5:7])
        return varlen_attention_reference(*args)

    module = sys.modules[varlen_attention_reference.__module__]
    monkeypatch.setattr(module, "varlen_attention_reference", reference)
    q, k, v, cu, _ = make(SEGMENTS["odd"])
    with keye_ops.backend("reference"):
        keye_ops.varlen_attention(q, k, v, cu, **options)
        keye_ops.varlen_attention(q, k, v, cu, cu.clone(), max_seqlen_q=40)
    assert seen == [longest, (40, None)]


@pytest.mark.parametrize(("nq", "nk"), [(1100, 1300), (2048, 2049), (1025, 4000), (1, 50)])
def test_causal_rows_of_more_than_a_block(nq, nk):
    q, k, v, *cu = make(([nq], [nk], 0, 0), torch.float64, heads=2, kv_heads=1, head_dim=4)
    out, _ = varlen_attention_reference(q, k, v, *cu, causal=True)
    scores = torch.einsum("qhd,kd->hqk", q, k[:, 0]) / 2
    scores += torch.full_like(scores, -torch.inf).triu(nk - nq + 1)
    want = torch.einsum("hqk,kd->qhd", scores.softmax(-1), v[:, 0])
    torch.testing.assert_close(out, want, rtol=1e-11, atol=1e-12)


def test_causal_rows_never_hold_a_mask_of_all_rows(monkeypatch):
    masks = []

    def count(q, k, v, *, attn_mask=None, **options):
        masks.append(attn_mask.shape)
        assert k.shape[-2] == attn_mask.shape[1]
        return torch.zeros_like(q)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    nq, nk = 4096, 65536
    q, k, v, *cu = make(([nq], [nk], 0, 0), torch.float32, heads=1, kv_heads=1)
    varlen_attention_reference(q, k, v, *cu, causal=True, return_lse=False)
    assert sum(rows for rows, _ in masks) == nq
    assert [keys for _, keys in masks] == [
        nk - nq + sum(r for r, _ in masks[: i + 1]) for i in range(len(masks))
    ]
    assert max(rows * keys for rows, keys in masks) <= nq * nk // 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_lse_is_wide_and_only_given_when_asked_for(dtype):
    q, k, v, cu, _ = make(SEGMENTS["odd"], dtype)
    out = keye_ops.varlen_attention(q, k, v, cu)
    again, lse = keye_ops.varlen_attention(q, k, v, cu, return_lse=True)
    assert torch.equal(out, again)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not lse.requires_grad
    options = (None, None, None, False, False)
    _, empty = torch.ops.keye_ops.varlen_attention(q, k, v, cu, cu, *options)
    assert (empty.shape, empty.dtype) == ((0,), lse.dtype)


def test_lse_of_more_rows_than_a_block():
    q, k, v, cu, _ = make(([2100], [2100], 0, 0), torch.float32, heads=1, kv_heads=1)
    for causal in (False, True):
        _, lse = attention("public", q, k, v, cu, cu, causal=causal)
        scores = (q[:, 0].double() @ k[:, 0].double().T) / math.sqrt(8)
        if causal:
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        torch.testing.assert_close(lse[0].double(), scores.logsumexp(1), rtol=1e-5, atol=1e-5)


def test_many_segments():
    count = 3000
    q, k, v, cu, _ = make(([1] * count, [1] * count, 0, 0), torch.float32)
    torch.testing.assert_close(keye_ops.varlen_attention(q, k, v, cu), v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segments", SEGMENTS)
def test_gradients(segments, causal):
    """The registered gradient, the reference's and the oracle's autograd agree."""
    *qkv, cu_q, cu_k = make(SEGMENTS[segments], heads=4)
    for x in qkv:
        x.requires_grad_()
    out, lse = attention("registered", *qkv, cu_q, cu_k, causal=causal)
    assert not lse.requires_grad
    dout = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator())
    actual = torch.autograd.grad(out, qkv, dout)
    reference, _ = varlen_attention_reference(*qkv, cu_q, cu_k, causal=causal)
    dense, _ = oracle(*qkv, cu_q, cu_k, causal=causal)
    for other in (reference, dense):
        want = torch.autograd.grad(other, qkv, dout)
        torch.testing.assert_close(actual, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "segments", [([0, 1, 3], [0, 1, 3], 1, 0), ([1, 0, 3], [3, 1, 2], 0, 1)], ids=["self", "cross"]
)
@pytest.mark.parametrize("way", WAYS)
def test_gradcheck(way, segments, causal):
    *qkv, cu_q, cu_k = make(segments, heads=2, kv_heads=1, head_dim=4)
    inputs = [x.requires_grad_() for x in qkv]
    torch.autograd.gradcheck(
        lambda *x: attention(way, *x, cu_q, cu_k, causal=causal)[0], inputs, fast_mode=True
    )


def test_gradcheck_of_many_shapes():
    lengths = [
        ([], []),
        ([0], [0]),
        ([1], [1]),
        ([0, 1], [1, 0]),
        ([3], [1]),
        ([1, 0, 2], [2, 1, 3]),
    ]
    shapes = [
        (segments, heads, head_dim, causal)
        for segments in lengths
        for heads in ((1, 1), (2, 1), (4, 2))
        for head_dim in (1, 3)
        for causal in (False, True)
    ]
    assert len(shapes) >= 50
    for i, (segments, (heads, kv_heads), head_dim, causal) in enumerate(shapes):
        rest = (i % 2, i % 3)
        *qkv, cu_q, cu_k = make((*segments, *rest), torch.float64, heads, kv_heads, head_dim)
        inputs = [x.requires_grad_() for x in qkv]

        def function(*x, cu=(cu_q, cu_k), causal=causal):
            return attention("registered", *x, *cu, causal=causal)[0]

        assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_within_twice_of_plain(way, dtype, causal):
    *qkv, cu_q, cu_k = make(([20, 1, 33], [25, 1, 30], 2, 3), dtype, heads=4, head_dim=72)
    dout = torch.randn(qkv[0].shape, generator=torch.Generator()).to(dtype)

    def grads(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in qkv]
        out = function(*leaves, cu_q, cu_k, causal=causal)
        return torch.autograd.grad(out, leaves, dout.to(dtype))

    actual = grads(lambda *x, **options: attention(way, *x, **options)[0], dtype)
    exact = grads(lambda *x, **options: oracle(*x, **options)[0], torch.float64)
    for triple in zip(actual, grads(plain_attention, dtype), exact, strict=True):
        assert_within_twice(*triple)


def test_the_backward_op_needs_no_autograd_inside():
    """Some modes run ops below autograd, which then records nothing."""
    q, k, v, cu, _ = make(SEGMENTS["odd"])
    out, lse = attention("registered", q, k, v, cu, cu)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dense, _ = oracle(*leaves, cu, cu)
    want = torch.autograd.grad(dense, leaves, torch.ones_like(out))
    op = torch.ops.keye_ops.varlen_attention_backward
    with torch._C._AutoDispatchBelowAutograd():
        actual = op(torch.ones_like(out), q, k, v, out, lse, cu, cu, None, None, None, False)
    torch.testing.assert_close(actual, want)


def test_gradients_through_views_of_a_packed_qkv():
    qkv = torch.randn(12, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    cu = offsets([5, 7])
    dout = torch.randn(12, 2, 8, dtype=torch.float64)
    actual = torch.autograd.grad(attention("registered", *qkv.unbind(1), cu, cu)[0], qkv, dout)
    want = torch.autograd.grad(oracle(*qkv.unbind(1), cu, cu)[0], qkv, dout)
    torch.testing.assert_close(actual, want)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segments", ["odd", "q longer", "rows past the end", "no row"])
def test_opcheck(segments, causal):
    *qkv, cu_q, cu_k = make(SEGMENTS[segments], torch.float32, heads=4)
    inputs = [x.requires_grad_() for x in qkv]
    args = (*inputs, cu_q, cu_k, 40, 40, 0.3, causal)
    torch.library.opcheck(torch.ops.keye_ops.varlen_attention.default, args)
    qkv = [x.detach() for x in qkv]
    out, lse = torch.ops.keye_ops.varlen_attention(*qkv, *args[3:])
    args = (torch.ones_like(out), *qkv, out, lse, *args[3:])
    torch.library.opcheck(torch.ops.keye_ops.varlen_attention_backward.default, args)


def test_compile_makes_one_graph_for_all_sizes():
    counter, graphs = CompileCounterWithBackend("aot_eager"), []

    def function(q, k, v, cu_q, cu_k):
        return keye_ops.varlen_attention(q.sin(), k, v, cu_q, cu_k, causal=True).cos()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ([5, 9, 3, 6, 2], [7, 0, 1, 20], [4] * 9):
        *qkv, cu_q, cu_k = make((lengths, lengths[::-1], 0, 1), heads=4)
        inputs = [x.requires_grad_() for x in qkv]
        with keye_ops.backend("auto"):
            out, want = compiled(*inputs, cu_q, cu_k), function(*inputs, cu_q, cu_k)
        torch.testing.assert_close(out, want)
        gradients = [torch.autograd.grad(x.square().sum(), inputs) for x in (out, want)]
        torch.testing.assert_close(*gradients)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3


class Attention(torch.nn.Module):
    def forward(self, q, k, v, cu_seqlens):
        return keye_ops.varlen_attention(q, k, v, cu_seqlens, causal=True) * 2


def test_export():
    q, k, v, cu, _ = make(([5, 9], [5, 9], 0, 0))
    total, segments = torch.export.Dim("total", min=2), torch.export.Dim("segments", min=2)
    shapes = ({0: total}, {0: total}, {0: total}, {0: segments})
    with keye_ops.backend("auto"):
        exported = torch.export.export(Attention(), (q, k, v, cu), dynamic_shapes=shapes)
    assert "keye_ops.varlen_attention" in exported.graph_module.code
    q, k, v, cu, _ = make(([4, 0, 7], [4, 0, 7], 0, 0), seed=1)
    want = oracle(q, k, v, cu, cu, causal=True)[0] * 2
    torch.testing.assert_close(exported.module()(q, k, v, cu), want)


@on_each_lesser_instruction_set
def test_this_file_on_a_lesser_instruction_set(isa):
    chosen = "values or head_dims or grouped or scale or views or logits or see or neighbours"
    rerun(__file__, isa, f"({chosen} or gradients) and not instruction")


def wrong(**changes):
    good = dict(zip(("q", "k", "v", "cu_q", "cu_k"), make(([2, 4], [2, 4], 0, 0)), strict=True))
    return tuple({**good, **changes}.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"q": zeros(6, 2, 8, dtype=torch.int32)},
            "q must be fp64, fp32, fp16 or bf16, got torch.int32",
        ),
        ({"q": zeros(6, 16)}, r"q must be \[Nq, H, D\], got \[6, 16\]"),
        ({"k": zeros(6, 2, 7)}, r"k must be \[Nk, Hkv, 8\], got \[6, 2, 7\]"),
        (
            {"k": zeros(6, 2, 8).half()},
            r"k must have the dtype and device of q \(torch.float64, cpu\)",
        ),
        ({"v": zeros(5, 2, 8)}, r"v must be \[6, 2, 8\], got \[5, 2, 8\]"),
        ({"v": zeros(6, 2, 8).half()}, "v must have the dtype and device of q"),
        (
            {"q": zeros(6, 3, 8)},
            r"num_heads must be a multiple of num_kv_heads, got \(3, 2\)",
        ),
        (
            {"k": zeros(6, 0, 8), "v": zeros(6, 0, 8)},
            r"num_heads must be a multiple of num_kv_heads, got \(2, 0\)",
        ),
        (
            {"cu_q": ints(0, 2, 6, dtype=torch.int64)},
            r"cu_seqlens_q must be int32 \[num_segments \+ 1\], got torch.int64 \[3\]",
        ),
        (
            {"cu_k": ints()},
            r"cu_seqlens_k must be int32 \[num_segments \+ 1\], got torch.int32 \[0\]",
        ),
        (
            {"cu_k": ints(0)[0]},
            r"cu_seqlens_k must be int32 \[num_segments \+ 1\], got torch.int32 \[\]",
        ),
        (
            {"cu_k": ints(0, 6)},
            r"cu_seqlens_q and cu_seqlens_k must have equal lengths, got \(3, 2\)",
        ),
        ({"cu_q": ints(1, 2, 6)}, "cu_seqlens_q must start at 0, got 1"),
        ({"cu_k": ints(-1, 2, 6)}, "cu_seqlens_k must start at 0, got -1"),
        ({"cu_q": ints(0, 6, 4)}, "cu_seqlens_q must not decrease, got 6 then 4"),
        ({"cu_k": ints(0, -2, 6)}, "cu_seqlens_k must not decrease, got 0 then -2"),
        ({"cu_q": ints(0, 2, 7)}, "cu_seqlens_q must end within the 6 rows, got 7"),
        ({"cu_k": ints(0, 2, 9)}, "cu_seqlens_k must end within the 6 rows, got 9"),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_wrong_input(way, changes, message):
    with pytest.raises(RuntimeError, match=f"varlen_attention: {message}"):
        attention(way, *wrong(**changes))


@pytest.mark.parametrize("name", ["max_seqlen_q", "max_seqlen_k"])
def test_a_longest_segment_that_is_too_short(name):
    message = f"varlen_attention: {name} must be at least the longest segment, 4, got 3"
    keye_ops.varlen_attention(*wrong(), **{name: 4})
    with pytest.raises(RuntimeError, match=message):
        keye_ops.varlen_attention(*wrong(), **{name: 3})


def test_offsets_on_another_device():
    message = "varlen_attention: cu_seqlens_q must be on cpu, got meta"
    with pytest.raises(RuntimeError, match=message):
        varlen_attention_reference(*wrong(cu_q=ints(0, 2, 6).to("meta")))
