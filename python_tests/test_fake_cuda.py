"""The CUDA path without a GPU: shapes, strides and devices of results on fake tensors of cuda."""

from __future__ import annotations

import bench_path  # noqa: F401
import gpu_cases
import pytest
import torch
from fake_cuda import fake_cuda, unavailable

from keye_ops import dispatch

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
NAMES = gpu_cases.names()
# Made of several ops, so that its gradients are those of no single node.
COMPOSITES = ("projector",)
# Widths that kernels of the CPU take, and those of a GPU leave to the reference.
ODD = ("patch_embed odd", "add_layer_norm odd", "linear_gelu odd")
IN_GRAPHS = [n for n in NAMES if n not in ("rope_2d in place", *ODD)]


def described(tensors):
    return [None if x is None else (x.shape, x.dtype, x.stride()) for x in tensors]


def outputs_and_gradients(name, dtype, device):
    """By calling the op's own node of the graph: the engine would ask for a GPU."""
    call = gpu_cases.make(name, dtype, device, big=False)
    if not call.gradients:
        return call.outputs(), []
    outputs = call.outputs({k: x.detach().requires_grad_() for k, x in call.leaves.items()})
    if name in COMPOSITES:
        return outputs, []
    wanted = [x for x in outputs if x.requires_grad]
    node = wanted[0].grad_fn
    # Of an op's results some are kept inside, or have no gradient.
    douts = [None] * len(node._input_metadata)
    for x in wanted:
        douts[x.output_nr] = torch.ones_like(x)
    with torch.no_grad():
        return outputs, list(node.apply(*douts))


@pytest.mark.parametrize("dtype", gpu_cases.DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_results_and_gradients_are_as_on_the_cpu(name, dtype):
    if name.startswith("varlen_attention") and dtype == "fp32":
        pytest.skip("the reference, which runs, reads offsets on the host")
    want, want_grads = outputs_and_gradients(name, dtype, "cpu")
    with fake_cuda():
        if name in ODD:
            with torch.no_grad():
                gpu_cases.make(name, dtype, "cuda", big=False).outputs()
            if "on cuda" in (reason := dispatch.last_dispatch().reason):
                pytest.skip(reason)
        got, grads = outputs_and_gradients(name, dtype, "cuda")
        last = dispatch.last_dispatch()
    assert (last.implementation, last.device) == ("native", "cuda")
    assert described(got) == described(want)
    assert described(grads) == described(want_grads)
    assert grads or name in (*COMPOSITES, "rope_2d in place") or name.startswith("patchify")
    for x in (*got, *grads):
        assert x is None or x.device == torch.device("cuda", 0)


def test_a_planted_difference_is_caught():
    want, _ = outputs_and_gradients("rope_2d", "bf16", "cpu")
    with fake_cuda():
        got, _ = outputs_and_gradients("rope_2d", "fp32", "cuda")
        turned = [x.transpose(0, 1) for x in outputs_and_gradients("rope_2d", "bf16", "cuda")[0]]
    assert described(got) != described(want)
    assert described(turned) != described(want)


# References that read values on the host: offsets, or the largest weight of a filter.
READS_VALUES = ("varlen_attention", "patchify")


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith(READS_VALUES)])
def test_references_stay_on_the_device(name):
    """The fallback of an op without a kernel."""
    call = gpu_cases.make(name, "fp32", "cpu", big=False)
    want = call.outputs()
    with fake_cuda(native=False), dispatch.backend("reference"), torch.no_grad():
        got = gpu_cases.make(name, "fp32", "cuda", big=False).outputs()
    assert described(got) == described(want)
    assert {x.device for x in got} == {torch.device("cuda", 0)}


class Module(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, leaves):
        return self.call.outputs(leaves)


@pytest.mark.parametrize("name", [n for n in IN_GRAPHS if not n.startswith("patchify")])
def test_export(name):
    want = gpu_cases.make(name, "bf16", "cpu", big=False).outputs()
    with fake_cuda(), torch.no_grad():
        call = gpu_cases.make(name, "bf16", "cuda", big=False)
        program = torch.export.export(Module(call), (call.leaves,), strict=False)
    ops = [node for node in program.graph.nodes if "keye_ops" in str(node.target)]
    assert ops
    results = [node.meta["val"] for node in program.graph.output_node().args[0]]
    assert described(results) == described(want)
    assert {x.device for x in results} == {torch.device("cuda", 0)}


@pytest.mark.parametrize("name", IN_GRAPHS)
def test_compile_makes_one_graph(name):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    want = gpu_cases.make(name, "bf16", "cpu", big=False).outputs()
    with fake_cuda(), torch.no_grad():
        call = gpu_cases.make(name, "bf16", "cuda", big=False)
        got = torch.compile(call.outputs, fullgraph=True, backend=backend)(call.leaves)
    assert len(graphs) == 1
    assert any("keye_ops" in str(node.target) for node in graphs[0].graph.nodes)
    assert described(got) == described(want)
    assert {x.device for x in got} == {torch.device("cuda", 0)}
