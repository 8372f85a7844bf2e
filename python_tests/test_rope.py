"""rope: values, gradients and errors of every implementation against the reference in fp64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from host_cuda import executor, host_cuda, take_reports, unavailable
from instruction_sets import needs_native_kernel, on_each_lesser_instruction_set, rerun
from tolerance import assert_within_twice

import keye_ops
from keye_ops.rope import (
    rope_backward_reference,
    rope_inplace_reference,
    rope_reference,
    rope_table_2d,
    rope_table_3d,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
OPS = torch.ops.keye_ops

# tokens, heads of q, heads of k, head_dim, axes
SHAPES = {
    "vision": (37, 16, 16, 72, 2),
    "text": (19, 32, 8, 128, 3),
    "one token": (1, 16, 16, 72, 2),
    "no token": (0, 16, 16, 72, 2),
    "no key heads": (5, 4, 0, 64, 2),
    "one axis": (9, 3, 1, 80, 1),
    "four axes": (9, 1, 3, 96, 4),
    "smallest head": (200, 8, 8, 2, 1),
    "odd pairs": (11, 3, 2, 46, 3),
    "largest head": (6, 2, 1, 256, 2),
}


class Case:
    """Random arguments of one call."""

    def __init__(self, shape, dtype, device="cpu", norm=False, interleaved=False, inverse=False):
        total, heads, kv_heads, head_dim, axes = SHAPES[shape] if isinstance(shape, str) else shape
        generator = torch.Generator().manual_seed(total + head_dim)

        def randn(*size):
            return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

        self.q, self.k = randn(total, heads, head_dim), randn(total, kv_heads, head_dim)
        self.position_ids = torch.randint(0, 5000, (axes, total), generator=generator)
        pairs = head_dim // 2
        self.inv_freq = 10000.0 ** -torch.linspace(0, 0.95, pairs)
        self.axis = torch.randint(0, axes, (pairs,), generator=generator, dtype=torch.int32)
        self.weights = (1 + randn(head_dim) / 4, 1 + randn(head_dim) / 4) if norm else (None, None)
        self.options = (interleaved, inverse)
        self.dq, self.dk = randn(*self.q.shape), randn(*self.k.shape)
        for name in ("q", "k", "dq", "dk", "position_ids", "inv_freq", "axis"):
            setattr(self, name, getattr(self, name).to(device))
        self.weights = tuple(w if w is None else w.to(device) for w in self.weights)

    @property
    def table(self):
        return self.position_ids, self.inv_freq, self.axis

    def arguments(self, dtype=None):
        """Of torch.ops.keye_ops.rope, floating tensors in another dtype if asked for."""
        q, k, *weights = (
            x if x is None or dtype is None else x.to(dtype)
            for x in (self.q, self.k, *self.weights)
        )
        return q, k, *self.table, *self.options, *weights, 1e-6


def outputs_and_gradients(op, case, dtype=None):
    """Outputs, then the gradients of q, k and the weights."""
    q, k, position_ids, inv_freq, axis, interleaved, inverse, *weights, eps = case.arguments(dtype)
    leaves = [q, k, *(w for w in weights if w is not None)]
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    weights = leaves[2:] if len(leaves) > 2 else [None, None]
    out = op(*leaves[:2], position_ids, inv_freq, axis, interleaved, inverse, *weights, eps)
    grads = torch.autograd.grad(out, leaves, [x.to(q.dtype) for x in (case.dq, case.dk)])
    return [*out, *grads]


def public(q, k, position_ids, inv_freq, axis, interleaved, inverse, q_weight, k_weight, eps):
    return keye_ops.rope(
        q,
        k,
        position_ids,
        inv_freq,
        axis,
        interleaved=interleaved,
        inverse=inverse,
        q_norm_weight=q_weight,
        k_norm_weight=k_weight,
        norm_eps=eps,
    )


# ---- values and gradients ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "adjacent"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, norm, interleaved, dtype, device):
    case = Case(shape, dtype, device, norm, interleaved)
    results = outputs_and_gradients(public, case)
    plain = outputs_and_gradients(rope_reference, case)
    exact = outputs_and_gradients(rope_reference, case, torch.float64)
    assert len(results) == (6 if norm else 4)
    for result, one_plain, one_exact in zip(results, plain, exact, strict=True):
        assert result.is_contiguous()
        assert_within_twice(result, one_plain, one_exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inverse_undoes_the_rotation(dtype, device):
    case = Case("vision", dtype, device)
    out = public(*case.arguments())
    back = keye_ops.rope(*out, *case.table, inverse=True)
    tolerance = 4 * torch.finfo(dtype).eps * case.q.abs().max()
    assert (back[0] - case.q).abs().max() <= tolerance
    assert_within_twice(
        keye_ops.rope(case.q, case.k, *case.table, inverse=True)[0],
        rope_reference(case.q, case.k, *case.table, False, True)[0],
        rope_reference(case.q.double(), case.k.double(), *case.table, False, True)[0],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("largest", [100, 4046, 131071, 2**24 - 1])
def test_large_positions(largest, dtype, device):
    case = Case("vision", dtype, device)
    case.position_ids.random_(largest // 2, largest + 1)
    case.position_ids[0, 0] = largest
    results = OPS.rope(*case.arguments())
    plain = rope_reference(*case.arguments())
    exact = rope_reference(*case.arguments(torch.float64))
    for result, one_plain, one_exact in zip(results, plain, exact, strict=True):
        assert_within_twice(result, one_plain, one_exact)


def test_fp32_sines_are_those_of_torch():
    # A pair (1, 0) turns into (cos, sin).
    for largest, bound in ((2**20, 6e-8), (2**24, 1.2e-7)):
        positions = torch.arange(0, largest, largest // 20000)
        q = torch.tensor([1.0, 0.0]).expand(len(positions), 1, 2)
        for frequency in (1.0, 0.7071, 0.003):
            table = (torch.tensor([frequency]), torch.zeros(1, dtype=torch.int32))
            out, _ = OPS.rope(q, q, positions[None], *table)
            angles = (positions.float() * table[0]).double()
            assert (out[:, 0, 0] - angles.cos()).abs().max() < bound
            assert (out[:, 0, 1] - angles.sin()).abs().max() < bound


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_position_layouts(index_dtype, transposed, device):
    case = Case("text", torch.float32, device)
    want = OPS.rope(*case.arguments())
    position_ids = case.position_ids.to(index_dtype)
    if transposed:
        position_ids = position_ids.T.contiguous().T
    got = OPS.rope(case.q, case.k, position_ids, case.inv_freq, case.axis)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("shape", ["vision", "text", "odd pairs", "one token", "no token"])
def test_in_place_on_a_packed_tensor(shape, norm, dtype, device):
    total, heads, _, head_dim, axes = SHAPES[shape]
    case = Case((total, heads, heads, head_dim, axes), dtype, device, norm)
    packed = torch.stack([case.q, case.k, torch.full_like(case.q, 7)], dim=1)
    want = public(*case.arguments())
    options = {"q_norm_weight": case.weights[0], "k_norm_weight": case.weights[1]}
    q, k, v = packed.unbind(1)
    got = keye_ops.rope_(q, k, *case.table, **options)
    assert got[0] is q
    assert got[1] is k
    assert torch.equal(q, want[0])
    assert torch.equal(k, want[1])
    assert (v == 7).all()


def test_strided_inputs_and_gradients(device):
    case = Case("text", torch.bfloat16, device, norm=True)
    wide_q = torch.randn(19, 64, 200, dtype=torch.bfloat16, device=device)[:, ::2, 40:168]
    case.q = wide_q
    results = outputs_and_gradients(OPS.rope, case)
    want = OPS.rope(wide_q.contiguous(), *case.arguments()[1:])
    assert torch.equal(results[0], want[0])
    # sum() sends an expanded gradient of stride zero.
    leaf = wide_q.detach().requires_grad_()
    keye_ops.rope(leaf, case.k, *case.table)[0].sum().backward()
    ones = torch.ones_like(wide_q)
    inverse = OPS.rope(ones, case.k, *case.table, False, True)[0]
    assert torch.equal(leaf.grad, inverse)
    # Heads that share a gradient go to the kernel as they are.
    rest = (case.dk, *case.arguments()[:5], *case.weights, False, 1e-6)
    shared = case.dq[:, :1].expand_as(case.q)
    got, want = OPS.rope_backward(shared, *rest), OPS.rope_backward(shared.contiguous(), *rest)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_offsets_past_two_billion_elements(device):
    # Two rows 2**31 elements apart; only they take memory.
    storage = torch.empty(2**31 + 72, dtype=torch.bfloat16, device=device)
    far = storage.as_strided((2, 1, 72), (2**31, 72, 1))
    case = Case((2, 1, 1, 72, 2), torch.bfloat16, device)
    far.copy_(case.q)
    want = OPS.rope(*case.arguments())[0]
    assert torch.equal(OPS.rope(far, case.k, *case.table)[0], want)
    keye_ops.rope_(far, case.k, *case.table)
    assert torch.equal(far, want)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_extreme_values(dtype, norm, device):
    case = Case("vision", dtype, device, norm)
    info = torch.finfo(dtype)
    values = [info.max / 4, info.tiny, info.tiny * info.eps, 0.0, -info.max / 4, info.eps]
    if norm:
        values[0] = values[4] = info.max**0.25  # squares stay finite in fp32
    values = torch.tensor(values, dtype=dtype, device=device)
    case.q[:6] = values[:, None, None] * case.q[:6].sign()
    results = public(*case.arguments())
    plain = rope_reference(*case.arguments())
    exact = rope_reference(*case.arguments(torch.float64))
    # Row by row: the largest would hide the others.
    for row in range(8):
        for result, one_plain, one_exact in zip(results, plain, exact, strict=True):
            assert_within_twice(result[row], one_plain[row], one_exact[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_bad_numbers_stay_in_their_row(norm, bad, dtype, device):
    case = Case("vision", dtype, device, norm)
    clean = public(*case.arguments())[0]
    case.q[3, 5, 20] = bad
    out = public(*case.arguments())[0]
    want = rope_reference(*case.arguments())[0]
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out.isinf(), want.isinf())
    assert not out[3, 5].isfinite().all()
    out[3, 5] = clean[3, 5]
    assert torch.equal(out, clean)


def test_bf16_keeps_every_nan(device):
    # All NaN bit patterns, quiet and signalling.
    bits = torch.arange(2**16, dtype=torch.int32, device=device).to(torch.int16)
    q = bits.view(torch.bfloat16)
    q = q[q.isnan()]
    q = torch.cat([q, q[: -len(q) % 64]]).view(-1, 1, 64)
    positions = torch.ones(1, len(q), dtype=torch.int64, device=device)
    table = torch.ones(32, device=device), torch.zeros(32, dtype=torch.int32, device=device)
    assert OPS.rope(q, q, positions, *table)[0].isnan().all()


# ---- determinism ----


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_same_bits_for_any_number_of_threads(norm):
    case = Case((1200, 8, 2, 128, 3), torch.bfloat16, norm=norm)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(OPS.rope, case))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_same_bits_for_any_order_of_cuda_threads(norm):
    case = Case((9, 8, 2, 128, 3), torch.bfloat16, norm=norm)
    schedules = [("in_order", 0, "early"), ("reversed", 1, "late"), ("random", 16, "random")]
    results = []
    for order, preempt_one_in, completion in schedules:
        order = getattr(executor().Order, order)
        completion = getattr(executor().Completion, completion)
        with host_cuda(order=order, preempt_one_in=preempt_one_in, completion=completion):
            results.append(outputs_and_gradients(OPS.rope, case))
            assert [len(report.findings) for report in take_reports()] == [0, 0]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_token_does_not_depend_on_its_neighbours(device):
    case = Case("text", torch.bfloat16, device, norm=True)
    together = OPS.rope(*case.arguments())
    for token in range(case.q.shape[0]):
        position_ids, inv_freq, axis = case.table
        alone = OPS.rope(
            case.q[token : token + 1],
            case.k[token : token + 1],
            position_ids[:, token : token + 1],
            inv_freq,
            axis,
            False,
            False,
            *case.weights,
        )
        assert torch.equal(alone[0][0], together[0][token])
        assert torch.equal(alone[1][0], together[1][token])


# ---- every instruction set ----


needs_native = needs_native_kernel("rope")


@on_each_lesser_instruction_set
def test_this_file_on_a_lesser_instruction_set(isa):
    chosen = "values or positions or sines or in_place or strided or numbers or nan or bits"
    rerun(__file__, isa, f"({chosen}) and not host_cuda")


@needs_native
def test_an_unknown_instruction_set_raises():
    code = "import torch, keye_ops; q = torch.ones(1, 1, 4); "
    code += "keye_ops.rope_2d(q, q, torch.zeros(1, 2).int())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KEYE_OPS_CPU_CAPABILITY": "avx9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert (
        "KEYE_OPS_CPU_CAPABILITY must be default, avx2, avx512, avx512_bf16 or amx_bf16"
        in result.stderr
    )
    assert "got avx9" in result.stderr


# ---- autograd, torch.library, compile, export ----


GRADCHECK_SHAPES = [
    (total, heads, kv_heads, head_dim, axes)
    for total in (0, 1, 3)
    for heads, kv_heads in ((1, 1), (2, 1), (1, 0))
    for head_dim in (2, 4, 6)
    for axes in (1, 3)
]


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_gradcheck(norm):
    for shape in GRADCHECK_SHAPES:
        case = Case(shape, torch.float64, norm=norm, interleaved=shape[0] == 1)
        q, k, *table_and_options, q_weight, k_weight, eps = case.arguments()
        leaves = [x.requires_grad_() for x in (q, k, q_weight, k_weight) if x is not None]

        def function(q, k, *weights, rest=table_and_options, eps=eps):
            return OPS.rope(q, k, *rest, *(weights or (None, None)), eps)

        assert torch.autograd.gradcheck(function, leaves)


def test_second_derivative_without_norm():
    case = Case((3, 1, 1, 4, 2), torch.float64)
    leaves = (case.q.requires_grad_(), case.k.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda q, k: OPS.rope(q, k, *case.table), leaves)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, norm):
    case = Case("text", dtype, norm=norm)
    q, k, *rest = case.arguments()
    torch.library.opcheck(OPS.rope.default, (q, k, *rest))
    leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
    torch.library.opcheck(OPS.rope.default, (*leaves, *rest))
    torch.library.opcheck(OPS.rope_.default, (q.clone(), k.clone(), *rest))
    if norm:
        arguments = (case.dq, case.dk, q, k, *case.table, *case.weights, False, 1e-6)
        torch.library.opcheck(OPS.rope_backward.default, arguments)


def test_backward_op_equals_the_reference(device):
    case = Case("text", torch.float32, device, norm=True)
    arguments = (case.dq, case.dk, case.q, case.k, *case.table, *case.weights, False, 1e-6)
    exact = [x.double() if x.is_floating_point() and x is not case.inv_freq else x
             for x in arguments[:-2]] + [False, 1e-6]  # fmt: skip
    plain = rope_backward_reference(*arguments)
    truth = rope_backward_reference(*exact)
    for result, one_plain, one_exact in zip(
        OPS.rope_backward(*arguments), plain, truth, strict=True
    ):
        assert_within_twice(result, one_plain, one_exact)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_is_one_graph_for_all_sizes(backend):
    section = {"mrope_section": (16, 24, 24)}

    def function(q, k, position_ids, weight):
        q, k = keye_ops.rope_3d(
            q.sin(), k, position_ids, **section, q_norm_weight=weight, k_norm_weight=weight
        )
        return q.cos(), k * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for total in (5, 8, 13):
        case = Case((total, 4, 2, 128, 3), torch.float32, norm=True)
        leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.weights[0])]
        got = compiled(*leaves[:2], case.position_ids, leaves[2])
        want = function(*leaves[:2], case.position_ids, leaves[2])
        for one_got, one_want in zip(got, want, strict=True):
            torch.testing.assert_close(one_got, one_want)
        got_grads = torch.autograd.grad([x.sum() for x in got], leaves)
        want_grads = torch.autograd.grad([x.sum() for x in want], leaves)
        for one_got, one_want in zip(got_grads, want_grads, strict=True):
            torch.testing.assert_close(one_got, one_want, rtol=1e-4, atol=1e-5)
    if torch._dynamo.utils.counters["stats"]:
        assert torch._dynamo.utils.counters["graph_break"] == {}


def test_compile_in_place():
    def function(qkv, position_ids):
        keye_ops.rope_2d_(qkv[:, 0], qkv[:, 1], position_ids)
        return qkv + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for total in (4, 9):
        qkv = torch.randn(total, 3, 2, 72)
        position_ids = torch.randint(0, 30, (total, 2))
        want = function(qkv.clone(), position_ids)
        assert torch.equal(compiled(qkv, position_ids), want)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, q, k, position_ids):
            return keye_ops.rope_2d(q, k, position_ids)

    case = Case("vision", torch.float32)
    arguments = (case.q, case.k, case.position_ids.T.contiguous())
    total = torch.export.Dim("total", min=2, max=4096)
    with keye_ops.backend("auto"):
        program = torch.export.export(Module(), arguments, dynamic_shapes=({0: total},) * 3)
    assert any("keye_ops.rope" in str(node.target) for node in program.graph.nodes)
    got = program.module()(*(x[:5] for x in arguments))
    torch.testing.assert_close(got, Module()(*(x[:5] for x in arguments)))


def test_inference_needs_no_gradient_but_training_does():
    case = Case("vision", torch.float32)
    q = case.q.requires_grad_()
    assert keye_ops.rope(q, case.k, *case.table)[0].requires_grad
    with torch.no_grad():
        assert not keye_ops.rope(q, case.k, *case.table)[0].requires_grad
    with pytest.raises(RuntimeError, match="rope_: in place works without gradients only"):
        keye_ops.rope_(q, case.k, *case.table)
    with torch.inference_mode():
        keye_ops.rope_2d(case.q, case.k, case.position_ids.T)
    # The table cached in inference mode must serve training too.
    keye_ops.rope_2d(q, case.k, case.position_ids.T)[0].sum().backward()


# ---- tables and public forms ----


def test_axial_table():
    table = rope_table_2d(72, 10000.0)
    assert table.axis.tolist() == [0] * 18 + [1] * 18
    want = torch.tensor([10000.0 ** (-2 * m / 36) for m in range(18)])
    torch.testing.assert_close(table.inv_freq[:18], want)
    assert torch.equal(table.inv_freq[:18], table.inv_freq[18:])


@pytest.mark.parametrize(
    ("section", "interleaved", "counts"),
    [
        ((16, 24, 24), False, (16, 24, 24)),
        ((24, 20, 20), True, (24, 20, 20)),
        ((0, 32, 32), False, (0, 32, 32)),
    ],
)
def test_section_tables(section, interleaved, counts):
    table = rope_table_3d(128, section, 1e6, interleaved)
    assert tuple(table.axis.bincount(minlength=3).tolist()) == counts
    if interleaved:
        assert table.axis[:7].tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert table.axis[-4:].tolist() == [0, 0, 0, 0]


def test_own_frequencies():
    case = Case("vision", torch.float32)
    position_ids = case.position_ids.T
    want = keye_ops.rope_2d(case.q, case.k, position_ids, theta=500.0)
    inv_freq = rope_table_2d(72, 500.0).inv_freq[:18]
    got = keye_ops.rope_2d(case.q, case.k, position_ids, inv_freq=inv_freq)
    assert torch.equal(got[0], want[0])


# ---- code nobody here wrote ----


def test_equals_paddleocr_vision_rotary():
    module = pytest.importorskip("transformers.models.paddleocr_vl.modeling_paddleocr_vl")
    case = Case("vision", torch.float32)
    position_ids = case.position_ids.T % 300
    inv_freq = rope_table_2d(72, 10000.0).inv_freq[:18]
    angles = (position_ids[:, :, None] * inv_freq).flatten(1)  # [N, 36]: rows, then columns
    embedding = torch.cat([angles, angles], -1)
    want = module.apply_rotary_pos_emb_vision(case.q, case.k, embedding.cos(), embedding.sin())
    got = keye_ops.rope_2d(case.q, case.k, position_ids)
    for one_got, one_want in zip(got, want, strict=True):
        torch.testing.assert_close(one_got, one_want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_equals_transformers_text_rotary(family):
    case = Case("text", torch.float32)
    interleaved = family == "qwen3_vl"
    section = [24, 20, 20] if interleaved else [16, 24, 24]
    parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    if interleaved:
        config = pytest.importorskip("transformers.models.qwen3_vl.configuration_qwen3_vl")
        module = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")
        parameters["mrope_interleaved"] = True
        rotary = module.Qwen3VLTextRotaryEmbedding(
            config.Qwen3VLTextConfig(head_dim=128, rope_parameters=parameters)
        )
    else:
        config = pytest.importorskip("transformers.models.qwen2_vl.configuration_qwen2_vl")
        module = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
        rotary = module.Qwen2VLRotaryEmbedding(
            config.Qwen2VLTextConfig(
                hidden_size=4096, num_attention_heads=32, rope_parameters=parameters
            )
        )
    position_ids = case.position_ids % 900
    cos, sin = rotary(case.q, position_ids[:, None])
    q, k = (x.transpose(0, 1)[None] for x in (case.q, case.k))
    want = module.apply_rotary_pos_emb(q, k, cos, sin)
    got = keye_ops.rope_3d(
        case.q, case.k, position_ids, mrope_section=section, mrope_interleaved=interleaved
    )
    for one_got, one_want in zip(got, want, strict=True):
        torch.testing.assert_close(one_got, one_want[0].transpose(0, 1), rtol=1e-5, atol=2e-6)


def test_norm_equals_transformers_rms_norm():
    module = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    case = Case("text", torch.float32, norm=True)
    norms = []
    for weight in case.weights:
        norm = module.Qwen3RMSNorm(128, eps=1e-6)
        norm.weight.data.copy_(weight)
        norms.append(norm)
    section = {"mrope_section": (16, 24, 24)}
    weights = {"q_norm_weight": case.weights[0], "k_norm_weight": case.weights[1]}
    with torch.no_grad():
        normed = [norm(x) for norm, x in zip(norms, (case.q, case.k), strict=True)]
    want = keye_ops.rope_3d(*normed, case.position_ids, **section)
    got = keye_ops.rope_3d(case.q, case.k, case.position_ids, **section, **weights)
    for one_got, one_want in zip(got, want, strict=True):
        torch.testing.assert_close(one_got, one_want, rtol=1e-5, atol=1e-5)


# ---- bad input: the same message from the native op and from the reference ----


BAD_INPUT = {
    "rank": (dict(q=torch.ones(3, 8)), r"rope: q must be \[N, H, D\], got \[3, 8\]"),
    "dtype": (
        dict(q=torch.ones(3, 2, 8).int()),
        "rope: q must be fp64, fp32, fp16 or bf16, got torch.int32",
    ),
    "odd head_dim": (
        dict(q=torch.ones(3, 2, 7)),
        "rope: head_dim must be even, from 2 to 256, got 7",
    ),
    "large head_dim": (
        dict(q=torch.ones(3, 2, 258)),
        "rope: head_dim must be even, from 2 to 256, got 258",
    ),
    "k tokens": (dict(k=torch.ones(4, 2, 8)), r"rope: k must be \[3, .*, 8\], got \[4, 2, 8\]"),
    "k head_dim": (dict(k=torch.ones(3, 2, 6)), r"rope: k must be \[3, .*, 8\], got \[3, 2, 6\]"),
    "k dtype": (
        dict(k=torch.ones(3, 2, 8).half()),
        "rope: k must have the dtype .* of q .*got torch.float16",
    ),
    "positions shape": (
        dict(position_ids=torch.ones(2, 4).int()),
        r"rope: position_ids must be \[axes, 3\], got \[2, 4\]",
    ),
    "positions dtype": (
        dict(position_ids=torch.ones(2, 3)),
        "rope: position_ids must be int32 or int64 .*got torch.float32",
    ),
    "many axes": (
        dict(position_ids=torch.ones(5, 3).int()),
        "rope: position_ids must have 1 to 4 axes, got 5",
    ),
    "no axis": (
        dict(position_ids=torch.ones(0, 3).int()),
        "rope: position_ids must have 1 to 4 axes, got 0",
    ),
    "negative": (
        dict(position_ids=torch.full((2, 3), -5)),
        r"rope: position_ids must be in \[0, 2\*\*24\), got -5",
    ),
    "too far": (
        dict(position_ids=torch.full((2, 3), 2**24)),
        r"rope: position_ids must be in \[0, 2\*\*24\), got 16777216",
    ),
    "inv_freq shape": (dict(inv_freq=torch.ones(5)), r"rope: inv_freq must be .*\[4\], got \[5\]"),
    "inv_freq dtype": (
        dict(inv_freq=torch.ones(4).double()),
        "rope: inv_freq must be fp32 on .*float64",
    ),
    "inv_freq value": (
        dict(inv_freq=torch.full((4,), 1.5)),
        r"rope: inv_freq must be in \[0, 1\], got .*1.5",
    ),
    "inv_freq nan": (
        dict(inv_freq=torch.full((4,), float("nan"))),
        r"rope: inv_freq must be in \[0, 1\], got .*nan",
    ),
    "axis shape": (dict(axis=torch.zeros(3).int()), r"rope: axis must be .*\[4\], got \[3\]"),
    "axis dtype": (dict(axis=torch.zeros(4).long()), "rope: axis must be int32 on .*int64"),
    "axis value": (
        dict(axis=torch.full((4,), 2).int()),
        r"rope: axis must be in \[0, 2\), got .*2",
    ),
    "axis below": (
        dict(axis=torch.full((4,), -1).int()),
        r"rope: axis must be in \[0, 2\), got .*-1",
    ),
    "one weight": (
        dict(q_norm_weight=torch.ones(8)),
        "rope: q_norm_weight and k_norm_weight must be given together",
    ),
    "weight shape": (
        dict(q_norm_weight=torch.ones(8), k_norm_weight=torch.ones(4)),
        r"rope: k_norm_weight must be .*\[8\], got \[4\]",
    ),
    "weight dtype": (
        dict(q_norm_weight=torch.ones(8).half(), k_norm_weight=torch.ones(8)),
        "rope: q_norm_weight must have the dtype .* of q .*got torch.float16",
    ),
}


@pytest.mark.parametrize("way", ["op", "in-place op", "public", "reference"])
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name, way):
    changes, message = BAD_INPUT[name]
    arguments = {
        "q": torch.ones(3, 2, 8),
        "k": torch.ones(3, 2, 8),
        "position_ids": torch.zeros(2, 3, dtype=torch.int32),
        "inv_freq": torch.ones(4),
        "axis": torch.zeros(4, dtype=torch.int32),
        **changes,
    }
    if name.endswith("head_dim") and "q" in changes:
        arguments["k"] = arguments["q"]
    op = {
        "op": OPS.rope,
        "in-place op": OPS.rope_,
        "public": keye_ops.rope,
        "reference": rope_reference,
    }[way]
    with pytest.raises(RuntimeError, match=message):
        op(**arguments)


def test_bad_sections_and_positions():
    q = torch.ones(3, 2, 128)
    with pytest.raises(RuntimeError, match=r"must be 3 sizes with sum .* 64, got \(16, 24, 23\)"):
        keye_ops.rope_3d(q, q, torch.zeros(3, 3).int(), mrope_section=(16, 24, 23))
    with pytest.raises(RuntimeError, match=r"rope_3d: position_ids must be \[3, 3\], got \[3, 2\]"):
        keye_ops.rope_3d(q, q, torch.zeros(3, 2).int(), mrope_section=(16, 24, 24))
    with pytest.raises(RuntimeError, match=r"rope_2d: position_ids must be \[3, 2\], got \[2, 3\]"):
        keye_ops.rope_2d(q, q, torch.zeros(2, 3).int())
    with pytest.raises(RuntimeError, match="rope_2d: head_dim must be a multiple of 4, got 6"):
        keye_ops.rope_2d(q[..., :6], q[..., :6], torch.zeros(3, 2).int())
    with pytest.raises(RuntimeError, match=r"rope_2d: inv_freq must be \[32\], got \[5\]"):
        keye_ops.rope_2d(q, q, torch.zeros(3, 2).int(), inv_freq=torch.ones(5))


OVERLAPS = {
    "same": (lambda b: (b[:, :4], b[:, :4]), "q and k must not share memory"),
    "partly": (lambda b: (b[:, :4], b[:, 3:7]), "q and k must not share memory"),
    "wrap into the next token": (lambda b: (b[:-1, 8:], b[1:, :4]), None),
    "packed": (lambda b: (b[:, :4], b[:, 4:8]), None),
    "packed, k first": (lambda b: (b[:, 8:], b[:, :8]), None),
    "grouped": (lambda b: (b[:, :10], b[:, 10:12]), None),
    "other tokens": (lambda b: (b[:3], b[3:6]), None),
    "shifted tokens": (lambda b: (b[:3], b[2:5]), "q and k must not share memory"),
    "expanded": (lambda b: (b[:1].expand(7, -1, -1), b[:, :1].clone()), "q must not overlap"),
    "sliding": (
        lambda b: (b.flatten().as_strided((7, 4, 72), (144, 72, 1)), b[:, :1].clone()),
        "q must not overlap itself .* got stride 144 in dimension 0",
    ),
    "heads outside tokens": (lambda b: (b.transpose(0, 1), b.transpose(0, 1).clone()), None),
}


@pytest.mark.parametrize("way", ["op", "reference"])
@pytest.mark.parametrize("name", OVERLAPS)
def test_in_place_needs_memory_of_its_own(name, way):
    make, message = OVERLAPS[name]
    base = torch.randn(7, 12, 72)
    q, k = make(base)
    position_ids = torch.randint(0, 99, (2, len(q)))
    table = rope_table_2d(72, 1e4)
    want = rope_reference(q, k, position_ids, *table)
    op = OPS.rope_ if way == "op" else rope_inplace_reference
    if message is None:
        op(q, k, position_ids, *table)
        torch.testing.assert_close(q, want[0])
        torch.testing.assert_close(k, want[1])
    else:
        with pytest.raises(RuntimeError, match=message):
            op(q, k, position_ids, *table)


@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap", "dual"])
def test_function_transforms(transform):
    case = Case("vision", torch.float32)
    position_ids = case.position_ids.T
    tangent = torch.randn_like(case.q)

    def rotate(q):
        return keye_ops.rope_2d(q, case.k, position_ids)[0]

    want = rotate(tangent)  # a rotation is linear
    if transform == "jvp":
        _, got = torch.func.jvp(rotate, (case.q,), (tangent,))
    elif transform == "dual":
        with torch.autograd.forward_ad.dual_level():
            out = rotate(torch.autograd.forward_ad.make_dual(case.q, tangent))
            got = torch.autograd.forward_ad.unpack_dual(out).tangent
    elif transform == "vmap":
        got = torch.func.vmap(rotate)(tangent[None].expand(2, -1, -1, -1))[1]
    else:
        got = torch.func.grad(lambda q: (rotate(q) * rotate(tangent)).sum())(case.q)
        want = tangent
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@needs_native
def test_strides_fall_back_visibly():
    case = Case("vision", torch.float32)
    turned = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(RuntimeError, match="rope: q must have unit last stride, got 16"):
        OPS.rope(turned, case.k, *case.table)
    got = keye_ops.rope(turned, case.k, *case.table)
    assert keye_ops.last_dispatch("rope").implementation == "reference"
    assert "unit last stride" in keye_ops.last_dispatch("rope").reason
    torch.testing.assert_close(got[0], OPS.rope(case.q, case.k, *case.table)[0])
    with (
        keye_ops.backend("native"),
        pytest.raises(RuntimeError, match="the native kernel was required, but it needs a unit"),
    ):
        keye_ops.rope(turned, case.k, *case.table)
