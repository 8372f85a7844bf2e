"""Thousands of random calls of every op, judged against fp64; and faults that this must see."""

import os

import pytest
import torch
from fuzz_cases import OPS, Tally, check
from hypothesis import HealthCheck, Phase, given, settings
from instruction_sets import on_each_lesser_instruction_set, rerun

EXAMPLES = int(os.environ.get("KEYE_OPS_FUZZ_EXAMPLES", "2000"))


def run_fuzz(op, examples, call=None, phases=(Phase.generate, Phase.shrink)):
    """Judge that many random problems; ``call`` makes of a problem what stands for the op."""
    strategy, make = OPS[op]
    tally, count = Tally(), 0

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(strategy)
    def body(choices):
        nonlocal count
        count += 1
        problem = make(choices)
        check(problem, tally, call and call(problem))

    body()
    tally.verify()
    return count


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Products this small only get slower when threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("op", OPS)
def test_fuzz(op):
    assert run_fuzz(op, EXAMPLES) >= EXAMPLES


# ---- the fuzz sees faults ----


def changed(change):
    """A fault in the outputs, of which ``change`` gets the first."""

    def fault(problem):
        def call(inputs):
            outputs = problem.call(inputs)
            name = next(iter(outputs))
            return {**outputs, name: change(outputs[name])}

        return call

    return fault


@changed
def one_element_rounded_wrong(out):
    if out.numel() == 0:
        return out
    index = out.abs().flatten().argmax()
    eps = torch.finfo(out.dtype).eps
    return torch.where(
        torch.arange(out.numel()) == index, out.flatten() * (1 + 8 * eps), out.flatten()
    ).view_as(out)


@changed
def all_rounded_towards_zero(out):
    """Within the rule of the largest error, so that only the mean tells."""
    kept = out * (1 - torch.finfo(out.dtype).eps / 2)
    return kept if out.dtype != torch.float64 else out


@changed
def two_rows_swapped(out):
    index = torch.arange(len(out))
    if len(out) > 1:
        index[:2] = torch.tensor([1, 0])
    return out[index]


@changed
def last_column_is_missing(out):
    return torch.where(torch.arange(out.shape[-1]) == out.shape[-1] - 1, 0, out)


@changed
def heads_swapped(out):
    return out.flip(1) if out.dim() == 3 else out.flip(-1)


@changed
def off_by_one_percent(out):
    return (out.double() * 1.01).to(out.dtype)


def neighbour_row_read(problem):
    def call(inputs):
        name, x = next(iter(inputs.items()))
        return problem.call({**inputs, name: torch.cat([x[:1], x[:-1]]) if len(x) else x})

    return call


def surroundings_read(problem):
    """A product with zero that takes one element too many."""

    def call(inputs):
        outputs = problem.call(inputs)
        x = next(iter(inputs.values()))
        first = x.as_strided((1,), (1,), x.storage_offset() - 1)
        return {k: y + (first * 0).to(y.dtype) for k, y in outputs.items()}

    return call


def special_value_spreads(problem):
    def call(inputs):
        outputs = problem.call(inputs)
        x = next(iter(inputs.values())).float()
        return {k: y + (x * 0).sum().to(y.dtype) for k, y in outputs.items()}

    return call


def inputs_written(problem):
    def call(inputs):
        with torch.no_grad():
            next(iter(inputs.values())).data.fill_(1)
        return problem.call(inputs)

    return call


def gradient_off_by_one_percent(problem):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, dx):
            return dx * 1.1

    return lambda inputs: {k: Wrong.apply(x) for k, x in problem.call(inputs).items()}


FAULTS = (
    one_element_rounded_wrong,
    all_rounded_towards_zero,
    two_rows_swapped,
    last_column_is_missing,
    heads_swapped,
    off_by_one_percent,
    neighbour_row_read,
    surroundings_read,
    special_value_spreads,
    inputs_written,
    gradient_off_by_one_percent,
)


def softmax_scale_off_by_one_percent(problem):
    q = next(iter(problem.inputs))
    return lambda inputs: problem.call({**inputs, q: inputs[q] * 1.01})


def causal_mask_off_by_one(problem):
    def call(inputs):
        wide = {k: x.double() for k, x in inputs.items()}
        outputs = problem.exact(wide, seen=problem.seen(shift=-1))
        actual = problem.call(inputs)
        return {k: x.to(actual[k].dtype) for k, x in outputs.items()}

    return call


def last_key_dropped(problem):
    def call(inputs):
        seen = problem.seen(shift=0)
        seen[:, -1:] = False
        wide = {k: x.double() for k, x in inputs.items()}
        actual = problem.call(inputs)
        return {k: x.to(actual[k].dtype) for k, x in problem.exact(wide, seen=seen).items()}

    return call


ATTENTION_FAULTS = (softmax_scale_off_by_one_percent, causal_mask_off_by_one, last_key_dropped)


@pytest.mark.parametrize(
    ("op", "fault"),
    [(op, fault) for op in OPS for fault in FAULTS]
    + [("varlen_attention", fault) for fault in ATTENTION_FAULTS],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_a_fault_is_reported(op, fault):
    with pytest.raises(AssertionError):
        run_fuzz(op, 300, fault, phases=(Phase.generate,))


# ---- every instruction set ----


@on_each_lesser_instruction_set
def test_fuzz_on_a_lesser_instruction_set(isa):
    rerun(__file__, isa, "not fault and not instruction", KEYE_OPS_FUZZ_EXAMPLES="100")
