"""linear_gelu against the error function and tanh in fp64; gradients; wrong input."""

import math

import linear_gelu_probe
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from host_cuda import build, executor, unavailable
from instruction_sets import needs_native_kernel, on_each_lesser_instruction_set, rerun
from tolerance import assert_within_twice
from torch._dynamo.testing import CompileCounterWithBackend

import keye_ops
from keye_ops import dispatch
from keye_ops.linear_gelu import (
    linear_gelu_backward_reference,
    linear_gelu_forward_reference,
    linear_gelu_reference,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
WAYS = ["public", "registered"]
FORMS = ["none", "tanh"]
SHAPES = {
    "keye": (6, 1152, 288),
    "square": (64, 96, 96),
    "odd": (17, 31, 13),
    "one row": (1, 40, 24),
    "no row": (0, 16, 24),
    "single": (1, 1, 1),
    "a block and one value": (241, 16, 17),
}
needs_native = needs_native_kernel("linear_gelu")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Products this small only get slower when threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def linear_gelu(way, *inputs, approximate="none"):
    x = inputs[0]
    registered = way == "registered" and not (runs_cuda(x) and launches_nothing(x))
    op = (torch.ops.keye_ops if registered else keye_ops).linear_gelu
    return op(*inputs, approximate=approximate)


def runs_cuda(x):
    return dispatch.kernel_device(x) == "cuda"


def launches_nothing(x):
    return x.dtype == torch.float64 or x.numel() == 0


def make(shape, dtype=torch.float64, device="cpu", seed=0):
    """x [M, K], weight [N, K] and bias [N]; hidden values of about 1."""
    rows, inner, outer = shape
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, inner), (outer, inner), (outer,))
    x, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [t.to(device, dtype) for t in (x, weight / math.sqrt(inner), bias)]


def through(values):
    """A weight of one and a bias of zero, through which values [M, 1] go unchanged."""
    return torch.ones(1, 1, dtype=values.dtype, device=values.device), values.new_zeros(1)


def oracle(x, weight, bias, approximate="none"):
    hidden = (x[:, None, :] * weight[None]).sum(2) + bias
    if approximate == "none":
        return hidden * 0.5 * torch.special.erfc(-hidden / math.sqrt(2))
    u = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
    return hidden * torch.sigmoid(2 * u)


def plain_linear_gelu(x, weight, bias, approximate="none"):
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_values(way, dtype, approximate, shape, device):
    inputs = make(shape, dtype, device)
    actual = linear_gelu(way, *inputs, approximate=approximate)
    exact = oracle(*(x.double() for x in inputs), approximate)
    assert actual.is_contiguous()
    assert_within_twice(actual, plain_linear_gelu(*inputs, approximate), exact)


@pytest.mark.parametrize("way", WAYS)
def test_it_is_the_exact_gelu_and_not_the_tanh_one(way):
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)[:, None]
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    actual = linear_gelu(way, x, one, zero)
    want = torch.tensor([[v * 0.5 * math.erfc(-v / math.sqrt(2))] for v in x[:, 0].tolist()])
    torch.testing.assert_close(actual, want.double(), rtol=1e-6, atol=1e-9)
    tanh = linear_gelu(way, x, one, zero, approximate="tanh")
    torch.testing.assert_close(tanh, F.gelu(x, approximate="tanh"), rtol=1e-6, atol=1e-9)
    assert (actual - tanh).abs().max() > 1e-4


@needs_native  # PyTorch's own left tail is 1 + erf or 1 + tanh, which cancels
@pytest.mark.parametrize("approximate", FORMS)
def test_the_left_tail_does_not_cancel(approximate, device):
    x = torch.linspace(-9, 0, 1001, device=device)[:, None]
    actual = keye_ops.linear_gelu(x, *through(x), approximate=approximate)
    exact = oracle(x.double(), *through(x.double()), approximate)
    torch.testing.assert_close(actual.double(), exact, rtol=2e-5, atol=0)


@needs_native
@pytest.mark.parametrize("approximate", FORMS)
def test_every_bf16_value(approximate, device):
    """Values and derivatives, of one formula for vectors on the CPU and for kernels."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()].to(device)[:, None]
    dout = torch.ones_like(x)
    actual = keye_ops.linear_gelu(x, *through(x), approximate=approximate)
    plain = F.gelu(x, approximate=approximate)
    exact = F.gelu(x.double(), approximate=approximate)
    assert_within_twice(actual, plain, exact)

    op = torch.ops.keye_ops.linear_gelu_backward
    weight = through(x)[0]
    actual = op(dout, x, weight, x, approximate)[0]
    backward = torch.ops.aten.gelu_backward
    plain = backward(dout, x, approximate=approximate)
    exact = backward(dout.double(), x.double(), approximate=approximate)
    small = x.abs() < 1e4  # beyond it torch's own tanh form overflows to NaN
    assert_within_twice(actual[small], plain[small], exact[small])
    ends = actual[~small]
    assert torch.equal(ends, (x[~small] > 0).to(ends.dtype))


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_extreme_values(way, dtype, approximate, device):
    values = [1e4, -1e4, torch.inf, torch.nan, 0.0, -torch.inf]
    values = torch.tensor(values, dtype=dtype, device=device)[:, None]
    actual = linear_gelu(way, values, *through(values), approximate=approximate)[:, 0]
    assert actual[[0, 1, 4]].tolist() == [values[0].item(), 0.0, 0.0]
    assert not actual[2].isfinite()  # PyTorch's own GELU makes NaN of +inf in fp32 and bf16
    assert actual[3].isnan()
    assert actual[5].isnan() or actual[5] == 0


@pytest.mark.parametrize("way", WAYS)
def test_special_values_stay_in_their_row(way, device):
    x, weight, bias = make((9, 8, 7), torch.float32, device)
    want = linear_gelu(way, x, weight, bias)
    x[4, 2] = torch.nan
    actual = linear_gelu(way, x, weight, bias)
    others = torch.arange(9) != 4
    torch.testing.assert_close(actual[others], want[others])
    assert actual[4].isnan().all()


@pytest.mark.parametrize("way", WAYS)
def test_strided_inputs(way):
    x, weight, bias = make((9, 8, 7))
    want = linear_gelu(way, x, weight, bias)
    strided = (x.T.contiguous().T, torch.cat([weight, weight], 1)[:, :8], bias)
    assert not any(t.is_contiguous() for t in strided[:2])
    torch.testing.assert_close(linear_gelu(way, *strided), want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("shape", [(5, 4, 3), (1, 1, 1), (0, 4, 3)])
def test_gradients(shape, approximate):
    """The registered gradient, the reference's, the oracle's and finite differences agree."""
    inputs = [x.requires_grad_() for x in make(shape)]
    out = linear_gelu("registered", *inputs, approximate=approximate)
    dout = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator())
    actual = torch.autograd.grad(out, inputs, dout)
    for other in (linear_gelu_reference, oracle):
        want = torch.autograd.grad(other(*inputs, approximate), inputs, dout)
        torch.testing.assert_close(actual, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("approximate", FORMS)
def test_gradcheck(approximate):
    """Many shapes, those with nothing in them included."""
    shapes = [(m, k, n) for m in (0, 1, 2, 5) for k in (0, 1, 3, 4) for n in (0, 1, 2, 7)]
    assert len(shapes) >= 50
    op = torch.ops.keye_ops.linear_gelu
    for shape in shapes:
        x, weight, bias = make((shape[0], max(shape[1], 1), shape[2]))
        inputs = [y.requires_grad_() for y in (x[:, : shape[1]], weight[:, : shape[1]], bias)]
        assert torch.autograd.gradcheck(lambda *y: op(*y, approximate), inputs)


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_within_twice_of_plain(way, dtype, approximate, device):
    inputs = make((60, 96, 48), dtype, device)
    dout = torch.randn(60, 48, generator=torch.Generator()).to(device, dtype)

    def grads(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves, approximate), leaves, dout.to(dtype))

    actual = grads(lambda *x: linear_gelu(way, *x[:3], approximate=x[3]), dtype)
    plain, exact = grads(plain_linear_gelu, dtype), grads(oracle, torch.float64)
    for triple in zip(actual, plain, exact, strict=True):
        assert_within_twice(*triple)


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("shape", [(5, 4, 3), (0, 4, 3)])
@pytest.mark.parametrize("name", ["linear_gelu", "linear_gelu_forward"])
def test_opcheck(name, shape, approximate):
    inputs = tuple(x.requires_grad_() for x in make(shape, torch.float32))
    torch.library.opcheck(getattr(torch.ops.keye_ops, name).default, (*inputs, approximate))


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("shape", [(5, 4, 3), (33, 20, 47)])
def test_forward_op(shape, approximate, device):
    """The result is that of linear_gelu, bit for bit; the hidden values have no gradient."""
    inputs = [x.requires_grad_() for x in make(shape, torch.float32, device)]
    out, hidden = torch.ops.keye_ops.linear_gelu_forward(*inputs, approximate)
    assert not hidden.requires_grad
    plain = linear_gelu_forward_reference(*inputs, approximate)
    torch.testing.assert_close((out, hidden), plain)
    if not runs_cuda(out):
        assert torch.equal(out, torch.ops.keye_ops.linear_gelu(*inputs, approximate))


@needs_native
def test_the_gradient_multiplies_no_matrices_of_the_forward(monkeypatch):
    """Public calls that need gradients keep the hidden values; others keep nothing."""
    inputs = make((9, 8, 7), torch.float32)
    assert keye_ops.linear_gelu(*inputs).grad_fn is None
    out = keye_ops.linear_gelu(*(x.requires_grad_() for x in inputs))
    monkeypatch.setattr(F, "linear", None)
    with torch.profiler.profile() as profile:
        out.sum().backward()
    products = [e for e in profile.events() if e.name in ("aten::mm", "aten::addmm")]
    assert len(products) == 2


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("shape", [(5, 4, 3), (33, 20, 47)])
def test_backward_op(shape, approximate, device):
    x, weight, bias = make(shape, torch.float32, device)
    inputs = (x, weight, F.linear(x, weight, bias))
    dout = make((shape[0], shape[2], 1), torch.float32, device, seed=1)[0]
    op = torch.ops.keye_ops.linear_gelu_backward
    results = op(dout, *inputs, approximate)
    plain = linear_gelu_backward_reference(dout, *inputs, approximate)
    exact = (y.double() for y in (dout, *inputs))
    truth = linear_gelu_backward_reference(*exact, approximate)
    for triple in zip(results, plain, truth, strict=True):
        assert_within_twice(*triple)
    strided, shifted = dout.T.contiguous().T, torch.cat([dout.new_zeros(1), dout.flatten()])[1:]
    for other in (strided, shifted.view_as(dout)):
        assert all(map(torch.equal, op(other, *inputs, approximate), results))


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("shape", [(5, 4, 3), (0, 4, 3)])
def test_opcheck_of_the_backward(shape, approximate):
    x, weight, bias = make(shape, torch.float32)
    dout = make((shape[0], shape[2], 1), torch.float32, seed=1)[0]
    arguments = (dout, x, weight, F.linear(x, weight, bias), approximate)
    torch.library.opcheck(torch.ops.keye_ops.linear_gelu_backward.default, arguments)


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_an_expanded_gradient(way, approximate):
    leaves = [x.requires_grad_() for x in make((9, 8, 7))]
    grads = [
        torch.autograd.grad(function(linear_gelu(way, *leaves, approximate=approximate)), leaves)
        for function in (torch.sum, lambda out: (out * torch.ones_like(out)).sum())
    ]
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("approximate", FORMS)
def test_autocast_is_that_of_a_linear_layer(approximate):
    inputs = [x.requires_grad_() for x in make((9, 8, 7), torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        actual = keye_ops.linear_gelu(*inputs, approximate=approximate)
        want = plain_linear_gelu(*inputs, approximate)
    assert actual.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(actual, want)
    grads = [torch.autograd.grad(out.float().square().sum(), inputs) for out in (actual, want)]
    torch.testing.assert_close(*grads, rtol=2e-2, atol=2e-2)


@needs_native  # torch does not promise it
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype, approximate):
    """Of the pass; the products are torch's, so they are ones that are exact."""
    x = torch.linspace(-4, 4, 150 * 301, dtype=torch.float64).view(150, 301).to(dtype)
    inputs = [x, torch.eye(301, dtype=dtype), torch.zeros(301, dtype=dtype)]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            out = keye_ops.linear_gelu(*inputs, approximate=approximate)
            backward = torch.ops.keye_ops.linear_gelu_backward(out, *inputs[:2], x, approximate)
            results.append([out, backward[0]])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@needs_native
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_element_does_not_depend_on_its_neighbours(dtype, approximate):
    x = torch.linspace(-4, 4, 67, dtype=torch.float64).to(dtype)[:, None]
    inputs = through(x)
    want = keye_ops.linear_gelu(x, *inputs, approximate=approximate)
    alone = [keye_ops.linear_gelu(row[None], *inputs, approximate=approximate) for row in x]
    assert torch.equal(torch.cat(alone), want)


# ---- random configurations ----


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_random_launches_of_the_pass():
    """400 configurations under 4 schedules: no finding, the formula's values, the same bits."""
    executor().load_library(str(build() / "host_cuda_linear_gelu.so"))
    order, completion = executor().Order, executor().Completion
    schedules = [
        executor().Schedule(0, order.in_order, 0, completion.early),
        executor().Schedule(1, order.reversed, 1, completion.late),
        executor().Schedule(2, order.random, 16, completion.random),
        executor().Schedule(3, order.random, 4, completion.early),
    ]
    rng = np.random.default_rng(5)
    for seed in range(400):
        case = linear_gelu_probe.Case(
            dtype=int(rng.integers(3)),
            numel=int(rng.integers(1, rng.choice([20, 600, 12000]))),
            tanh=bool(rng.integers(2)),
            backward=bool(rng.integers(2)),
            in_place=bool(rng.integers(4) == 0),
        )
        results = []
        for schedule in schedules:
            one = linear_gelu_probe.Pass(executor(), case, seed)
            report, right = one.launch().run(executor(), schedule)
            assert not report.findings, f"{case}\n{report.text()}"
            assert right, case
            results.append(one.out)
        assert all(np.array_equal(results[0], other) for other in results[1:]), case


# ---- every instruction set ----


@on_each_lesser_instruction_set
def test_this_file_on_a_lesser_instruction_set(isa):
    chosen = "(values or twice or tail or strided or bits or neighbours or bf16) and not host_cuda"
    rerun(__file__, isa, chosen)


def test_compile_makes_one_graph_for_all_sizes():
    counter, graphs = CompileCounterWithBackend("aot_eager"), []

    def function(x, weight, bias):
        return keye_ops.linear_gelu(x.sin(), weight, bias).cos()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for rows in (11, 29, 5):
        inputs = [x.requires_grad_() for x in make((rows, 8, 6), torch.float32)]
        with keye_ops.backend("auto"):
            out, want = compiled(*inputs), function(*inputs)
        torch.testing.assert_close(out, want)
        gradients = [torch.autograd.grad(x.square().sum(), inputs) for x in (out, want)]
        torch.testing.assert_close(*gradients)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3


def test_compile_with_inductor():
    compiled = torch.compile(
        lambda *x: keye_ops.linear_gelu(*x).neg(), fullgraph=True, dynamic=True
    )
    for rows in (11, 29):
        inputs = make((rows, 8, 6))
        with keye_ops.backend("auto"):
            torch.testing.assert_close(compiled(*inputs), -oracle(*inputs))


def test_a_compiled_graph_keeps_the_mode_it_was_compiled_under():
    inputs = make((3, 4, 5))
    code = []

    def backend(graph, example_inputs):
        code.append(graph.code)
        return graph

    for mode in ("auto", "reference"):
        torch._dynamo.reset()
        with keye_ops.backend(mode):
            compiled = torch.compile(lambda *x: keye_ops.linear_gelu(*x), backend=backend)
            torch.testing.assert_close(compiled(*inputs), oracle(*inputs))
    assert "keye_ops.linear_gelu" in code[0]
    assert "keye_ops.linear_gelu" not in code[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.ones(5, 4).int()}, "x must be fp64, fp32, fp16 or bf16, got torch.int32"),
        ({0: torch.ones(5)}, r"x must be \[M, K\], got \[5\]"),
        ({1: torch.ones(3, 5)}, r"weight must be \[N, 4\], got \[3, 5\]"),
        (
            {1: torch.ones(3, 4).half()},
            r"weight must have the dtype and device of x \(torch.float32, cpu\), got torch.float16",
        ),
        ({2: torch.ones(4)}, r"bias must be \[3\], got \[4\]"),
        ({2: torch.ones(3).half()}, "bias must have the dtype and device of x"),
        ({3: "erf"}, 'approximate must be "none" or "tanh", got erf'),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_wrong_input(way, changes, message):
    inputs = [*make((5, 4, 3), torch.float32), "none"]
    for i, value in changes.items():
        inputs[i] = value
    with pytest.raises(RuntimeError, match=f"linear_gelu: {message}"):
        linear_gelu(way, *inputs[:3], approximate=inputs[3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.ones(5, 4)}, r"dout must be \[5, 3\], got \[5, 4\]"),
        ({0: torch.ones(5, 3).half()}, "dout must have the dtype and device of x"),
        ({2: torch.ones(3, 5)}, r"weight must be \[N, 4\], got \[3, 5\]"),
        ({3: torch.ones(3)}, r"hidden must be \[5, 3\], got \[3\]"),
        ({3: torch.ones(5, 3).half()}, "hidden must have the dtype and device of x"),
        ({4: "erf"}, 'approximate must be "none" or "tanh", got erf'),
    ],
)
@pytest.mark.parametrize("way", ["registered", "reference"])
def test_wrong_input_backward(way, changes, message):
    registered = torch.ops.keye_ops.linear_gelu_backward
    op = registered if way == "registered" else linear_gelu_backward_reference
    x, weight, _ = make((5, 4, 3), torch.float32)
    inputs = [torch.ones(5, 3), x, weight, torch.ones(5, 3), "none"]
    for i, value in changes.items():
        inputs[i] = value
    with pytest.raises(RuntimeError, match=f"linear_gelu: {message}"):
        op(*inputs)
