"""add_layer_norm and layer_norm against sums and norms by hand in fp64; gradients; errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import needs_native_kernel, on_each_lesser_instruction_set, rerun
from tolerance import assert_within_twice
from torch._dynamo.testing import CompileCounterWithBackend

import keye_ops
from keye_ops import dispatch
from keye_ops.add_layer_norm import add_layer_norm_backward_reference, add_layer_norm_reference

needs_native = needs_native_kernel("add_layer_norm")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FORMS = ["add", "norm"]
OPS = torch.ops.keye_ops
# Long rows come in numbers: the errors of one share its rstd's, so that few judge luck.
SHAPES = {
    "vision": (37, 1152),
    "many rows": (150, 72),
    "one row": (1, 40),
    "no row": (0, 1152),
    "no column": (3, 0),
    "one column": (5, 1),
    "odd width": (70, 131),
    "under a vector": (9, 3),
    "wide": (24, 4608),
    "past registers": (24, 15368),  # of CUDA threads
}


def make(shape, form, dtype=torch.float64, device="cpu", seed=0):
    """x, residual or None, weight, bias."""
    rows, hidden = SHAPES.get(shape, shape)
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    residual = randn(rows, hidden) if form == "add" else None
    inputs = [randn(rows, hidden), residual, 1 + randn(hidden) / 4, randn(hidden)]
    return [x if x is None else x.to(device) for x in inputs]


def make_douts(shape, form, dtype=torch.float64, device="cpu"):
    """Gradients of sum and normed."""
    dsum, dnormed, *_ = make(shape, "add", dtype, device, seed=1)
    return [dsum if form == "add" else dsum.new_empty(0), dnormed]


def public(x, residual, weight, bias, eps=1e-6):
    """The public function of the form; (sum, normed)."""
    if residual is None:
        return x.new_empty(0), keye_ops.layer_norm(x, weight, bias, eps=eps)
    return keye_ops.add_layer_norm(x, residual, weight, bias, eps=eps)


WAYS = {
    "public": public,
    "registered": OPS.add_layer_norm,
    "reference": add_layer_norm_reference,
}


def norm_by_hand(x, weight, bias, eps=1e-6):
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * weight + bias


def results_of(function, inputs, douts):
    """Outputs of a function of (x, residual, weight, bias), then the gradients."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    leaves = [x for x in leaves if x is not None]
    pairs = [(o, d) for o, d in zip(out, douts, strict=True) if o.requires_grad]
    outputs, douts = zip(*pairs, strict=True)
    return [*out, *torch.autograd.grad(outputs, leaves, douts)]


def exact_results(inputs, douts):
    """In fp64, but of the sum as the dtype rounds it, which is what goes on."""
    x, residual, weight, bias = inputs
    total = x if residual is None else x + residual
    leaves = [x.double().requires_grad_() for x in (total, weight, bias)]
    normed = norm_by_hand(*leaves)
    dtotal, *rest = torch.autograd.grad(normed, leaves, douts[1].double())
    if residual is None:
        return [x.new_empty(0).double(), normed, dtotal, *rest]
    dtotal = dtotal + douts[0].double()
    return [x.double() + residual.double(), normed, dtotal, dtotal, *rest]


def assert_values_and_gradients(function, shape, dtype, form, device="cpu"):
    inputs = make(shape, form, dtype, device)
    douts = make_douts(shape, form, dtype, device)
    results = results_of(function, inputs, douts)
    plain = results_of(add_layer_norm_reference, inputs, douts)
    exact = exact_results(inputs, douts)
    assert len(results) == (6 if form == "add" else 5)
    if form == "add":
        assert torch.equal(results[0], inputs[0] + inputs[1])
    for one, one_plain, one_exact in zip(results, plain, exact, strict=True):
        assert one.is_contiguous()
        assert_within_twice(one, one_plain, one_exact)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype, form, device):
    assert_values_and_gradients(public, shape, dtype, form, device)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_of_the_registered_op(shape, dtype, form):
    assert_values_and_gradients(OPS.add_layer_norm, shape, dtype, form)


@pytest.mark.parametrize("eps", [0.5, 1e-12])
def test_eps(eps, device):
    x, _, *parameters = make("many rows", "norm", torch.float32, device)
    x = x * 1e-3
    exact = norm_by_hand(x.double(), *(y.double() for y in parameters), eps)
    plain = F.layer_norm(x, (72,), *parameters, eps)
    assert_within_twice(public(x, None, *parameters, eps)[1], plain, exact)


@needs_native  # torch does not promise it
@pytest.mark.parametrize("form", FORMS)
def test_strided_inputs(form, device):
    x, residual, weight, bias = make((20, 1152), form, torch.bfloat16, device)
    wide = torch.cat([x, x, x], 1)[:, 1152:2304]
    spread = None if residual is None else residual.repeat_interleave(2, 0)[::2]
    want = public(x, residual, weight, bias)
    got = public(wide, spread, weight, bias)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    row = x[:1].expand(20, -1)
    got, want = (public(y, residual, weight, bias) for y in (row, row.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    # sum() sends an expanded gradient of stride zero.
    leaf = wide.detach().requires_grad_()
    public(leaf, residual, weight, bias)[1].sum().backward()
    ones = torch.ones_like(x)
    total = x if residual is None else x + residual
    want = OPS.add_layer_norm_backward(None, ones, total, weight, 1e-6)[0]
    assert torch.equal(leaf.grad, want)
    # Gradients of any row stride go to the kernel as they are.
    dsum = torch.cat([total, total], 1)[:, 1152:]
    got = OPS.add_layer_norm_backward(dsum, wide, total, weight, 1e-6)
    want = OPS.add_layer_norm_backward(total, x, total, weight, 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("index", [0, 1], ids=["sum", "norm"])
def test_only_the_sum_or_only_the_norm_has_a_gradient(index, device):
    inputs = [x.requires_grad_() for x in make("many rows", "add", torch.float32, device)]
    functions = public, add_layer_norm_reference
    got, want = (torch.autograd.grad(f(*inputs)[index].square().sum(), inputs[:2])
                 for f in functions)  # fmt: skip
    torch.testing.assert_close(got, want)


def test_offsets_past_two_billion_elements(device):
    # Two rows 2**31 elements apart; only they take memory.
    x, residual, *parameters = make((2, 64), "add", torch.bfloat16, device)
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    far = storage.as_strided((2, 64), (2**31, 1))
    for rows in (x, residual):
        far.copy_(rows)
        args = (far, residual) if rows is x else (x, far)
        got, want = public(*args, *parameters), public(x, residual, *parameters)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    dsum, dnormed = make_douts((2, 64), "add", torch.bfloat16, device)
    weight = parameters[0]
    want = OPS.add_layer_norm_backward(dsum, dnormed, x, weight, 1e-6)
    for index, rows in enumerate((dsum, dnormed, x)):
        far.copy_(rows)
        args = [dsum, dnormed, x]
        args[index] = far
        got = OPS.add_layer_norm_backward(*args, weight, 1e-6)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_million_rows(device):
    """More than teams of CUDA threads; the host executor takes a few of them."""
    x, residual, weight, bias = make((100, 8), "add", torch.bfloat16, device)
    dsum, dnormed = make_douts((100, 8), "add", torch.bfloat16, device)
    times = 16 if dispatch.kernel_device(x) != x.device.type else 10_000
    many = [y.repeat(times, 1) for y in (x, residual)]
    want = OPS.add_layer_norm(x, residual, weight, bias)
    for got, one in zip(public(*many, weight, bias), want, strict=True):
        assert torch.equal(got.unflatten(0, (times, 100)), one.expand(times, -1, -1))
    backward = OPS.add_layer_norm_backward
    dx = backward(dsum, dnormed, x, weight, 1e-6)[0]
    got, dweight, *_ = backward(*(y.repeat(times, 1) for y in (dsum, dnormed, x)), weight, 1e-6)
    assert torch.equal(got.unflatten(0, (times, 100)), dx.expand(times, -1, -1))
    exact = (
        add_layer_norm_backward_reference(None, *(y.double() for y in (dnormed, x, weight)), 1e-6)[
            1
        ]
        * times
    )
    torch.testing.assert_close(dweight.double(), exact, rtol=0.01, atol=0.01 * times)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_extreme_values(dtype, form, device):
    # Many rows of a kind: the errors of one share that of its rstd.
    inputs = make((8 * 32, 144), form, dtype, device)
    kinds = inputs[0].unflatten(0, (8, 32))
    info = torch.finfo(dtype)
    scales = [info.max**0.25, info.tiny, info.tiny * info.eps, 0.0, info.eps, 1e3]
    kinds[:6] *= torch.tensor(scales, dtype=dtype, device=device)[:, None, None]
    kinds[6] += 1e4  # must not cancel in the variance
    kinds[7] = 3.0
    if form == "add":
        inputs[1].zero_()
    results = public(*inputs)
    plain = add_layer_norm_reference(*inputs)
    total = inputs[0].double() if form == "norm" else results[0].double()
    exact = norm_by_hand(total, *(x.double() for x in inputs[2:]))
    for triple in zip(*(x.split(32) for x in (results[1], plain[1], exact)), strict=True):
        assert_within_twice(*triple)


@needs_native  # torch does not promise it
def test_an_offset_does_not_cancel_the_variance(device):
    x = 1e4 + make((50, 1152), "norm", torch.float32, device)[0]
    got = keye_ops.layer_norm(x, torch.ones(1152, device=device), torch.zeros(1152, device=device))
    exact = norm_by_hand(x.double(), 1, 0)
    assert (got - exact).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", FORMS)
def test_bad_numbers_stay_in_their_row(form, bad, dtype, device):
    inputs = make((9, 72), form, dtype, device)
    clean = public(*inputs)
    inputs[0][3, 20] = bad
    out = public(*inputs)
    assert not out[1][3].isfinite().any()
    assert form == "norm" or torch.equal(out[0].isfinite(), inputs[0].isfinite())
    out[1][3] = clean[1][3]
    assert torch.equal(out[1], clean[1])


@needs_native  # torch does not promise it
@pytest.mark.parametrize("form", FORMS)
def test_same_bits_for_any_number_of_threads(form):
    inputs = make((3000, 144), form, torch.bfloat16)
    douts = make_douts((3000, 144), form, torch.bfloat16)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(results_of(public, inputs, douts))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_a_row_does_not_depend_on_its_neighbours(form, device):
    x, residual, weight, bias = make("many rows", form, torch.bfloat16, device)
    together = public(x, residual, weight, bias)
    for row in range(0, 150, 7):
        one = None if residual is None else residual[row : row + 1]
        alone = public(x[row : row + 1], one, weight, bias)
        assert torch.equal(alone[1][0], together[1][row])


# ---- every instruction set ----


@on_each_lesser_instruction_set
def test_this_file_on_a_lesser_instruction_set(isa):
    rerun(
        __file__,
        isa,
        "(values or strided or offset or numbers or bits or neighbours) and not host_cuda",
    )


# ---- autograd, torch.library, compile ----


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    shapes = [(rows, hidden) for rows in (0, 1, 2, 3, 5) for hidden in range(11)]
    assert len(shapes) >= 50
    for shape in shapes:
        x, residual, weight, bias = make(shape, form)
        leaves = [t.requires_grad_() for t in (x, residual, weight, bias) if t is not None]

        def function(x, *rest):
            args = rest if len(rest) == 3 else (None, *rest)
            return OPS.add_layer_norm(x, *args, 1e-2)

        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", ["odd width", "no row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, shape, form):
    inputs = make(shape, form, dtype)
    torch.library.opcheck(OPS.add_layer_norm.default, inputs)
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    torch.library.opcheck(OPS.add_layer_norm.default, leaves)
    dsum, dnormed = make_douts(shape, form, dtype)
    dsum = dsum if form == "add" else None
    arguments = (dsum, dnormed, inputs[0], inputs[2], 1e-6)
    torch.library.opcheck(OPS.add_layer_norm_backward.default, arguments)


@pytest.mark.parametrize("form", FORMS)
def test_backward_op_equals_the_reference(form, device):
    x, _, weight, _ = make("many rows", form, torch.float32, device)
    dsum, dnormed = make_douts("many rows", form, torch.float32, device)
    arguments = [dsum if form == "add" else None, dnormed, x, weight]
    exact = [None if t is None else t.double() for t in arguments]
    results = OPS.add_layer_norm_backward(*arguments, 1e-6)
    plain = add_layer_norm_backward_reference(*arguments, 1e-6)
    truth = add_layer_norm_backward_reference(*exact, 1e-6)
    for triple in zip(results, plain, truth, strict=True):
        assert_within_twice(*triple)


def test_compile_makes_one_graph_for_all_sizes():
    counter, graphs = CompileCounterWithBackend("aot_eager"), []

    def function(x, residual, weight, bias):
        total, normed = keye_ops.add_layer_norm(x.sin(), residual, weight, bias)
        return total, keye_ops.layer_norm(normed, weight, bias).cos()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for rows in (5, 12, 7):
        inputs = [x.requires_grad_() for x in make((rows, 72), "add")]
        with keye_ops.backend("auto"):
            out, want = compiled(*inputs), function(*inputs)
        torch.testing.assert_close(out, want)
        gradients = [
            torch.autograd.grad(x[0].sum() + x[1].square().sum(), inputs) for x in (out, want)
        ]
        torch.testing.assert_close(*gradients)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3


def test_equals_torch(device):
    x, residual, weight, bias = make("vision", "add", torch.float32, device)
    total, normed = keye_ops.add_layer_norm(x, residual, weight, bias)
    want = F.layer_norm(x + residual, (1152,), weight, bias, 1e-6)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, want)
    torch.testing.assert_close(keye_ops.layer_norm(total, weight, bias), want)


# ---- bad input: the same message from the native op and from the reference ----


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


SAME = r"must have the dtype and device of x \(torch.float32, cpu\), got torch.float16, cpu"
BAD_INPUT = {
    "dtype": ({"x": zeros(3, 8).int()}, "x must be fp64, fp32, fp16 or bf16, got torch.int32"),
    "rank": ({"x": zeros(3, 2, 4)}, r"x must be \[N, C\], got \[3, 2, 4\]"),
    "residual shape": ({"residual": zeros(2, 8)}, r"residual must be \[3, 8\], got \[2, 8\]"),
    "residual dtype": ({"residual": zeros(3, 8).half()}, f"residual {SAME}"),
    "weight shape": ({"weight": zeros(7)}, r"weight must be \[8\], got \[7\]"),
    "weight rank": ({"weight": zeros(8, 1)}, r"weight must be \[8\], got \[8, 1\]"),
    "weight dtype": ({"weight": zeros(8).half()}, f"weight {SAME}"),
    "bias shape": ({"bias": zeros(9)}, r"bias must be \[8\], got \[9\]"),
    "bias dtype": ({"bias": zeros(8).half()}, f"bias {SAME}"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BAD_INPUT)
def test_wrong_input(name, way):
    changes, message = BAD_INPUT[name]
    inputs = {"x": zeros(3, 8), "residual": zeros(3, 8), "weight": zeros(8), "bias": zeros(8)}
    with pytest.raises(RuntimeError, match=f"add_layer_norm: {message}"):
        WAYS[way](*{**inputs, **changes}.values())


@pytest.mark.parametrize("way", ["registered", "reference"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dsum": zeros(3, 7)}, r"dsum must be \[3, 8\], got \[3, 7\]"),
        ({"dnormed": zeros(8)}, r"dnormed must be \[3, 8\], got \[8\]"),
        ({"dnormed": zeros(3, 8).half()}, f"dnormed {SAME.replace('of x', 'of sum')}"),
        ({"sum": zeros(8)}, r"sum must be \[N, C\], got \[8\]"),
        ({"weight": zeros(4)}, r"weight must be \[8\], got \[4\]"),
    ],
)
def test_wrong_input_of_the_backward(changes, message, way):
    inputs = {"dsum": zeros(3, 8), "dnormed": zeros(3, 8), "sum": zeros(3, 8), "weight": zeros(8)}
    op = OPS.add_layer_norm_backward if way == "registered" else add_layer_norm_backward_reference
    with pytest.raises(RuntimeError, match=f"add_layer_norm: {message}"):
        op(**{**inputs, **changes}, eps=1e-6)


@needs_native
def test_strides_fall_back_visibly():
    x, residual, weight, bias = make("vision", "add", torch.float32)
    turned = x.T.contiguous().T
    message = "add_layer_norm: {} must have unit last stride, got 37"
    with pytest.raises(RuntimeError, match=message.format("x")):
        OPS.add_layer_norm(turned, residual, weight, bias)
    with pytest.raises(RuntimeError, match=message.format("residual")):
        OPS.add_layer_norm(residual, turned, weight, bias)
    want = OPS.add_layer_norm(x, residual, weight, bias)
    got = keye_ops.add_layer_norm(turned, residual, weight, bias)
    torch.testing.assert_close(got, want)
    assert all(y.is_contiguous() for y in got)
    assert keye_ops.last_dispatch("layer_norm").implementation == "reference"
    assert "unit last stride" in keye_ops.last_dispatch("add_layer_norm").reason
    with pytest.raises(RuntimeError, match="weight must be contiguous, got stride 2"):
        OPS.add_layer_norm(x, residual, weight.repeat_interleave(2)[::2], bias)
    with (
        keye_ops.backend("native"),
        pytest.raises(RuntimeError, match="the native kernel was required, but it needs a unit"),
    ):
        keye_ops.layer_norm(turned, weight, bias)
