"""From pixels to text rows on the CUDA kernels: tower and projector on the host executor."""

import copy

import host_cuda
import pytest
import torch
from model_helpers import make_model, patches
from tolerance import assert_within_twice
from torch.utils._python_dispatch import TorchDispatchMode

import keye_ops
from keye_ops import dispatch

GRIDS = [(1, 4, 6), (2, 2, 4), (1, 2, 2)]
OPS = ("patch_embed", "rope_", "add_layer_norm", "merge_norm", "linear_gelu")

pytestmark = pytest.mark.skipif(
    host_cuda.unavailable() is not None, reason=str(host_cuda.unavailable())
)


def project(model, pixels):
    """Rows for the text model, without gradients."""
    with torch.no_grad():
        grid = model.visual.pack(GRIDS)
        return model.mlp_AR(model.visual(pixels, grid), grid)


@pytest.mark.parametrize("version", ["preview", "1.5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tower_and_projector(version, dtype):
    model = make_model(version, dtype=dtype)
    pixels = patches(GRIDS, dtype=dtype)
    with dispatch.backend("reference"):
        plain = project(model, pixels)
        exact = project(copy.deepcopy(model).double(), pixels.double())
    # Attention in fp32 is left to the reference.
    mode = "auto" if dtype == torch.float32 else "native"
    with host_cuda.host_cuda(), dispatch.backend(mode):
        actual = project(model, pixels)
        reports = host_cuda.take_reports()
        keye_ops.check_errors()
    assert [report.text() for report in reports if report.findings] == []
    half = dtype != torch.float32
    # Pixels, a plan, two layers of rotations, attention, norms and activations; the end of the
    # tower; the projector.
    assert len(reports) >= 1 + 1 + 2 * (1 + half + 2 + 1) + 1 + 2
    for op in OPS + ("varlen_attention",) * half:
        assert keye_ops.last_dispatch(op).implementation == "native"
    assert_within_twice(actual, plain, exact)


class PlanCounter(TorchDispatchMode):
    """Counts the plans of attention."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.keye_ops.varlen_attention_plan.default
        return func(*args, **(kwargs or {}))


def test_layers_share_one_plan():
    model = make_model(dtype=torch.bfloat16)
    with host_cuda.host_cuda(), PlanCounter() as plans:
        project(model, patches(GRIDS, dtype=torch.bfloat16))
    assert plans.count == 1


def test_bytes_become_text_rows():
    """uint8 pixels are normalised by the kernel, as the processor would."""
    model = make_model(dtype=torch.bfloat16)
    total = sum(t * h * w for t, h, w in GRIDS)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (total, 3, 14, 14), dtype=torch.uint8, generator=generator)
    with dispatch.backend("reference"):
        exact = project(copy.deepcopy(model).double(), pixels)
        plain = project(model, pixels)
    with host_cuda.host_cuda():
        actual = project(model, pixels)
    assert_within_twice(actual, plain, exact)
