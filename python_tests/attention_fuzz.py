"""Random problems for varlen_attention's CUDA kernels on the host executor, under schedules.

Each architecture has a test file of its own, so that they run in several processes.
"""

import numpy as np
import pytest
import torch
from fuzz_cases import Tally, judge
from host_cuda import executor, host_cuda, take_reports, unavailable
from test_varlen_attention_cuda import DTYPES, HEAD_DIMS, judged, make, offsets

SCHEDULES = [
    ("in_order", 0, "early"), ("in_order", 1, "late"), ("reversed", 0, "late"),
    ("reversed", 5, "random"), ("random", 0, "early"), ("random", 4, "random"),
    ("random", 16, "late"), ("random", 64, "random"),
]  # fmt: skip
NUM_CONFIGURATIONS = 256  # of each architecture
LENGTHS = (0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 48, 63, 64, 65, 97)


def configuration(seed):
    """Tensors, offsets and options."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 3))
    lengths = [rng.choice(LENGTHS, count).tolist() for _ in range(2)]
    if rng.integers(2):
        lengths[1] = lengths[0]
    if seed % 16 == 0:
        lengths = [[int(rng.integers(127, 131))], [int(rng.integers(120, 140))]]
    kv_heads = 1 + int(rng.integers(8) == 0)
    group = int(rng.choice([1, 2], p=[0.75, 0.25]))
    if seed % 16 == 8:
        # Many heads: of one short segment, for the time that it takes.
        lengths = [[int(rng.choice(LENGTHS[:10]))] for _ in range(2)]
        kv_heads, group = 1, int(rng.choice([4, 8]))
    heads = kv_heads * group
    rest = rng.integers(0, 3, 2).tolist()
    head_dim, dtype = HEAD_DIMS[rng.integers(5)], DTYPES[rng.integers(2)]
    tensors, cu = make((*lengths, *rest, (heads, kv_heads)), dtype, head_dim, seed)
    if rng.integers(8) == 0:
        tensors[0] *= 30
    scale = [None, None, None, -0.1, 0.0][rng.integers(5)]
    return tensors, cu, scale, bool(rng.integers(2))


def results_of(tensors, cu, scale, causal, plan):
    """out, lse, dq, dk, dv by the registered ops."""
    ops = torch.ops.keye_ops
    *qkv, dout = tensors
    out, lse = ops.varlen_attention(*qkv, *cu, None, None, scale, causal, True, plan)
    args = (dout, *qkv, out, lse, *cu, None, None, scale, causal, plan)
    return out, lse, *ops.varlen_attention_backward(*args)


def check_random_problems(arch):
    """256 configurations under 8 schedules: no finding, the same bits, the rule."""
    if reason := unavailable():
        pytest.skip(reason)
    tally, launches = Tally(), 0
    with host_cuda(attention_arch=arch), torch.no_grad():
        for seed in range(NUM_CONFIGURATIONS):
            tensors, cu, scale, causal = configuration(seed + 1000 * arch)
            totals = (len(tensors[0]), len(tensors[1]))
            first, plan = None, None
            for i, (order, preempt_one_in, completion) in enumerate(SCHEDULES):
                schedule = executor().Schedule(
                    seed=seed,
                    order=getattr(executor().Order, order),
                    preempt_one_in=preempt_one_in,
                    completion=getattr(executor().Completion, completion),
                )
                executor().set_default_schedule(schedule)
                if plan is None or i == seed % len(SCHEDULES):
                    plan = torch.ops.keye_ops.varlen_attention_plan(*cu, *totals, causal)
                results = results_of(tensors, cu, scale, causal, plan)
                launches += 1
                if first is None:
                    first = results
                same = (torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in
                        zip(results, first, strict=True))  # fmt: skip
                assert all(same), f"seed {seed}, {order}, {completion}: other bits"
            reports = take_reports()
            assert [report.text() for report in reports if report.findings] == []
            wanted = reference(tensors, cu, scale, causal)
            extreme = tensors[0].abs().max() > 30 if tensors[0].numel() else False
            for actual, (name, triple) in zip(first, wanted.items(), strict=True):
                plain, exact, size = triple
                judge(name, actual, plain, exact, size, None if extreme else tally)
    tally.verify()
    assert launches == NUM_CONFIGURATIONS * len(SCHEDULES)


def reference(tensors, cu, scale, causal):
    """What :func:`judged` gives, without what autograd keeps."""
    with torch.enable_grad():
        wanted = judged("cpu", tensors, cu, scale, causal)
    return {k: (p.detach(), e.detach(), size) for k, (p, e, size) in wanted.items()}


def check_coverage(arch):
    """What matters is among the configurations."""
    found = [configuration(seed + 1000 * arch) for seed in range(NUM_CONFIGURATIONS)]
    assert {x[0][0].shape[2] for x in found} == set(HEAD_DIMS)
    assert {x[0][0].shape[1] // x[0][1].shape[1] for x in found} == {1, 2, 4, 8}
    assert any(torch.equal(x[1][0], offsets([])) for x in found)
    assert sum(x[3] and not torch.equal(*x[1]) for x in found) > 25  # causal with Nq != Nk
