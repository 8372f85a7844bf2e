"""Random problems for every op, and the judge of one: what test_fuzz.py runs by the thousand."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from tolerance import FP64_SLACK, MAX_FACTOR, MAX_ULPS, MEAN_FACTOR, assert_same_kind, ulp

import keye_ops
from keye_ops import PackedGrid

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SPECIALS = (torch.nan, torch.inf, -torch.inf)
GUARD = 67  # elements on each side of an input that nobody may read
IN_TENSOR_CORES = False  # whether CUDA kernels are judged

Tensors = dict[str, torch.Tensor]


@dataclass
class Problem:
    """Inputs, the op, and its meaning in plain PyTorch and in fp64.

    ``call``, ``plain`` and ``exact`` take the floating inputs by name and give outputs by name.
    ``scales`` tells how large the terms are that an output sums up; ``unseen`` the rows of the
    first output (and the columns of lse) that may not know what is planted in the input it names.
    """

    inputs: Tensors
    call: Callable[..., Tensors]
    plain: Callable[..., Tensors]
    exact: Callable[..., Tensors]
    scales: dict[str, float]
    buffers: list[torch.Tensor]
    gradients: bool = False
    extreme: bool = False  # errors are not of a kind that may be averaged
    special: tuple[str, int, float] | None = None
    unseen: torch.Tensor | None = None
    seen: Callable[..., torch.Tensor] | None = None  # who sees whom, of attention


class Tally:
    """Mean errors of every problem of one op, by dtype and output: the mean rule is about these."""

    def __init__(self):
        self.means = defaultdict(list)

    def add(self, name, dtype, error, plain_error, unit):
        """``unit`` makes problems count alike, whatever the size of their numbers."""
        pair = torch.stack([error.mean(), plain_error.mean()]) / unit
        self.means[name, dtype].append(pair)

    def verify(self):
        """Elements of a problem share their luck, so that problems are what noise is told from."""
        for (name, dtype), pairs in self.means.items():
            if len(pairs) < 20:
                continue
            ours, plain = torch.stack(pairs).unbind(1)
            excess = ours - MEAN_FACTOR * plain
            noise = 4 * excess.std() / len(pairs) ** 0.5
            ratio = f"{ours.sum() / plain.sum():.3f} of plain in {len(pairs)} problems"
            assert excess.mean() <= noise, f"mean error of {name} in {dtype} is {ratio}"


def judge(name, actual, plain, exact, scale, tally=None):
    """The largest error at most twice plain's largest, by the rule of ``assert_within_twice``.

    A problem this small can be lucky in all of plain's elements at once, so 2 units of rounding of
    the terms that are summed are allowed as well, in the precision that sums are held in.
    """
    dtype = actual.dtype
    assert (actual.shape, plain.shape) == (exact.shape, exact.shape), f"{name}: {actual.shape}"
    assert dtype == plain.dtype, f"{name} is {dtype}"
    assert actual.is_contiguous(), f"{name} is not contiguous"
    assert_same_kind(actual, exact.to(dtype))
    finite = actual.isfinite()
    judged = finite & plain.isfinite()
    exact = torch.where(finite, exact, 0.0)
    error = torch.where(finite, (actual.double() - exact).abs(), 0.0)
    plain_error = torch.where(judged, (plain.double() - exact).abs(), 0.0)
    if not error.numel():
        return
    double = dtype == torch.float64
    rounding = FP64_SLACK if double else torch.finfo(torch.float32).eps
    largest = plain_error.max().item()
    bound = MAX_FACTOR * largest + MAX_ULPS * (ulp(exact, dtype) + rounding * scale)
    if (error > bound).any():
        flat = (error - bound).argmax().item()
        place = [x.item() for x in torch.unravel_index(torch.tensor(flat), error.shape)]
        raise AssertionError(
            f"{name}: error {error.flatten()[flat]:.3e} at {place}, where "
            f"{exact.flatten()[flat]:.6e} is right and plain is off by at most {largest:.3e}; "
            f"allowed is {bound.flatten()[flat]:.3e}"
        )
    if tally is not None and not double and judged.any():
        unit = largest + exact.abs().max().item() * torch.finfo(dtype).eps / 2 + rounding * scale
        if unit > 0 and judged.any():
            tally.add(name, dtype, error[judged], plain_error[judged], unit)


def check(problem, tally=None, call=None):
    """Run the op, or what stands for it, and judge everything there is to judge."""
    call = call or problem.call
    buffers = [x.clone() for x in problem.buffers]
    with torch.no_grad():
        actual = call(problem.inputs)
        exact = problem.exact(widen(problem.inputs))
        plain = problem.plain(problem.inputs)
        pooled = None if problem.extreme else tally
        for name, out in actual.items():
            judge(name, out, plain[name], exact[name], problem.scales[name], pooled)
    for before, after in zip(buffers, problem.buffers, strict=True):
        assert torch.equal(before.view(torch.uint8), after.view(torch.uint8)), "inputs were written"
    if problem.special:
        _check_special(problem, call, actual)
    elif problem.gradients and not problem.extreme:
        _check_gradients(problem, call, exact, pooled)


def widen(inputs):
    return {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}


def _check_special(problem, call, clean):
    name, row, value = problem.special
    problem.inputs[name][row] = value
    with torch.no_grad():
        planted = call(problem.inputs)
    for key, out in planted.items():
        got, want = (x[:, problem.unseen] if key == "lse" else x[problem.unseen]
                     for x in (out, clean[key]))  # fmt: skip
        assert torch.equal(got, want), f"{value} in row {row} of {name} reached others' {key}"


def _check_gradients(problem, call, exact, tally):
    outputs = [k for k in exact if k != "lse"]
    generator = torch.Generator().manual_seed(5)
    names = [k for k, x in problem.inputs.items() if x.is_floating_point()]
    dtype = problem.inputs[names[-1]].dtype
    douts = [torch.randn(exact[k].shape, generator=generator).to(dtype) for k in outputs]

    def gradients(function, inputs):
        leaves = {k: x.detach().requires_grad_(k in names) for k, x in inputs.items()}
        results = function(leaves)
        outs = [results[k] for k in outputs]
        wanted = [leaves[k] for k in names]
        grads = torch.autograd.grad(outs, wanted, [d.to(outs[0].dtype) for d in douts])
        return [g.contiguous() for g in grads]

    buffers = [x.clone() for x in problem.buffers]
    ours, plain = (gradients(f, problem.inputs) for f in (call, problem.plain))
    truth = gradients(problem.exact, widen(problem.inputs))
    for name, *triple in zip(names, ours, plain, truth, strict=True):
        judge(f"d{name}", *triple, problem.scales[f"d{name}"], tally)
    for before, after in zip(buffers, problem.buffers, strict=True):
        assert torch.equal(before.view(torch.uint8), after.view(torch.uint8)), "inputs were written"


# ---- tensors that lie inside of larger ones ----


def embed(x, buffers, layout="contiguous", product=False):
    """The values of ``x`` as a view of a buffer; everything else in it is NaN, or huge.

    A factor of torch's own matrix ``product`` lies among finite numbers where it is bf16: oneDNN
    multiplies what lies behind rows of odd length by zero.
    """
    order, pads, front = list(range(x.dim())), [0] * x.dim(), GUARD
    if layout == "offset":
        front += 3
    elif layout == "rows":
        pads[-1] = 5
    elif layout == "heads":
        pads[-2] = 2
    elif layout == "turned":
        order[:2] = [1, 0]
        pads[0] = 1
    elif layout == "columns":
        order[-2:] = [x.dim() - 1, x.dim() - 2]
    padded = [x.shape[d] + pads[d] for d in order]
    integer = not x.is_floating_point() and x.dtype != torch.bool
    fill = torch.iinfo(x.dtype).max if integer else torch.nan
    fill = 1e4 if product and x.dtype == torch.bfloat16 else fill
    size = math.prod(padded)
    buffer = torch.full((front + size + GUARD,), fill, dtype=x.dtype)
    buffers.append(buffer)
    view = buffer[front : front + size].view(padded)
    view = view.permute([order.index(d) for d in range(x.dim())])
    view = view[tuple(slice(n) for n in x.shape)]
    return view.copy_(x)


def randoms(choices):
    generator = torch.Generator().manual_seed(choices["seed"])

    def randn(*shape, dtype=choices["dtype"]):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return generator, randn


def plant(choices, name, rows):
    """Where a special value goes, if one is asked for and there is a row."""
    if choices["special"] is None or rows == 0:
        return None
    return name, choices["seed"] % rows, choices["special"]


def others(total, row):
    return torch.arange(total) != row


def common(**choices):
    """What every op draws, and what this one draws."""
    return st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**31 - 1),
            "dtype": st.sampled_from(DTYPES),
            "special": st.sampled_from((None,) * 6 + SPECIALS),
            "gradients": st.integers(0, 3).map(lambda x: x == 1),
            **choices,
        }
    )


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0


# ---- varlen_attention ----

_lengths = st.one_of(st.integers(0, 3), st.integers(0, 40), st.sampled_from((65, 130)))
ATTENTION = common(
    lengths=st.lists(st.tuples(_lengths, _lengths), max_size=4),
    cross=st.booleans(),
    rest=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    heads=st.sampled_from(((1, 1), (2, 1), (2, 2), (4, 2), (6, 1), (3, 3))),
    head_dim=st.one_of(
        st.integers(1, 32).map(lambda x: 8 * x),
        st.sampled_from((64, 72, 80, 128)),
        st.sampled_from((1, 2, 7, 9, 33, 71, 129)),
    ),
    layout=st.sampled_from(("packed", "contiguous", "offset", "rows", "heads", "turned")),
    causal=st.booleans(),
    scale=st.sampled_from((None, None, None, 0.0, 0.3, -1.0)),
    logits=st.sampled_from((None,) * 8 + (10.0, 1e3, 1e5)),
    longest=st.booleans(),
)


def attention_problem(choices):
    _, randn = randoms(choices)
    pairs = [(q, k if choices["cross"] else q) for q, k in choices["lengths"]]
    cu = [torch.tensor([0, *x]).cumsum(0).int() for x in zip(*pairs, strict=True)] or [
        torch.zeros(1, dtype=torch.int32)
    ] * 2
    (heads, kv_heads), head_dim = choices["heads"], choices["head_dim"]
    nq, nk = (c[-1].item() + r for c, r in zip(cu, choices["rest"], strict=True))
    q, k, v = randn(nq, heads, head_dim), *(randn(nk, kv_heads, head_dim) for _ in "kv")
    scale = head_dim**-0.5 if choices["scale"] is None else choices["scale"]
    extreme = choices["logits"] is not None and q.numel() > 0 < k.numel() and scale != 0
    wide = [x.double().repeat_interleave(heads // x.shape[1], 1) for x in (q, k)]
    scores = torch.einsum("qhd,khd->hqk", *wide) * scale
    score = largest(scores)
    if extreme:
        score = choices["logits"]
        factor = (choices["logits"] / scores.abs().max()).sqrt().clamp(max=1e3)
        q, k = ((x.double() * factor).to(x.dtype) for x in (q, k))

    buffers, inputs, layout = [], {}, choices["layout"]
    if layout == "packed" and nq == nk:
        packed = embed(torch.cat([q, k, v], 1), buffers)
        parts = packed.split([heads, kv_heads, kv_heads], 1)
    elif layout == "packed":
        parts = embed(q, buffers), *embed(torch.cat([k, v], 1), buffers).split(kv_heads, 1)
    else:
        parts = [embed(x, buffers, layout) for x in (q, k, v)]
    inputs = dict(zip("qkv", parts, strict=True))
    cu = [embed(c, buffers) for c in cu]
    longest = [max((b - a for a, b in pairwise(c.tolist())), default=0) for c in cu]
    seen = visible(*cu, nq, nk, choices["causal"])

    def call(inputs, scale=choices["scale"], causal=choices["causal"]):
        limits = longest if choices["longest"] else (None, None)
        out, lse = keye_ops.varlen_attention(
            *inputs.values(), *cu, max_seqlen_q=limits[0], max_seqlen_k=limits[1],
            softmax_scale=scale, causal=causal, return_lse=True,
        )  # fmt: skip
        return {"out": out, "lse": lse}

    def exact(inputs, seen=seen):
        return dense_attention(**inputs, seen=seen, scale=scale)

    def plain(inputs):
        wide = {x: t.to(torch.promote_types(t.dtype, torch.float32)) for x, t in inputs.items()}
        lse = dense_attention(**wide, seen=seen, scale=scale)["lse"]
        return {"out": plain_attention(**inputs, cu=cu, scale=scale, seen=seen), "lse": lse}

    out_scale = largest(v)
    reach = largest(v.double().norm(dim=-1))
    queries = max(nq, 1) * heads // kv_heads
    dscore = 4 * (1 + score) * reach * head_dim**0.5 * abs(scale)
    problem = Problem(
        inputs, call, plain, exact,
        {"out": out_scale, "lse": 1 + score, "dv": 4 * (1 + score) * queries**0.5,
         "dq": dscore * largest(k), "dk": dscore * largest(q) * queries**0.5},
        buffers, choices["gradients"], extreme,
        seen=lambda shift: visible(*cu, nq, nk, choices["causal"], shift),
    )  # fmt: skip
    which = "qkv"[choices["seed"] % 3]
    problem.special = plant(choices, which, nq if which == "q" else nk)
    if problem.special:
        row = problem.special[1]
        # NOTE: zero times an infinity of v is no number: in tensor cores, causal rows that are
        # multiplied together with those that see it are not spared.
        sees = visible(*cu, nq, nk, False) if which == "v" and IN_TENSOR_CORES else seen
        problem.unseen = others(nq, row) | ~seen.any(1) if which == "q" else ~sees[:, row]
    return problem


# What attention's kernels for CUDA take, where GUARD is a multiple of 16 bytes.
KERNEL_ATTENTION = {
    "dtype": (torch.bfloat16, torch.float16),
    "head_dim": (64, 72, 80, 96, 128),
    "layout": ("packed", "contiguous", "heads", "turned"),
}


def kernel_choices(choices):
    """Choices that kernels for CUDA take, as close to the given ones as can be."""
    kept = {
        name: choices[name] if choices[name] in good else good[choices["seed"] % len(good)]
        for name, good in KERNEL_ATTENTION.items()
    }
    return {**choices, **kept}


def visible(cu_q, cu_k, nq, nk, causal, shift=0):
    """Who sees whom: bool [Nq, Nk]."""
    segments = []
    for cu, total in ((cu_q, nq), (cu_k, nk)):
        row = torch.arange(total)
        segments.append(torch.searchsorted(cu[1:].contiguous(), row.int(), right=True))
    count = len(cu_q) - 1
    same = (segments[0][:, None] == segments[1]) & (segments[0] < count)[:, None]
    if not causal or count == 0:
        return same
    # Distance from the end of the segment: the last query sees the last key.
    ends = [
        c.long()[1:][s.clamp(max=count - 1)] for c, s in zip((cu_q, cu_k), segments, strict=True)
    ]
    left_q, left_k = (e - torch.arange(n) for e, n in zip(ends, (nq, nk), strict=True))
    return same & (left_k[None] + shift >= left_q[:, None])


def dense_attention(q, k, v, seen, scale):
    """One product of all rows with all keys under a mask."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1) if k.shape[0] else scores.new_full(scores.shape[:2], -torch.inf)
    weights = (scores - lse[:, :, None].nan_to_num(neginf=0.0).detach()).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
    return {"out": torch.einsum("hqk,khd->qhd", weights, v).contiguous(), "lse": lse}


def plain_attention(q, k, v, cu, scale, seen):
    """scaled_dot_product_attention of every segment, of the rows that see a key."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    parts = []
    zero = q[:0].sum() + k[:0].sum() + v[:0].sum()
    end = 0
    for (a, b), (c, d) in zip(*(pairwise(x.tolist()) for x in cu), strict=True):
        mask = seen[a:b, c:d]
        blind = int((~mask.any(1)).sum()) if d > c else b - a
        parts.append(torch.zeros_like(q[a : a + blind]) + zero)
        if blind < b - a:
            rows = (x.transpose(0, 1)[None] for x in (q[a + blind : b], k[c:d], v[c:d]))
            mask = None if mask.all() else mask[blind:]
            out = F.scaled_dot_product_attention(*rows, attn_mask=mask, scale=scale)
            parts.append(out[0].transpose(0, 1))
        end = b
    return torch.cat([*parts, torch.zeros_like(q[end:]) + zero])


# ---- rope ----

ROPE = common(
    total=st.integers(0, 20),
    heads=st.tuples(st.integers(1, 5), st.integers(0, 3)),
    head_dim=st.one_of(
        st.integers(1, 32).map(lambda x: 8 * x), st.integers(1, 128).map((2).__mul__)
    ),
    axes=st.integers(1, 4),
    interleaved=st.booleans(),
    inverse=st.booleans(),
    norm=st.booleans(),
    eps=st.sampled_from((1e-6, 1e-5, 0.1)),
    far=st.sampled_from((1, 50, 5000, 2**24)),
    wide=st.booleans(),
    layout=st.sampled_from(("packed", "offset", "rows", "heads", "turned", "columns")),
)


def rope_problem(choices):
    generator, randn = randoms(choices)
    total, (heads, kv_heads), head_dim = choices["total"], choices["heads"], choices["head_dim"]
    q, k = randn(total, heads, head_dim), randn(total, kv_heads, head_dim)
    buffers, layout = [], choices["layout"]
    if layout == "packed":
        parts = embed(torch.cat([q, k, k], 1), buffers).split([heads, kv_heads, kv_heads], 1)[:2]
    else:
        parts = [embed(x, buffers, layout) for x in (q, k)]
    inputs = dict(zip("qk", parts, strict=True))
    if choices["norm"]:
        inputs["q_weight"] = embed(1 + randn(head_dim) / 4, buffers)
        inputs["k_weight"] = embed(1 + randn(head_dim) / 4, buffers)
    pairs, axes = head_dim // 2, choices["axes"]
    positions = torch.randint(0, choices["far"], (axes, total), generator=generator)
    positions = positions if choices["wide"] else positions.int()
    positions = embed(positions, buffers, "columns" if choices["seed"] % 2 else "rows")
    frequencies = embed(10000.0 ** -torch.linspace(0, 0.95, pairs), buffers)
    axis = torch.randint(0, axes, (pairs,), generator=generator, dtype=torch.int32)
    axis = embed(axis, buffers)
    eps, inverse = choices["eps"], choices["inverse"] and not choices["norm"]

    def call(inputs, eps=eps):
        weights = (inputs.get("q_weight"), inputs.get("k_weight"))
        out = keye_ops.rope(
            inputs["q"], inputs["k"], positions, frequencies, axis,
            interleaved=choices["interleaved"], inverse=inverse,
            q_norm_weight=weights[0], k_norm_weight=weights[1], norm_eps=eps,
        )  # fmt: skip
        return dict(zip(("out_q", "out_k"), out, strict=True))

    def meaning(inputs, compute=torch.float64):
        angle = positions.to(compute)[axis.long()].T * frequencies.to(compute)
        turn = torch.polar(torch.ones_like(angle), -angle if inverse else angle)[:, None]
        outs = {}
        for name in "qk":
            x = inputs[name].to(compute)
            if choices["norm"]:
                x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
                x = x * inputs[f"{name}_weight"].to(compute)
            split = (-1, 2) if choices["interleaved"] else (2, -1)
            first, second = x.unflatten(-1, split).unbind(-1 if choices["interleaved"] else -2)
            y = torch.complex(first, second) * turn
            dim = -1 if choices["interleaved"] else -2
            outs[f"out_{name}"] = torch.stack([y.real, y.imag], dim).flatten(-2)
        return outs

    def plain(inputs):
        dtype = inputs["q"].dtype
        compute = torch.promote_types(dtype, torch.float32)
        return {k: x.to(dtype) for k, x in meaning(inputs, compute).items()}

    scales = {}
    for name, x in (("q", q), ("k", k)):
        rms = (x.double().square().mean(-1) + eps).rsqrt()
        rstd = largest(rms) if choices["norm"] else 1.0
        weight = 2.0 if choices["norm"] else 1.0
        scales[f"out_{name}"] = 2 * largest(x) * rstd * weight
        scales[f"d{name}"] = 16 * rstd * weight
        scales[f"d{name}_weight"] = 8 * largest(x) * rstd * (1 + x[..., 0].numel()) ** 0.5
    problem = Problem(inputs, call, plain, meaning, scales, buffers, choices["gradients"])
    problem.special = plant(choices, "q", total)
    if problem.special:
        problem.unseen = others(total, problem.special[1])
    return problem


# ---- norms ----

_channels = st.one_of(st.integers(1, 40), st.sampled_from((64, 72, 129, 257, 1152)))
LAYER_NORM = common(
    rows=st.integers(0, 20),
    channels=_channels,
    residual=st.booleans(),
    eps=st.sampled_from((1e-6, 1e-5, 0.1)),
    offset=st.sampled_from((0.0, 0.0, 3.0, 100.0)),
    layout=st.sampled_from(("contiguous", "offset", "rows", "columns")),
)


def norm_scales(rows, weight, bias, eps, total):
    """Sizes of the output's terms and of the gradients' of a LayerNorm over the last dimension."""
    if rows.numel() == 0:
        return dict.fromkeys(("out", "dx", "dweight", "dbias"), 1.0)
    rstd = (rows.var(-1, correction=0) + eps).rsqrt()
    spread = (rows.abs().amax(-1) * rstd).max().item()  # a mean is subtracted: terms before that
    out = spread * largest(weight) + largest(bias)
    dx = 8 * largest(weight) * largest(rstd) * (1 + spread)
    return {"out": out, "dx": dx, "dweight": 4 * spread * total**0.5, "dbias": 4 * total**0.5}


def layer_norm_problem(choices):
    _, randn = randoms(choices)
    rows, channels, eps = choices["rows"], choices["channels"], choices["eps"]
    buffers, layout = [], choices["layout"]
    inputs = {"x": embed(randn(rows, channels) + choices["offset"], buffers, layout)}
    if choices["residual"]:
        inputs["residual"] = embed(randn(rows, channels), buffers, layout)
    inputs["weight"] = embed(randn(channels), buffers)
    inputs["bias"] = embed(randn(channels), buffers)

    def call(inputs, eps=eps):
        if choices["residual"]:
            out = keye_ops.add_layer_norm(*inputs.values(), eps=eps)
            return dict(zip(("sum", "out"), out, strict=True))
        return {"out": keye_ops.layer_norm(*inputs.values(), eps=eps)}

    def meaning(inputs, exact=True):
        x, *residual, weight, bias = inputs.values()
        outs = {}
        if residual:
            x = outs["sum"] = x + residual[0]
        if exact:  # the stream keeps the rounding of its dtype
            x = x + (x.to(choices["dtype"]).double() - x).detach()
            centred = x - x.mean(-1, keepdim=True)
            normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
            outs["out"] = normed * weight + bias
        else:
            outs["out"] = F.layer_norm(x, weight.shape, weight, bias, eps)
        return {k: x.contiguous() for k, x in outs.items()}

    stream = sum(inputs[k].double() for k in ("x", "residual") if k in inputs)
    scales = norm_scales(stream, inputs["weight"], inputs["bias"], eps, 1 + rows)
    scales |= {"sum": 0.0, "dresidual": scales["dx"]}
    problem = Problem(
        inputs, call, lambda x: meaning(x, False), meaning, scales, buffers, choices["gradients"]
    )
    problem.special = plant(choices, "x", rows)
    if problem.special:
        problem.unseen = others(rows, problem.special[1])
    return problem


RMS_NORM = common(
    rows=st.integers(0, 20),
    channels=_channels,
    residual=st.booleans(),
    eps=st.sampled_from((1e-6, 1e-5, 0.1)),
    scale=st.sampled_from((1.0, 1.0, 1e-3, 100.0)),
    layout=st.sampled_from(("contiguous", "offset", "rows", "columns")),
)


def rms_norm_problem(choices):
    _, randn = randoms(choices)
    rows, channels, eps = choices["rows"], choices["channels"], choices["eps"]
    buffers, layout = [], choices["layout"]
    inputs = {"x": embed(randn(rows, channels) * choices["scale"], buffers, layout)}
    if choices["residual"]:
        inputs["residual"] = embed(randn(rows, channels), buffers, layout)
    inputs["weight"] = embed(randn(channels), buffers)

    def call(inputs, eps=eps):
        if choices["residual"]:
            out = keye_ops.add_rms_norm(*inputs.values(), eps=eps)
            return dict(zip(("sum", "out"), out, strict=True))
        return {"out": keye_ops.rms_norm(*inputs.values(), eps=eps)}

    def meaning(inputs, exact=True):
        x, *residual, weight = inputs.values()
        outs = {}
        if residual:
            x = outs["sum"] = x + residual[0]
        if exact:  # the stream keeps the rounding of its dtype
            x = x + (x.to(choices["dtype"]).double() - x).detach()
            outs["out"] = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
        else:
            outs["out"] = F.rms_norm(x, weight.shape, weight, eps)
        return {k: x.contiguous() for k, x in outs.items()}

    stream = sum(inputs[k].double() for k in ("x", "residual") if k in inputs)
    rstd = (stream.square().mean(-1) + eps).rsqrt()
    spread = largest(stream.abs().amax(-1) * rstd) if stream.numel() else 1.0
    dx = 8 * largest(inputs["weight"]) * largest(rstd) * (1 + spread)
    scales = {"sum": 0.0, "out": spread * largest(inputs["weight"]), "dx": dx, "dresidual": dx}
    scales["dweight"] = 4 * spread * (1 + rows) ** 0.5
    problem = Problem(
        inputs, call, lambda x: meaning(x, False), meaning, scales, buffers, choices["gradients"]
    )
    problem.special = plant(choices, "x", rows)
    if problem.special:
        problem.unseen = others(rows, problem.special[1])
    return problem


MERGE = common(
    merge=st.sampled_from((1, 2, 2, 2, 3)),
    images=st.lists(st.tuples(*(st.integers(1, 3),) * 3), max_size=4),
    block=st.booleans(),
    after=st.booleans(),
    channels=_channels,
    eps=st.sampled_from((1e-6, 1e-5, 0.1)),
    layout=st.sampled_from(("contiguous", "offset", "rows", "columns")),
)


def merge_problem(choices):
    _, randn = randoms(choices)
    merge, eps, channels = choices["merge"], choices["eps"], choices["channels"]
    sizes = [(t, h * merge, w * merge) for t, h, w in choices["images"]]
    order = "block" if choices["block"] else "raster"
    grid = PackedGrid.from_grid_thw(sizes, spatial_merge_size=merge, order=order)
    width = channels * (merge**2 if choices["after"] else 1)
    buffers = []
    inputs = {
        "x": embed(randn(grid.total, channels), buffers, choices["layout"]),
        "weight": embed(randn(width), buffers),
        "bias": embed(randn(width), buffers),
    }
    # Sort patches by image and frame, square, and place in the square.
    frames = [torch.arange(t).repeat_interleave(h * w) for t, h, w in sizes]
    frame = torch.cat([torch.zeros(0).long(), *frames])
    image = torch.repeat_interleave(
        torch.arange(len(sizes)), torch.tensor(grid.image_lengths).long()
    )
    row, column = grid.position_ids.long().unbind(1)
    keys = (image, frame, row // merge, column // merge, row % merge, column % merge)
    place = torch.zeros_like(row)
    for key in keys:
        place = place * 64 + key
    patches = place.argsort()

    def call(inputs, eps=eps):
        return {"out": keye_ops.merge_norm(*inputs.values(), grid, eps=eps)}

    def meaning(inputs, exact=True):
        x, weight, bias = inputs.values()
        tokens = x[patches]
        if choices["after"]:
            tokens = tokens.reshape(-1, merge**2 * channels)
        if exact:
            centred = tokens - tokens.mean(-1, keepdim=True)
            normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
            tokens = normed * weight + bias
        else:
            tokens = F.layer_norm(tokens, weight.shape, weight, bias, eps)
        return {"out": tokens.reshape(-1, merge**2 * channels)}

    tokens = inputs["x"][patches].double().reshape(-1, width)
    scales = norm_scales(tokens, inputs["weight"], inputs["bias"], eps, 1 + len(tokens))
    problem = Problem(
        inputs, call, lambda x: meaning(x, False), meaning, scales, buffers, choices["gradients"]
    )
    problem.special = plant(choices, "x", grid.total)
    if problem.special:
        token = (patches == problem.special[1]).nonzero().item() // merge**2
        problem.unseen = others(grid.total // merge**2, token)
    return problem


# ---- linear layers ----


def spared(dtype):
    """Whether torch's own product keeps rows apart: oneDNN's in bf16 multiplies others by zero."""
    return dtype != torch.bfloat16


LINEAR = common(
    rows=st.integers(0, 40),
    inner=st.integers(1, 150),
    outer=st.integers(1, 80),
    size=st.sampled_from((0.1, 1.0, 1.0, 4.0)),
    layout=st.sampled_from(("contiguous", "offset", "rows", "columns")),
)


def linear_problem(choices):
    _, randn = randoms(choices)
    rows, inner, outer = choices["rows"], choices["inner"], choices["outer"]
    buffers, layout = [], choices["layout"]
    dtype = choices["dtype"]
    inputs = {
        "x": embed(randn(rows, inner) * choices["size"], buffers, layout, product=True),
        "weight": embed(
            (randn(outer, inner, dtype=torch.float64) / inner**0.5).to(dtype),
            buffers,
            layout,
            product=True,
        ),
        "bias": embed(randn(outer), buffers),
    }

    def call(inputs):
        return {"out": keye_ops.linear_gelu(*inputs.values())}

    def exact(inputs):
        x, weight, bias = inputs.values()
        hidden = x @ weight.T + bias
        return {"out": hidden * 0.5 * torch.special.erfc(-hidden / math.sqrt(2))}

    def plain(inputs):
        x, weight, bias = inputs.values()
        return {"out": F.gelu(F.linear(x, weight, bias))}

    x, weight, bias = (t.double() for t in inputs.values())
    terms = largest(x.abs() @ weight.abs().T) + largest(bias)
    scales = {
        "out": 2 * terms,
        "dx": 8 * largest(weight) * outer**0.5 * (1 + terms),
        "dweight": 8 * largest(x) * (1 + rows) ** 0.5 * (1 + terms),
        "dbias": 8 * (1 + rows) ** 0.5 * (1 + terms),
    }
    problem = Problem(inputs, call, plain, exact, scales, buffers, choices["gradients"])
    problem.special = plant(choices, "x", rows) if spared(dtype) else None
    if problem.special:
        problem.unseen = others(rows, problem.special[1])
    return problem


PATCH = common(
    images=st.lists(st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6)), max_size=3),
    block=st.booleans(),
    patch=st.integers(1, 5),
    channels=st.integers(1, 60),
    side=st.integers(1, 7),
    align_corners=st.booleans(),
    pixels=st.sampled_from(("same", "same", "uint8", "fp32")),
    bias=st.booleans(),
    flat=st.booleans(),
    layout=st.sampled_from(("contiguous", "offset", "rows")),
)


def patch_problem(choices):
    generator, randn = randoms(choices)
    dtype, patch, channels = choices["dtype"], choices["patch"], choices["channels"]
    sizes = [(t, h * 2, w * 2) if choices["block"] else (t, h, w) for t, h, w in choices["images"]]
    grid = PackedGrid.from_grid_thw(sizes, order="block" if choices["block"] else "raster")
    integers = choices["pixels"] == "uint8" and dtype != torch.float64
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    shape = (grid.total, 3 * patch**2) if choices["flat"] else (grid.total, 3, patch, patch)
    if integers:
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    else:
        pixels = randn(*shape, dtype=torch.float32 if choices["pixels"] == "fp32" else dtype)
    buffers, layout = [], choices["layout"]
    weight = randn(channels, 3, patch, patch, dtype=torch.float64) / (3 * patch**2) ** 0.5
    inputs = {
        "pixels": embed(pixels, buffers, "contiguous" if integers else layout, product=True),
        "weight": embed(weight.to(dtype), buffers, product=True),
        "table": embed(randn(choices["side"] ** 2, channels), buffers, layout),
    }
    if choices["bias"]:
        inputs["bias"] = embed(randn(channels), buffers)
    options = {"align_corners": choices["align_corners"]}

    def call(inputs):
        out = keye_ops.patch_embed(
            inputs["pixels"], inputs["weight"], inputs.get("bias"), inputs["table"], grid,
            **options, image_mean=mean, image_std=std,
        )  # fmt: skip
        return {"out": out}

    def meaning(inputs, exact=True):
        pixels, weight, table = inputs["pixels"], inputs["weight"], inputs["table"]
        if integers:
            compute = torch.float64 if exact else torch.float32
            pixels = pixels.reshape(grid.total, 3, patch**2).to(compute) / 255
            shift, factor = (pixels.new_tensor(x)[:, None] for x in (mean, std))
            pixels = (pixels - shift) / factor
        rows = pixels.reshape(grid.total, 3 * patch**2)
        rows = rows + (rows.to(dtype).to(rows.dtype) - rows).detach() if exact else rows.to(dtype)
        tokens = F.linear(rows, weight.flatten(1), inputs.get("bias"))
        side = choices["side"]
        square = table.T.reshape(1, channels, side, side)
        parts, start = [table[:0]], 0
        for t, h, w in sizes:
            resized = F.interpolate(square, (h, w), mode="bilinear", **options)[0].flatten(1)
            row, column = grid.position_ids[start : start + t * h * w].long().unbind(1)
            parts.append(resized[:, row * w + column].T)
            start += t * h * w
        return {"out": tokens + torch.cat(parts)}

    wide = inputs["pixels"].double() / (64 if integers else 1)
    flat = inputs["weight"].double().flatten(1)
    terms = largest(wide.reshape(grid.total, flat.shape[1]).abs() @ flat.abs().T)
    scales = {
        "out": terms + largest(inputs["table"]) + largest(inputs.get("bias", torch.zeros(1))),
        "dpixels": 8 * largest(flat) * channels**0.5,
        "dweight": 8 * largest(wide) * (1 + grid.total) ** 0.5,
        "dbias": 8 * (1 + grid.total) ** 0.5,
        "dtable": 8 * (1 + grid.total) ** 0.5,
    }
    problem = Problem(
        inputs, call, lambda x: meaning(x, False), meaning, scales, buffers, choices["gradients"]
    )
    if not integers and spared(dtype):
        problem.special = plant(choices, "pixels", grid.total)
    if problem.special:
        problem.unseen = others(grid.total, problem.special[1])
    return problem


OPS = {
    "varlen_attention": (ATTENTION, attention_problem),
    "rope": (ROPE, rope_problem),
    "add_layer_norm": (LAYER_NORM, layer_norm_problem),
    "add_rms_norm": (RMS_NORM, rms_norm_problem),
    "merge_norm": (MERGE, merge_problem),
    "linear_gelu": (LINEAR, linear_problem),
    "patch_embed": (PATCH, patch_problem),
}
