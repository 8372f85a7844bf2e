"""varlen_attention's CUDA kernels: of both architectures on the host executor, and on a GPU."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from fuzz_cases import Tally, dense_attention, judge, largest, plain_attention, visible
from host_cuda import ATTENTION_ARCHS, build, executor, host_cuda, take_reports, unavailable
from selftest_kernels import ERROR_WORD
from torch._dynamo.testing import CompileCounterWithBackend

import keye_ops

HEAD_DIMS = (64, 72, 80, 96, 128)
DTYPES = (torch.bfloat16, torch.float16)
DEVICES = [*(f"sm_{arch}" for arch in ATTENTION_ARCHS)]
DEVICES += ["cuda"] if torch.cuda.is_available() else []

# Lengths of the segments (q, k), rows past the last offset (q, k), heads (q, k).
CASES = {
    "one block": ([40], [40], 0, 0, (2, 2)),
    "one token": ([1], [1], 0, 0, (1, 1)),
    "around 16": ([15, 16, 17], [15, 16, 17], 0, 0, (2, 1)),
    "around 64": ([63, 64, 65], [65, 64, 63], 0, 0, (1, 1)),
    "around 128": ([127, 128, 129], [129, 127, 128], 0, 0, (1, 1)),
    "around 256": ([257], [255], 0, 0, (2, 2)),
    "many keys": ([70], [600], 3, 5, (2, 1)),
    "many queries": ([600], [70], 5, 3, (2, 1)),
    "empty and odd": ([0, 5, 0, 131, 0, 3, 7], [2, 5, 0, 64, 4, 0, 19], 1, 1, (4, 1)),
    "no segment": ([], [], 5, 4, (2, 2)),
    "no key": ([3, 70], [0, 0], 0, 0, (2, 2)),
    "no query": ([0, 0], [3, 70], 0, 0, (2, 2)),
    "short ones": ([3] * 30, [5] * 30, 0, 0, (1, 1)),
    "a group of 8": ([37, 90], [90, 37], 0, 0, (8, 1)),
}


@pytest.fixture(params=DEVICES)
def device(request):
    """Where tensors are, while the kernels of an architecture run."""
    if request.param == "cuda":
        yield "cuda"
        return
    if reason := unavailable():
        pytest.skip(reason)
    with host_cuda(attention_arch=int(request.param[3:])):
        yield "cpu"
        assert [report.text() for report in take_reports() if report.findings] == []


def offsets(lengths):
    return torch.tensor([0, *np.cumsum(lengths, dtype=int).tolist()], dtype=torch.int32)


def make(case, dtype, head_dim, seed=0):
    """q, k, v and dout on the CPU, and the offsets."""
    lengths_q, lengths_k, rest_q, rest_k, (heads, kv_heads) = case
    generator = torch.Generator().manual_seed(seed)
    nq, nk = sum(lengths_q) + rest_q, sum(lengths_k) + rest_k
    shapes = ((nq, heads), (nk, kv_heads), (nk, kv_heads), (nq, heads))
    tensors = [torch.randn(*shape, head_dim, generator=generator).to(dtype) for shape in shapes]
    return tensors, (offsets(lengths_q), offsets(lengths_k))


def run(device, tensors, cu, **options):
    """out, lse and the gradients of q, k and v, on the CPU."""
    *leaves, dout = (x.to(device) for x in tensors)
    leaves = [x.detach().requires_grad_() for x in leaves]
    with keye_ops.backend("native"):
        out, lse = keye_ops.varlen_attention(
            *leaves, *(c.to(device) for c in cu), return_lse=True, **options
        )
        gradients = torch.autograd.grad(out, leaves, dout)
    return [x.detach().cpu() for x in (out, lse, *gradients)]


TALLY = Tally()


def judged(device, tensors, cu, scale, causal):
    """The results, and for each by name those of plain PyTorch, of fp64, and their terms' size."""
    *qkv, dout = tensors
    q, k, v = qkv
    seen = visible(*cu, len(q), len(k), causal)
    factor = q.shape[2] ** -0.5 if scale is None else scale
    wide = [x.double().requires_grad_() for x in qkv]
    exact = dense_attention(*wide, seen=seen, scale=factor)
    narrow = [x.detach().requires_grad_() for x in qkv]
    plain = plain_attention(*narrow, cu=cu, scale=factor, seen=seen)
    plain_lse = dense_attention(*(x.float() for x in qkv), seen=seen, scale=factor)["lse"]
    gradients = [
        torch.autograd.grad(out, leaves, dout.to(out.dtype))
        for out, leaves in ((plain, narrow), (exact["out"], wide))
    ]

    reach = largest(v.double().norm(dim=-1)) * largest(dout.double().norm(dim=-1))
    score = 1 + largest(q.double().norm(dim=-1)) * largest(k.double().norm(dim=-1)) * abs(factor)
    queries = (max(len(q), 1) * q.shape[1] / k.shape[1]) ** 0.5
    dscore = score * reach * abs(factor)
    sizes = (largest(v), score, dscore * largest(k), dscore * largest(q) * queries,
             score * largest(dout) * queries)  # fmt: skip
    names = ("out", "lse", "dq", "dk", "dv")
    plains, exacts = (plain, plain_lse, *gradients[0]), (exact["out"], exact["lse"], *gradients[1])
    return dict(zip(names, zip(plains, exacts, sizes, strict=True), strict=True))


def compare(device, tensors, cu, scale=None, causal=False, tally=TALLY):
    """Hold everything to the rule of twice plain PyTorch's error."""
    results = run(device, tensors, cu, softmax_scale=scale, causal=causal)
    wanted = judged(device, tensors, cu, scale, causal)
    for actual, (name, (plain, exact, size)) in zip(results, wanted.items(), strict=True):
        judge(name, actual, plain.detach(), exact.detach(), size, tally)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(device, case, causal):
    number = list(CASES).index(case) + causal
    dtype, head_dim = DTYPES[number % 2], HEAD_DIMS[number % 5]
    compare(device, *make(CASES[case], dtype, head_dim, number), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(device, head_dim, dtype):
    case = ([150, 9], [75, 40], 0, 0, (2, 1))
    compare(device, *make(case, dtype, head_dim), causal=head_dim != 72)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-3])
def test_softmax_scale(device, scale):
    compare(device, *make(([90], [80], 0, 0, (1, 1)), torch.bfloat16, 72), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_logits(device, dtype):
    (q, k, v, dout), cu = make(([90, 3], [150, 3], 0, 0, (2, 2)), dtype, 72)
    compare(device, (q * 30, k * 30, v, dout), cu, tally=None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_all_warpgroups(device, dtype):
    """Enough of them for the kernel whose blocks have 256 queries."""
    compare(device, *make(([300, 290], [130, 40], 0, 0, (2, 1)), dtype, 72))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", range(4))
def test_special_values_stay_in_their_segment(device, which, value, causal):
    tensors, cu = make(([20, 30, 25], [20, 30, 25], 2, 2, (1, 1)), torch.bfloat16, 72)
    want = run(device, tensors, cu, causal=causal)
    spoiled = [x.clone() for x in tensors]
    spoiled[which][[25, 76]] = value
    results = run(device, spoiled, cu, causal=causal)
    others = [*range(20), *range(50, 75)]
    for actual, right in zip(results, want, strict=True):
        rows = (slice(None), others) if actual.dim() == 2 else others
        assert torch.equal(actual[rows], right[rows])
    touched = results[0 if which < 3 else 2]
    assert not touched[20:50].isfinite().all()


def test_rows_past_the_last_offset(device):
    tensors, cu = make(([5, 70], [40, 9], 140, 130, (2, 2)), torch.bfloat16, 72)
    out, lse, dq, dk, dv = run(device, tensors, cu)
    assert not any(x.any() for x in (out[75:], dq[75:], dk[49:], dv[49:]))
    assert (lse[:, 75:] == -torch.inf).all()


@pytest.mark.parametrize("head_dim", [72, 128])
def test_a_segment_does_not_depend_on_its_neighbours(device, head_dim):
    lengths = [260, 70, 5]
    tensors, cu = make((lengths, lengths, 0, 0, (3, 1)), torch.bfloat16, head_dim)
    together = run(device, tensors, cu, causal=True)
    for begin, end in pairwise(cu[0].tolist()):
        alone = run(device, [x[begin:end] for x in tensors], [offsets([end - begin])] * 2,
                    causal=True)  # fmt: skip
        for whole, part in zip(together, alone, strict=True):
            rows = whole[:, begin:end] if whole.dim() == 2 else whole[begin:end]
            assert torch.equal(rows, part)


def test_views_of_a_packed_qkv(device):
    (q, k, v, dout), cu = make(([80, 33], [80, 33], 0, 0, (2, 2)), torch.bfloat16, 72)
    views = [*torch.stack([q, k, v], 1).unbind(1), dout]
    assert not views[0].is_contiguous()
    pairs = zip(run(device, views, cu), run(device, (q, k, v, dout), cu), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_gradients_of_a_sum(device):
    """Their strides are zeros."""
    (q, k, v, dout), cu = make(([80, 33], [80, 33], 0, 0, (2, 2)), torch.bfloat16, 72)
    ones = torch.ones(()).to(dout).expand_as(dout)
    pairs = zip(
        run(device, (q, k, v, ones), cu), run(device, (q, k, v, ones.clone()), cu), strict=True
    )
    assert all(torch.equal(*pair) for pair in pairs)


def test_mean_errors():
    """Of all that was compared before, at most 1.05 of plain PyTorch's."""
    TALLY.verify()


# ---- the plan ----


def plan_by_name(cu_q, cu_k, total_q, total_k, causal=False, seed=0):
    """Counts and tiles that the kernel writes, and what it reports; past the op's checks."""
    if reason := unavailable():
        pytest.skip(reason)
    executor().load_library(str(build() / "host_cuda_varlen_attention.so"))
    cu = [np.array(x, np.int32) for x in (cu_q, cu_k)]
    segments = len(cu_q) - 1
    sizes = [n // 256 + min(segments + 1, n) for n in (total_q, total_k)]
    tiles = [np.zeros((max(n, 1), 4), np.int32) for n in sizes]
    counts, error = np.zeros(2, np.int32), np.zeros(1, ERROR_WORD)
    report = executor().launch(
        "attention_plan",
        inputs={"cu_seqlens_q": cu[0], "cu_seqlens_k": cu[1]},
        inouts={"q_tiles": tiles[0], "k_tiles": tiles[1], "num_tiles": counts, "error_word": error},
        numbers={"num_segments": segments, "total_q": total_q, "total_k": total_k,
                 "causal": causal},
        grid=[1], block=[1024], shared_bytes=4096,
        schedule=executor().Schedule(seed=seed),
    )  # fmt: skip
    assert report.findings == []
    return [x[:n] for x, n in zip(tiles, counts, strict=True)], error[0]


def rows_of(tiles):
    """Every row of the batch with its counterpart's place, in the order of rows."""
    rows = {}
    for row, left, begin, length in tiles.tolist():
        for i in range(min(left, 256)):
            assert row + i not in rows
            rows[row + i] = (left - i, begin, length)
    return rows


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [
        ([], []),
        ([0, 0], [0, 0]),
        ([1], [700]),
        ([255, 256, 257], [3, 0, 1]),
        ([0, 5, 0, 1000, 3, 2], [9, 0, 0, 300, 700, 1]),
        ([1] * 300, [2] * 300),
    ],
)
def test_tiles_cover_every_row_once(lengths, causal):
    cu = [[0, *np.cumsum(x, dtype=int).tolist()] for x in lengths]
    totals = [c[-1] + rest for c, rest in zip(cu, (3, 300), strict=True)]
    sides, error = plan_by_name(*cu, *totals, causal)
    assert error["code"] == 0
    for tiles, own, other, total in zip(sides, cu, cu[::-1], totals, strict=True):
        rows = rows_of(tiles)
        assert sorted(rows) == list(range(total))
        want = {i: (total - i, 0, 0) for i in range(own[-1], total)}
        for (a, b), (c, d) in zip(pairwise(own), pairwise(other), strict=True):
            want |= {i: (b - i, c, d - c) for i in range(a, b)}
        for i, (left, begin, length) in rows.items():
            assert (left, length) == (want[i][0], want[i][2])
            assert begin == want[i][1] or length == 0


def test_the_longest_come_first():
    lengths = [10, 3000, 0, 700, 300]
    cu = [0, *np.cumsum(lengths).tolist()]
    sides, _ = plan_by_name(cu, cu, cu[-1], cu[-1])
    for tiles in sides:
        assert tiles[:, 3].tolist() == sorted(tiles[:, 3].tolist(), reverse=True)
    (q_tiles, k_tiles), _ = plan_by_name([0, 4096], [0, 4096], 4096, 4096, causal=True)
    assert q_tiles[:, 0].tolist() == list(range(3840, -1, -256))
    assert k_tiles[:, 0].tolist() == list(range(0, 4096, 256))


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "code", "value"),
    [
        ([-7, 5, 9], [0, 5, 9], 0, -7),
        ([3, 5, 9], [0, 5, 9], 0, 3),
        ([0, 9, 5], [0, 5, 9], 0, 5),
        ([0, 5, 2**31 - 1], [0, 5, 9], 0, 2**31 - 1),
        ([0, -(2**31), 9], [0, 5, 9], 0, -(2**31)),
        ([0, 5, 9], [0, 5, 10], 1, 10),
        ([0, 5, 9], [0, 9, 5], 1, 5),
    ],
)
def test_offsets_that_lie(cu_q, cu_k, code, value):
    """They are reported, and all rows are in tiles without a counterpart."""
    sides, error = plan_by_name(cu_q, cu_k, 9, 9)
    first, _ = plan_by_name([0, 0], [0, 0], 9, 9)
    assert error["code"] == 9 + code
    assert error["value"] == value
    for tiles, zeros in zip(sides, first, strict=True):
        assert {i: x[2] for i, x in rows_of(tiles).items()} == dict.fromkeys(range(9), 0)
        assert zeros.shape == tiles.shape


def test_a_plan_is_reused(device):
    tensors, cu = make(([80, 33], [50, 9], 0, 0, (2, 1)), torch.bfloat16, 72)
    cu = [c.to(device) for c in cu]
    want = run(device, tensors, cu, causal=True)
    totals = {"total_q": len(tensors[0]), "total_k": len(tensors[1])}
    plan = keye_ops.AttentionPlan.make(*cu, **totals, causal=True)
    assert plan.tiles.numel() > 0
    for _ in range(2):
        results = run(device, tensors, cu, causal=True, plan=plan)
        assert all(torch.equal(*pair) for pair in zip(results, want, strict=True))


# ---- FlashAttention's interface ----


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attn_varlen_func(causal):
    (q, k, v, _), cu = make(([5, 20], [9, 20], 0, 0, (4, 2)), torch.bfloat16, 72)
    out, lse = keye_ops.varlen_attention(q, k, v, *cu, causal=causal, return_lse=True)
    args = (q, k, v, *cu, 20, 20)
    assert torch.equal(keye_ops.flash_attn_varlen_func(*args, causal=causal), out)
    options = {"causal": causal, "return_attn_probs": True, "deterministic": True}
    again, its_lse, probabilities = keye_ops.flash_attn_varlen_func(*args, **options)
    assert torch.equal(again, out)
    assert torch.equal(its_lse, lse)
    assert probabilities is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("dropout_p", 0.1), ("window_size", (4, -1)), ("softcap", 30.0),
     ("alibi_slopes", torch.zeros(4)), ("block_table", torch.zeros(2, 3))],
)  # fmt: skip
def test_options_that_flash_attention_has_alone(name, value):
    (q, k, v, _), cu = make(([5], [5], 0, 0, (4, 4)), torch.bfloat16, 72)
    with pytest.raises(RuntimeError, match=f"flash_attn_varlen_func: {name} must be its default"):
        keye_ops.flash_attn_varlen_func(q, k, v, *cu, 5, 5, **{name: value})


# ---- what is left to the reference, and graphs ----


def test_what_is_left_to_the_reference():
    if reason := unavailable():
        pytest.skip(reason)
    (q, k, v, _), cu = make(([5, 3], [5, 3], 0, 0, (2, 2)), torch.bfloat16, 72)
    storage = torch.zeros(k.numel() + 8, dtype=k.dtype)
    shifted = storage[4:-4].view_as(k).copy_(k)
    columns = k.transpose(1, 2).contiguous().transpose(1, 2)
    cases = [
        ("it has no torch.float32 on cuda", (q.float(), k.float(), v.float())),
        ("it has no torch.float64 on cuda", (q.double(), k.double(), v.double())),
        ("it has no head_dim 8 on cuda", (q[..., :8], k[..., :8], v[..., :8])),
        ("it needs rows of k at multiples of 16 bytes on cuda", (q, shifted, v)),
        ("it needs rows of k at multiples of 16 bytes on cuda", (q, k[:, :1].expand_as(k), v)),
        ("k must have unit last stride, got 2", (q, columns, v)),
    ]
    with host_cuda():
        for reason, qkv in cases:
            out = keye_ops.varlen_attention(*qkv, *cu)
            last = keye_ops.last_dispatch("varlen_attention")
            assert (last.implementation, last.reason) == ("reference", reason)
            seen = visible(*cu, 8, 8, False)
            exact = dense_attention(*map(torch.Tensor.double, qkv), seen, qkv[0].shape[2] ** -0.5)
            judge("out", out, plain_attention(*qkv, cu, None, seen), exact["out"], largest(v))
            message = f"the native kernel was required, but {reason}"
            with pytest.raises(RuntimeError, match=message), keye_ops.backend("native"):
                keye_ops.varlen_attention(*qkv, *cu)


def test_transforms_are_left_to_the_reference():
    if reason := unavailable():
        pytest.skip(reason)
    (q, k, v, _), cu = make(([5, 3], [5, 3], 0, 0, (2, 2)), torch.bfloat16, 72)
    with host_cuda():
        grad = torch.func.grad(lambda q: keye_ops.varlen_attention(q, k, v, *cu).float().sum())
        assert grad(q).shape == q.shape
    assert "torch.func" in keye_ops.last_dispatch("varlen_attention").reason


@pytest.mark.parametrize(("segments", "total"), [(0, 0), (3, 0), (3, 2), (3, 700), (0, 300)])
def test_the_fake_of_a_plan_has_its_size(device, segments, total):
    cu = torch.zeros(segments + 1, dtype=torch.int32, device=device)
    op = torch.ops.keye_ops.varlen_attention_plan
    plan = op(cu, cu, total, total, True)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(cu)
        assert op(fake, fake, total, total, True).shape == plan.shape
    # Not all of a plan is written, so that its values cannot be compared.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.default, (cu, cu, total, total, True), test_utils=utilities)


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("where", ["cpu", *DEVICES[len(ATTENTION_ARCHS) :]])
def test_one_graph_for_all_sizes(where, planned):
    def function(q, k, v, cu):
        plan = None
        if planned:
            plan = keye_ops.AttentionPlan.make(cu, total_q=q.shape[0], causal=True)
        once = keye_ops.varlen_attention(q.sin(), k, v, cu, causal=True, plan=plan)
        return keye_ops.varlen_attention(once, k, v, cu, causal=True, plan=plan)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ([5, 9, 3], [7, 0, 1, 20], [4] * 9):
        (*qkv, _), cu = make((lengths, lengths, 0, 0, (2, 1)), torch.bfloat16, 72)
        leaves = [x.to(where).requires_grad_() for x in qkv]
        outs = [f(*leaves, cu[0].to(where)) for f in (compiled, function)]
        gradients = [torch.autograd.grad(x.float().square().sum(), leaves) for x in outs]
        assert torch.equal(*outs)
        assert all(map(torch.equal, *gradients))
    assert counter.frame_count == 1


def test_a_plan_brings_its_longest_segments():
    cu = offsets([3, 4])
    x = torch.zeros(7, 1, 72)
    plan = keye_ops.AttentionPlan.make(cu, total_q=7, max_seqlen_q=3)
    message = "max_seqlen_q must be at least the longest segment, 4, got 3"
    with pytest.raises(RuntimeError, match=message):
        keye_ops.varlen_attention(x, x, x, cu, plan=plan)
    keye_ops.varlen_attention(x, x, x, cu, plan=plan, max_seqlen_q=4, max_seqlen_k=4)


@pytest.mark.parametrize("arch", ATTENTION_ARCHS)
def test_bank_conflicts_at_head_dim_72(arch):
    """Wavefronts of shared memory of each launch, at most 1.05 of those without conflicts."""
    if reason := unavailable():
        pytest.skip(reason)
    tensors, cu = make(([130], [200], 0, 0, (2, 1)), torch.bfloat16, 72)
    with host_cuda(attention_arch=arch, counters=True):
        plan = keye_ops.AttentionPlan.make(*cu, total_q=130, total_k=200)
        take_reports()
        run("cpu", tensors, cu, plan=plan)
        counters = [report.counters for report in take_reports()]
    ratios = [
        one["shared_wavefronts"] / one["shared_ideal"] for one in counters if one["shared_ideal"]
    ]
    assert len(ratios) >= 3
    assert max(ratios) <= 1.05, ratios
