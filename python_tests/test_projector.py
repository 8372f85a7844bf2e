"""projector against loops in fp64 and transformers' projectors; gradients; wrong input."""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_within_twice
from torch._dynamo.testing import CompileCounterWithBackend

import keye_ops
from keye_ops import PackedGrid

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FORMS = ["preview", "1.5"]
BATCHES = {
    "images": [(1, 8, 6), (1, 2, 2), (1, 4, 10)],
    "clips": [(3, 4, 4), (2, 2, 6)],
    "one token": [(1, 2, 2)],
    "none": [],
}
HIDDEN, OUT = 12, 20


def make(total, form, dtype=torch.float64, seed=0):
    """x, then weight and bias of the norm, of linear 1 and of linear 2."""
    generator = torch.Generator().manual_seed(seed)
    merged = 4 * HIDDEN
    normed = HIDDEN if form == "preview" else merged
    shapes = [(total, HIDDEN), (normed,), (normed,), (merged, merged), (merged,)]
    shapes += [(OUT, merged), (OUT,)]
    tensors = [torch.randn(x, generator=generator, dtype=torch.float64) for x in shapes]
    return [
        (x / math.sqrt(x.shape[-1]) if i in (3, 5) else x).to(dtype) for i, x in enumerate(tensors)
    ]


def chain(x, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2, grid):
    """Every image by itself, as the model's authors and transformers do it."""
    outputs = [x.new_zeros(0, OUT)]
    for image, (t, h, w) in zip(x.split(grid.image_lengths), grid.grid_thw, strict=True):
        if len(norm_weight) == HIDDEN:
            image = F.layer_norm(image, (HIDDEN,), norm_weight, norm_bias)
        if grid.order == "raster":
            image = image.view(t, h // 2, 2, w // 2, 2, HIDDEN).transpose(2, 3)
        tokens = image.reshape(-1, 4 * HIDDEN)
        if len(norm_weight) != HIDDEN:
            tokens = F.layer_norm(tokens, tokens.shape[1:], norm_weight, norm_bias)
        hidden = F.gelu(tokens @ weight_1.T + bias_1)
        outputs.append(hidden @ weight_2.T + bias_2)
    return torch.cat(outputs)


@pytest.mark.parametrize("order", ["raster", "block"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype, form, batch, order):
    grid = PackedGrid.from_grid_thw(BATCHES[batch], order=order)
    inputs = make(grid.total, form, dtype)
    actual = keye_ops.projector(*inputs, grid)
    exact = chain(*(x.double() for x in inputs), grid)
    assert_within_twice(actual, chain(*inputs, grid), exact)


def test_host_integers_and_eps():
    inputs = make(48, "preview")
    grid = PackedGrid.from_grid_thw([(1, 8, 6)])
    want = keye_ops.projector(*inputs, grid)
    assert torch.equal(keye_ops.projector(*inputs, [(1, 8, 6)]), want)
    assert (keye_ops.projector(*inputs, grid, eps=0.5) - want).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_preview_against_transformers(dtype):
    models = pytest.importorskip("transformers.models.paddleocr_vl.modeling_paddleocr_vl")
    config = models.PaddleOCRVLConfig(
        vision_config={"hidden_size": HIDDEN, "num_attention_heads": 2, "spatial_merge_size": 2},
        text_config={"hidden_size": OUT, "num_hidden_layers": 1},
    )
    module = models.PaddleOCRProjector(config).to(dtype)
    grid = PackedGrid.from_grid_thw(BATCHES["images"] + BATCHES["clips"])
    inputs = make(grid.total, "preview", dtype)
    load(module.pre_norm, *inputs[1:3])
    load(module.linear_1, *inputs[3:5])
    load(module.linear_2, *inputs[5:7])
    with torch.no_grad():
        theirs = module(inputs[0], torch.tensor(grid.grid_thw))
    exact = chain(*(x.double() for x in inputs), grid)
    assert_within_twice(keye_ops.projector(*inputs, grid), theirs, exact)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_order_against_transformers(dtype, form):
    models = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")
    config = models.Qwen3VLVisionConfig(
        hidden_size=HIDDEN, spatial_merge_size=2, out_hidden_size=OUT
    )
    module = models.Qwen3VLVisionPatchMerger(config, use_postshuffle_norm=form == "1.5").to(dtype)
    module.norm.eps = 1e-5
    grid = PackedGrid.from_grid_thw(BATCHES["images"], order="block")
    inputs = make(grid.total, form, dtype)
    load(module.norm, *inputs[1:3])
    load(module.linear_fc1, *inputs[3:5])
    load(module.linear_fc2, *inputs[5:7])
    with torch.no_grad():
        theirs = module(inputs[0])
    exact = chain(*(x.double() for x in inputs), grid)
    assert_within_twice(keye_ops.projector(*inputs, grid), theirs, exact)


def load(module, weight, bias):
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    grid = PackedGrid.from_grid_thw(BATCHES["clips"])
    inputs = [x.requires_grad_() for x in make(grid.total, form)]
    out, want = keye_ops.projector(*inputs, grid), chain(*inputs, grid)
    dout = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator())
    gradients = [torch.autograd.grad(x, inputs, dout) for x in (out, want)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-11)


def test_compile_makes_one_graph_for_all_sizes():
    counter, graphs = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(keye_ops.projector, fullgraph=True, dynamic=True, backend=counter)
    for grid_thw in ([(1, 4, 6)] * 5, [(1, 2, 2), (2, 6, 4)] * 3, [(1, 2, 2)] * 7):
        grid = PackedGrid.from_grid_thw(grid_thw)
        inputs = [x.requires_grad_() for x in make(grid.total, "preview")]
        with keye_ops.backend("auto"):
            out = compiled(*inputs, grid)
        want = chain(*inputs, grid)
        torch.testing.assert_close(out, want)
        gradients = [torch.autograd.grad(x.square().sum(), inputs) for x in (out, want)]
        torch.testing.assert_close(*gradients)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3


class Projector(torch.nn.Module):
    """With its weights as parameters and its grid as a constant."""

    def __init__(self, weights, grid):
        super().__init__()
        self.weights = torch.nn.ParameterList(weights)
        self.grid = grid

    def forward(self, x):
        return keye_ops.projector(x, *self.weights, self.grid)


def test_export():
    grid = PackedGrid.from_grid_thw(BATCHES["images"])
    x, *weights = make(grid.total, "1.5")
    with keye_ops.backend("auto"):
        exported = torch.export.export(Projector(weights, grid), (x,))
    for name in ("merge_norm", "linear_gelu"):
        assert f"keye_ops.{name}" in exported.graph_module.code
    torch.testing.assert_close(exported.module()(x * 2), chain(x * 2, *weights, grid))


@pytest.mark.parametrize(
    ("index", "tensor", "message"),
    [
        (5, torch.ones(OUT, 47), r"projector: linear_2_weight must be \[out, 48\], got \[20, 47\]"),
        (
            5,
            torch.ones(OUT, 48).half(),
            "projector: linear_2_weight must have the dtype and device of x",
        ),
        (6, torch.ones(OUT + 1), r"projector: linear_2_bias must be \[20\], got \[21\]"),
        (6, torch.ones(OUT).half(), "projector: linear_2_bias must have the dtype and device of x"),
        (3, torch.ones(48, 12), r"linear_gelu: weight must be \[N, 48\], got \[48, 12\]"),
        (
            1,
            torch.ones(24),
            r"merge_norm: weight must be \[12\] .* or \[48\] \(after\), got \[24\]",
        ),
        (0, torch.ones(20, HIDDEN), r"merge_norm: x must have the grid's 24 rows, got \[20, 12\]"),
    ],
)
def test_wrong_input(index, tensor, message):
    inputs = make(24, "preview", torch.float32)
    inputs[index] = tensor
    with pytest.raises(RuntimeError, match=message):
        keye_ops.projector(*inputs, [(1, 4, 6)])
