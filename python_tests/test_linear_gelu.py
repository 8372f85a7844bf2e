"""linear_gelu against the error function in fp64; gradients; wrong input."""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_within_twice
from torch._dynamo.testing import CompileCounterWithBackend

import keye_ops
from keye_ops.linear_gelu import linear_gelu_reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
WAYS = ["public", "registered"]
SHAPES = {
    "keye": (6, 1152, 288),
    "square": (64, 96, 96),
    "odd": (17, 31, 13),
    "one row": (1, 40, 24),
    "no row": (0, 16, 24),
    "single": (1, 1, 1),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Products this small only get slower when threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def linear_gelu(way, *inputs):
    return (keye_ops if way == "public" else torch.ops.keye_ops).linear_gelu(*inputs)


def make(shape, dtype=torch.float64, seed=0):
    """x [M, K], weight [N, K] and bias [N]; hidden values of about 1."""
    rows, inner, outer = shape
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, inner), (outer, inner), (outer,))
    x, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [t.to(dtype) for t in (x, weight / math.sqrt(inner), bias)]


def oracle(x, weight, bias):
    hidden = (x[:, None, :] * weight[None]).sum(2) + bias
    return hidden * 0.5 * torch.special.erfc(-hidden / math.sqrt(2))


def plain_linear_gelu(x, weight, bias):
    return F.gelu(F.linear(x, weight, bias))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_values(way, dtype, shape):
    inputs = make(shape, dtype)
    actual = linear_gelu(way, *inputs)
    exact = oracle(*(x.double() for x in inputs))
    assert actual.is_contiguous()
    assert_within_twice(actual, plain_linear_gelu(*inputs), exact)


@pytest.mark.parametrize("way", WAYS)
def test_it_is_the_exact_gelu_and_not_the_tanh_one(way):
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)[:, None]
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    actual = linear_gelu(way, x, one, zero)
    want = torch.tensor([[v * 0.5 * math.erfc(-v / math.sqrt(2))] for v in x[:, 0].tolist()])
    torch.testing.assert_close(actual, want.double(), rtol=1e-6, atol=1e-9)
    assert (actual - F.gelu(x, approximate="tanh")).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_extreme_values(way, dtype):
    values = torch.tensor([1e4, -1e4, torch.inf, torch.nan, 0.0], dtype=dtype)[:, None]
    one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype)
    actual = linear_gelu(way, values, one, zero)[:, 0]
    assert actual[[0, 1, 4]].tolist() == [values[0].item(), 0.0, 0.0]
    assert not actual[2].isfinite()  # PyTorch's own GELU makes NaN of +inf in fp32 and bf16
    assert actual[3].isnan()


@pytest.mark.parametrize("way", WAYS)
def test_special_values_stay_in_their_row(way):
    x, weight, bias = make((9, 8, 7), torch.float32)
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


@pytest.mark.parametrize("shape", [(5, 4, 3), (1, 1, 1), (0, 4, 3)])
def test_gradients(shape):
    """The registered gradient, the reference's, the oracle's and finite differences agree."""
    inputs = [x.requires_grad_() for x in make(shape)]
    out = linear_gelu("registered", *inputs)
    dout = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator())
    actual = torch.autograd.grad(out, inputs, dout)
    for other in (linear_gelu_reference, oracle):
        want = torch.autograd.grad(other(*inputs), inputs, dout)
        torch.testing.assert_close(actual, want, rtol=1e-12, atol=1e-13)
    if shape[0]:
        assert torch.autograd.gradcheck(torch.ops.keye_ops.linear_gelu, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_within_twice_of_plain(way, dtype):
    inputs = make((60, 96, 48), dtype)
    dout = torch.randn(60, 48, generator=torch.Generator()).to(dtype)

    def grads(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), leaves, dout.to(dtype))

    actual = grads(lambda *x: linear_gelu(way, *x), dtype)
    plain, exact = grads(plain_linear_gelu, dtype), grads(oracle, torch.float64)
    for triple in zip(actual, plain, exact, strict=True):
        assert_within_twice(*triple)


@pytest.mark.parametrize("shape", [(5, 4, 3), (0, 4, 3)])
def test_opcheck(shape):
    inputs = tuple(x.requires_grad_() for x in make(shape, torch.float32))
    torch.library.opcheck(torch.ops.keye_ops.linear_gelu.default, inputs)


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
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_wrong_input(way, changes, message):
    inputs = make((5, 4, 3), torch.float32)
    for i, tensor in changes.items():
        inputs[i] = tensor
    with pytest.raises(RuntimeError, match=f"linear_gelu: {message}"):
        linear_gelu(way, *inputs)
