"""What ops tell their fused GEMMs, and when they run torch's; by a stand-in for the GEMMs."""

import runpy

import pytest
import torch
import torch.nn.functional as F
from host_cuda import ROOT, fused_gemms, take_reports, unavailable
from tolerance import assert_within_twice

import keye_ops
from keye_ops import PackedGrid

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@pytest.fixture(autouse=True)
def fused():
    with fused_gemms():
        yield


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def shifted(tensor, by=1):
    """The same values, ``by`` elements behind a multiple of 16 bytes."""
    buffer = tensor.new_empty(tensor.numel() + by)
    return buffer[by:].view_as(tensor).copy_(tensor)


def in_wider_rows(tensor, width):
    wide = tensor.new_full((tensor.shape[0], width), torch.nan)
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


def linear_gelu(x, weight, bias, approximate="none"):
    """The result, held to the rule, and whether a pass followed torch's product."""
    take_reports()
    out = keye_ops.linear_gelu(x, weight, bias, approximate)
    reports = take_reports()
    assert not any(report.findings for report in reports)
    plain = F.gelu(F.linear(x, weight, bias), approximate=approximate)
    wide = F.linear(x.double(), weight.double(), bias.double())
    assert_within_twice(out, plain, F.gelu(wide, approximate=approximate))
    return len(reports) == 0


X, WEIGHT, BIAS = randn(5, 16), randn(24, 16, seed=1) / 4, randn(24, seed=2)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("rows", [1, 5, 130])
def test_linear_gelu_is_fused(rows, approximate):
    assert linear_gelu(randn(rows, 16, seed=3), WEIGHT, BIAS, approximate)


FIT = {
    "rows of x are apart": (in_wider_rows(X, 24), WEIGHT, BIAS),
    "rows of the weight are apart": (X, in_wider_rows(WEIGHT, 40), BIAS),
    "one row, wherever the next would be": (in_wider_rows(X, 17)[:1], WEIGHT, BIAS),
    "every other row": (X[::2], WEIGHT[::3], BIAS[:8]),
    "16 bytes on": (shifted(X, 8), shifted(WEIGHT, 8), shifted(BIAS, 8)),
}


@pytest.mark.parametrize("inputs", FIT.values(), ids=FIT)
def test_linear_gelu_is_fused_where_rows_are_whole_vectors(inputs):
    assert linear_gelu(*inputs)


UNFIT = {
    "K": (X[:, :12], WEIGHT[:, :12], BIAS),
    "N": (X, WEIGHT[:20], BIAS[:20]),
    "fp32": (X.float(), WEIGHT.float(), BIAS.float()),
    "start of x": (shifted(X), WEIGHT, BIAS),
    "start of the weight": (X, shifted(WEIGHT), BIAS),
    "start of the bias": (X, WEIGHT, shifted(BIAS)),
    "row stride of x": (in_wider_rows(X, 20), WEIGHT, BIAS),
    "row stride of the weight": (X, in_wider_rows(WEIGHT, 20), BIAS),
    "one value for all columns of x": (randn(5, 16)[:, :1].expand(5, 16), WEIGHT, BIAS),
    "one value for all columns of the weight": (X, randn(24, 16)[:, :1].expand(24, 16), BIAS),
    "one value for all columns, in one row": (randn(1, 1).expand(1, 16), WEIGHT, BIAS),
    "one row of x for all": (X[:1].expand(5, 16), WEIGHT, BIAS),
    "columns of x": (randn(16, 8).T, WEIGHT, BIAS),
    "columns of the weight": (X, (randn(16, 24) / 4).T, BIAS),
    "strided bias": (X, WEIGHT, randn(24, 8)[:, 0]),
    "one bias for all": (X, WEIGHT, randn(1).expand(24)),
}


@pytest.mark.parametrize("inputs", UNFIT.values(), ids=UNFIT)
def test_linear_gelu_is_not_fused(inputs):
    assert not linear_gelu(*inputs)


def test_the_variable_decides(monkeypatch):
    for value, is_fused in (("torch", False), ("fused", True), ("", True)):
        monkeypatch.setenv("KEYE_OPS_GEMM", value)
        assert linear_gelu(X, WEIGHT, BIAS) is is_fused
        assert patch_embed(PATCHES) is is_fused
    monkeypatch.setenv("KEYE_OPS_GEMM", "cublas")
    with pytest.raises(RuntimeError, match="KEYE_OPS_GEMM must be fused or torch, got cublas"):
        keye_ops.linear_gelu(X, WEIGHT, BIAS)
    take_reports()


def test_gradients_do_not_depend_on_it():
    grads = []
    for op in (keye_ops.linear_gelu, torch.ops.keye_ops.linear_gelu):
        leaves = [tensor.clone().requires_grad_() for tensor in (X, WEIGHT, BIAS)]
        out = op(*leaves)
        grads.append(torch.autograd.grad(out, leaves, torch.ones_like(out)))
    assert all(map(torch.equal, *grads))
    assert all(not report.findings for report in take_reports())


# ---- patch_embed ----

SIZES = [(1, 4, 6), (2, 2, 2)]
PATCHES = randn(32, 3 * 16, seed=4)


def patch_embed(
    pixels, has_bias=True, hidden=24, wide_ids=True, align_corners=False, dtype=torch.bfloat16
):
    """Holds the result to the rule; whether the positions came with the product."""
    grid = PackedGrid.from_grid_thw(SIZES)
    inner = pixels.shape[1]
    weight = (randn(hidden, inner, seed=5) / inner**0.5).to(dtype)
    bias = randn(hidden, seed=6).to(dtype) if has_bias else None
    table = randn(25, hidden, seed=7).to(dtype)
    ids = grid.position_ids.long() if wide_ids else grid.position_ids.int()
    index = (grid.grid, grid.image_offsets, ids, align_corners)
    take_reports()
    out = torch.ops.keye_ops.patch_embed(pixels, weight, bias, table, *index)
    reports = take_reports()
    assert not any(report.findings for report in reports)

    def meaning(*tensors):
        with keye_ops.backend("reference"):
            return keye_ops.patch_embed(*tensors, grid, align_corners=align_corners)

    parameters = (weight, bias, table)
    wide = pixels if pixels.dtype == torch.uint8 else pixels.double()
    exact = [x if x is None else x.double() for x in parameters]
    assert_within_twice(out, meaning(pixels, *parameters), meaning(wide, *exact))
    return not any("position_embedding" in report.traffic for report in reports)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("wide_ids", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_patch_embed_is_fused(has_bias, wide_ids, align_corners):
    assert patch_embed(PATCHES, has_bias, wide_ids=wide_ids, align_corners=align_corners)


PIXELS = {
    "rows apart": in_wider_rows(PATCHES, 56),
    "rows to be padded": randn(32, 3 * 14**2, seed=8),
    "fp32": PATCHES.float(),
    "a start that is packed": shifted(PATCHES),
    "bytes": torch.randint(0, 256, (32, 3 * 14**2), dtype=torch.uint8),
}


@pytest.mark.parametrize("pixels", PIXELS.values(), ids=PIXELS)
def test_patch_embed_is_fused_whatever_the_pixels(pixels):
    assert patch_embed(pixels)


def test_patch_embed_of_fp32_is_not_fused():
    assert not patch_embed(PATCHES.float(), dtype=torch.float32)


@pytest.mark.parametrize("hidden", [8, 136])
def test_patch_embed_of_any_width_is_fused(hidden):
    assert patch_embed(PATCHES, hidden=hidden)


# ---- the headers ----


@pytest.fixture
def setup(monkeypatch):
    """The functions of setup.py, which builds nothing."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setenv("KEYE_OPS_NO_EXT", "1")
    return runpy.run_path(str(ROOT / "setup.py"))


def find_cutlass(setup, folder):
    find = setup["find_cutlass"]
    find.__globals__["find_package"] = {"cutlass_library": folder}.get
    return find()


def test_without_cutlass_gemms_are_those_of_torch(setup, tmp_path):
    for folder in (None, tmp_path):
        include, text = find_cutlass(setup, folder)
        assert include is None
        assert text.startswith("torch's: built without CUTLASS")


@pytest.mark.parametrize(("version", "is_good"), [((4, 2, 0), True), ((4, 1, 9), False)])
def test_cutlass_must_be_new_enough(setup, version, is_good, tmp_path):
    header = tmp_path / "source" / "include" / "cutlass" / "version.h"
    header.parent.mkdir(parents=True)
    parts = zip(("MAJOR", "MINOR", "PATCH"), version, strict=True)
    header.write_text("".join(f"#define CUTLASS_{name} {part}\n" for name, part in parts))
    include, text = find_cutlass(setup, tmp_path)
    assert include == (header.parents[1] if is_good else None)
    assert ".".join(map(str, version)) in text
