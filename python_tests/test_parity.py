"""keye-ops parity: every row within its tolerance, and planted faults caught."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import sys

import pytest
import torch

import keye_ops
from keye_ops import dispatch, model, parity, parity_oracles, processing
from keye_ops.cli import main
from keye_ops.dispatch import has_kernel
from keye_ops.parity import Comparison, compare, relative_error
from keye_ops.parity_oracles import COMPARISONS

pytest.importorskip("transformers")
pytest.importorskip("PIL")

# The dispatcher's names of the ops behind a row.
OPS = {
    "patch_embed": {"patch_embed"},
    "rope_2d": {"rope"},
    "rope_3d": {"rope"},
    "varlen_attention": {"varlen_attention"},
    "projector": {"merge_norm", "linear_gelu"},
    "tower": {"patch_embed", "add_layer_norm", "linear_gelu", "rope_", "varlen_attention"},
    "text attention": {"rope_", "varlen_attention"},
    "text logits": {"add_rms_norm", "rope_", "varlen_attention"},
    "patches": set(),
    "rope index": set(),
}
needs_rope = pytest.mark.skipif(not has_kernel("rope", "cpu"), reason="no native library")


@pytest.fixture(scope="module")
def report():
    """Exit status and JSON of one run of the command."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = main(["parity", "--json"])
    return status, json.loads(out.getvalue())


def rows_of(op):
    rows = tuple(c for c in COMPARISONS if c.op == op)
    assert rows
    return rows


@pytest.mark.parametrize("index", range(len(COMPARISONS)), ids=lambda i: COMPARISONS[i].op)
def test_row_is_within_its_tolerance(report, index):
    comparison, row = COMPARISONS[index], report[1]["comparisons"][index]
    assert (row["op"], row["oracle"]) == (comparison.op, comparison.oracle)
    assert row["tolerance"] == comparison.tolerance <= 1e-5
    assert row["reference_error"] <= comparison.tolerance
    ran = {op for op in OPS[comparison.op.split(",")[0]] if has_kernel(op, "cpu")}
    assert set(row["native_ops"]) == ran
    if ran:
        assert row["native_error"] <= comparison.tolerance
    else:
        assert row["native_error"] is None
    assert row["passed"] is True


def test_command_passes_and_tells_versions(report):
    status, facts = report
    assert status == 0
    assert len(facts["comparisons"]) == len(COMPARISONS)
    assert facts["torch"] == torch.__version__
    assert facts["transformers"] == sys.modules["transformers"].__version__


def test_table(monkeypatch, capsys):
    monkeypatch.setattr(parity_oracles, "COMPARISONS", rows_of("rope_2d") + rows_of("patches, 1.5"))
    assert main(["parity"]) == 0
    out, err = capsys.readouterr()
    assert "2 of 2 comparisons are within their tolerance." in out
    assert "1.0e-06" in out
    assert out.count(" ok ") == 2
    assert "FAILED" not in out
    assert "parity" in err  # the progress bar


# ---- planted faults ----


def result_of(change):
    return lambda function: lambda *args, **kwargs: change(function(*args, **kwargs))


def option(**changes):
    return lambda function: lambda *args, **kwargs: function(*args, **(kwargs | changes))


def last_bit(patches):
    pixel_values = patches.pixel_values.clone()
    pixel_values[-1, 2, 13, 13] = torch.nextafter(pixel_values[-1, 2, 13, 13], torch.tensor(2.0))
    return patches._replace(pixel_values=pixel_values)


def swapped_positions(function):
    return lambda q, k, position_ids, **options: function(q, k, position_ids.flip(1), **options)


NO_NORM = {"q_norm_weight": None, "k_norm_weight": None}
FAULTS = {
    "rope base": (keye_ops, "rope_2d", option(theta=10001.0), "rope_2d"),
    "rows and columns": (keye_ops, "rope_2d", swapped_positions, "rope_2d"),
    "sections": (keye_ops, "rope_3d", option(mrope_section=(24, 16, 24)), "rope_3d, chunked"),
    "chunked": (keye_ops, "rope_3d", option(mrope_interleaved=False), "rope_3d, interleaved"),
    "norm eps": (keye_ops, "rope_3d", option(norm_eps=1e-5), "rope_3d, norm"),
    "corners": (keye_ops, "patch_embed", option(align_corners=True), "patch_embed"),
    "not causal": (keye_ops, "varlen_attention", option(causal=False), "varlen_attention, causal"),
    "scale": (keye_ops, "varlen_attention", option(softmax_scale=0.1), "varlen_attention"),
    "rows": (keye_ops, "projector", result_of(lambda x: x.roll(1, 0)), "projector, Preview"),
    "projector eps": (keye_ops, "projector", option(eps=1e-4), "projector, 1.5"),
    "tower rope": (keye_ops, "rope_2d_", option(theta=9000.0), "tower, images"),
    "no text norm": (keye_ops, "rope_3d_", option(**NO_NORM), "text attention"),
    "text sections": (keye_ops, "rope_3d_", option(mrope_section=(6, 4, 6)), "text logits, mrope"),
    "last bit": (processing, "process_image", result_of(last_bit), "patches, Preview"),
    "index": (model, "get_rope_index", result_of(lambda x: (x[0] + 1, x[1])), "rope index, 1.5"),
    "NaN": (keye_ops, "rope_2d", result_of(lambda x: (x[0], x[1] * torch.nan)), "rope_2d"),
    "shape": (keye_ops, "rope_2d", result_of(lambda x: (x[0], x[1][:, :1])), "rope_2d"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name, monkeypatch, capsys):
    where, function, fault, op = FAULTS[name]
    monkeypatch.setattr(parity_oracles, "COMPARISONS", rows_of(op))
    monkeypatch.setattr(where, function, fault(getattr(where, function)))
    assert main(["parity"]) == 1
    out = capsys.readouterr().out
    assert f"0 of {len(rows_of(op))} comparisons" in out
    assert "FAILED" in out


@needs_rope
def test_fault_of_a_kernel_alone_is_caught(monkeypatch):
    call = dispatch.call
    monkeypatch.setattr(dispatch, "call", lambda *args: [x * 1.00001 for x in call(*args)])
    (row,) = rows_of("rope_2d")
    result = compare(row)
    assert result.reference_error <= row.tolerance < result.native_error
    assert not result.passed


@needs_rope
def test_fault_of_a_reference_alone_is_caught(monkeypatch):
    module = importlib.import_module("keye_ops.rope")
    reference = module.rope_reference
    monkeypatch.setattr(module, "rope_reference", lambda *args: reference(*args)[::-1])
    (row,) = rows_of("rope_2d")
    result = compare(row)
    assert result.native_error <= row.tolerance < result.reference_error
    assert not result.passed


# ---- the parts ----


def test_relative_error():
    want = torch.tensor([2.0, -4.0])
    assert relative_error(want, want) == 0
    assert relative_error(torch.tensor([2.0, -3.0]), want) == 0.25
    assert relative_error([want, torch.tensor([1.0])], [want, torch.tensor([2.0])]) == 0.5
    assert relative_error(want[:1], want) == math.inf
    assert relative_error(want[None], want) == math.inf
    assert math.isnan(relative_error([torch.tensor([torch.nan]), want], [want[:1], want + 1]))
    assert relative_error(torch.tensor([7]), torch.tensor([8])) == 0.125


def test_both_runs_see_the_same_input_and_leave_the_generator_alone():
    seen = []

    def error():
        seen.append(torch.randn(5))
        return 0.0

    before = torch.get_rng_state()
    result = compare(Comparison("op", "oracle", 0.0, error))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(seen) == 2
    assert torch.equal(*seen)
    assert result.native_error is None
    assert result.passed


def test_missing_transformers_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers.models.paddleocr_vl", None)
    assert main(["parity"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("keye-ops parity: ")
    assert err.count("\n") == 1
    assert 'pip install "keye-ops[test]"' in err
    with pytest.raises(ImportError, match="parity needs transformers: pip install"):
        parity.transformers_module("no_such_model")
