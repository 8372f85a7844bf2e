"""AttentionPlan: what it brings to calls and refuses; its kernel on batches of any kind."""

import sys

import numpy as np
import pytest
import torch
from attention_oracle import SEGMENTS, make
from test_varlen_attention_cuda import plan_by_name
from torch._dynamo.testing import CompileCounterWithBackend

import keye_ops
from keye_ops.varlen_attention import varlen_attention_reference


def test_a_plan_brings_its_longest_segments(monkeypatch):
    seen = []

    def reference(*args):
        seen.append(args[5:7])
        return varlen_attention_reference(*args)

    module = sys.modules[varlen_attention_reference.__module__]
    monkeypatch.setattr(module, "varlen_attention_reference", reference)
    q, k, v, cu, _ = make(SEGMENTS["odd"])
    plan = keye_ops.AttentionPlan.make(cu, total_q=len(q), max_seqlen_q=50)
    assert (plan.total_k, plan.cu_seqlens_k is cu) == (len(q), True)
    with keye_ops.backend("reference"):
        keye_ops.varlen_attention(q, k, v, cu, plan=plan)
        keye_ops.varlen_attention(q, k, v, cu, plan=plan, max_seqlen_k=40)
    assert seen == [(50, 50), (50, 40)]


def test_a_plan_of_something_else():
    q, k, v, cu, _ = make(SEGMENTS["odd"])
    other = cu.clone()
    plan = keye_ops.AttentionPlan.make(cu, total_q=len(q))
    wrong = [((q, k, v, other, cu), {}), ((q, k, v, cu, other), {}), ((q[1:], k, v, cu), {})]
    wrong += [((q, k[1:], v[1:], cu), {}), ((q, k, v, cu), {"causal": True})]
    messages = ["plan must be made of the call's cu_seqlens, got one of others"] * 2
    messages += [
        rf"plan must be made for the rows of q and k, \({rows}\), got \(61, 61\)"
        for rows in ("60, 61", "61, 60")
    ]
    messages += ["plan must be made with causal=True, got False"]
    for (args, options), message in zip(wrong, messages, strict=True):
        with pytest.raises(RuntimeError, match=f"varlen_attention: {message}"):
            keye_ops.varlen_attention(*args, plan=plan, **options)
    with pytest.raises(RuntimeError, match="total_k must be given with cu_seqlens_k, got None"):
        keye_ops.AttentionPlan.make(cu, other, total_q=5)
    with pytest.raises(RuntimeError, match=r"totals must not be negative, got \(-1, -1\)"):
        keye_ops.AttentionPlan.make(cu, total_q=-1)
    with pytest.raises(RuntimeError, match=r"cu_seqlens_q must be int32 \[num_segments \+ 1\]"):
        keye_ops.AttentionPlan.make(cu.long(), total_q=5)


def test_a_plan_in_a_graph():
    def function(q, k, v, cu):
        plan = keye_ops.AttentionPlan.make(cu, total_q=q.shape[0], causal=True)
        once = keye_ops.varlen_attention(q.sin(), k, v, cu, causal=True, plan=plan)
        return keye_ops.varlen_attention(once, k, v, cu, causal=True, plan=plan)

    def given(q, k, v, plan):
        return keye_ops.varlen_attention(q.sin(), k, v, plan.cu_seqlens_q, plan=plan)

    counter = CompileCounterWithBackend("aot_eager")
    options = {"fullgraph": True, "dynamic": True, "backend": counter}
    compiled, compiled_given = torch.compile(function, **options), torch.compile(given, **options)
    with keye_ops.backend("auto"):
        for lengths in ([5, 9, 3, 6, 2], [7, 0, 1, 20], [4] * 9):
            q, k, v, cu, _ = make((lengths, lengths, 0, 0))
            q.requires_grad_()
            plan = keye_ops.AttentionPlan.make(cu, total_q=len(q))
            for mine, want in (
                (compiled(q, k, v, cu), function(q, k, v, cu)),
                (compiled_given(q, k, v, plan), given(q, k, v, plan)),
            ):
                torch.testing.assert_close(mine, want)
                gradients = [torch.autograd.grad(x.square().sum(), q) for x in (mine, want)]
                torch.testing.assert_close(*gradients)
    assert counter.frame_count == 2


# ---- the kernel that plans, past the op's checks ----


def classes_of(tiles, of_queries, causal):
    """How many 256 others each tile meets, in the order of the tiles."""
    others = []
    for _, left, _, length in tiles.tolist():
        rows = min(left, 256)
        if causal and of_queries:
            length = min(max(length - left + rows, 0), length)
        elif causal:
            length = min(length, left)
        others.append(-(-length // 256))
    return others


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [
        ([1] * 10_000, [1] * 10_000),
        ([0] * 10_000, [0] * 10_000),
        (([0] * 30 + [1]) * 60, ([1] + [0] * 30) * 60),
        ([5, 2000, 0, 700, 1, 300], [2000, 5, 9, 1400, 0, 300]),
    ],
    ids=["of one row", "empty", "mostly empty", "long"],
)
def test_tiles_of_many_segments(lengths, causal):
    cu = [np.cumsum([0, *x]).tolist() for x in lengths]
    totals = [c[-1] + rest for c, rest in zip(cu, (0, 5), strict=True)]
    sides, error = plan_by_name(*cu, *totals, causal)
    assert error["code"] == 0
    for i, (tiles, own, other) in enumerate(zip(sides, cu, cu[::-1], strict=True)):
        segment = np.searchsorted(own, tiles[:, 0], "right") - 1
        rows = np.minimum(tiles[:, 1], 256)
        covered = np.concatenate(
            [np.arange(a, a + n) for a, n in zip(tiles[:, 0], rows, strict=True)] or [[]]
        )
        assert np.array_equal(np.sort(covered), np.arange(totals[i]))
        ends = np.append(own[1:], totals[i])
        assert np.array_equal(tiles[:, 0] + tiles[:, 1], ends[segment])
        lengths_of_others = np.append(np.diff(other), 0)
        assert np.array_equal(tiles[:, 3], lengths_of_others[segment])
        met = classes_of(tiles, i == 0, causal)
        # Costs are counted in 64 others and told apart to a sixteenth: here, of 256, a quarter at
        # most.
        lowest = np.minimum.accumulate(np.array([*met, 0]))[:-1]
        assert (np.array(met) <= np.maximum(lowest * 1.25, lowest)).all()


@pytest.mark.parametrize("seed", range(6))
def test_offsets_of_garbage(seed):
    """They are reported, and every row is in one tile that meets nobody."""
    rng = np.random.default_rng(seed)
    cu = [[0, 3, 9, 700], [0, 3, 9, 600]]
    spoiled = rng.integers(-(2**31), 2**31 - 1, 4).tolist()
    cu[seed % 2] = [0, *spoiled[1:]] if seed > 2 else spoiled
    sides, error = plan_by_name(*cu, 700, 600, bool(seed % 3))
    assert error["code"] == 9 + seed % 2
    assert error["value"] in spoiled
    for tiles, total in zip(sides, (700, 600), strict=True):
        assert not tiles[:, 3].any()
        rows = np.concatenate([np.arange(row, row + min(left, 256)) for row, left, *_ in tiles])
        assert np.array_equal(np.sort(rows), np.arange(total))
