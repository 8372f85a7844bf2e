"""Every stage of the GPU suite on a CPU: it passes what is right, and sees planted faults."""

from __future__ import annotations

import os
import re
import time

import bench_path  # noqa: F401
import fuzz_cases
import gpu_cases
import gpu_device
import gpu_fuzz
import gpu_graphs
import gpu_large
import gpu_malformed
import gpu_parity
import gpu_pytest
import gpu_repeats
import gpu_sanitizer
import gpu_syncs
import host_cuda
import pytest
import torch
from gpu_runner import Context, NotRun
from tolerance import assert_within_twice

import keye_ops

pytest.importorskip("hypothesis")


def context(name, seconds=60.0):
    return Context(name, "cpu", host_cuda.BUILD, deadline=time.monotonic() + seconds)


def spoiled(change):
    """layer_norm whose results ``change`` changes."""
    right = keye_ops.layer_norm
    return lambda *args, **options: change(right(*args, **options))


def one_value_off(out):
    index = torch.zeros_like(out, dtype=torch.bool).flatten()
    index[out.numel() // 2] = True
    return torch.where(index.view_as(out), out * 1.05 + 0.1, out)


@pytest.mark.parametrize("name", gpu_cases.names())
def test_parity_passes(name):
    found = gpu_parity.run(f"{name}, bf16", context("parity"))
    assert found["problems"] == []
    assert found["cases"] >= 1


def test_parity_sees_one_wrong_value(monkeypatch):
    monkeypatch.setattr(keye_ops, "layer_norm", spoiled(one_value_off))
    # The reference is the same function: only ours may be wrong.
    right = gpu_cases.make("layer_norm", "fp32", "cpu", False)
    plain = right.reference
    monkeypatch.setattr(gpu_cases.Call, "reference", lambda call, dtype=None: plain(dtype))
    monkeypatch.setattr(right, "function", lambda **x: torch.nn.functional.layer_norm(
        x["x"], (72,), x["weight"], x["bias"], 1e-6))  # fmt: skip
    found = gpu_parity.run("layer_norm, fp32", context("parity"))
    assert any(problem.startswith("result 0: error") for problem in found["problems"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rule_on_the_device_is_that_of_the_tests(dtype):
    generator = torch.Generator().manual_seed(0)
    verdicts = []
    for size in range(200):
        exact = torch.randn(1 + size, generator=generator, dtype=torch.float64)
        if size % 10 == 3:
            exact[0] = [torch.nan, torch.inf, -torch.inf][size % 3]
        plain = (exact * (1 + 1e-3 * torch.randn(exact.shape, generator=generator))).to(dtype)
        noise = 10.0 ** (size % 5 - 4) * torch.randn(exact.shape, generator=generator)
        actual = (exact * (1 + noise)).to(dtype)
        if size % 10 == 7:
            actual[-1] = torch.nan
        try:
            assert_within_twice(actual, plain, exact)
            wrong = False
        except AssertionError:
            wrong = True
        assert (gpu_parity.within_twice(actual, plain, exact) is not None) == wrong, size
        verdicts.append(wrong)
    assert 20 < sum(verdicts) < 180
    x = torch.ones(2, 3)
    assert gpu_parity.within_twice(x, x.double(), x.double()).startswith("dtype")
    assert gpu_parity.within_twice(x, x[:1], x.double()).startswith("shape")
    assert gpu_parity.within_twice(x, x, x) == "exact must be fp64, got torch.float32"


def test_repeats_see_what_changes(monkeypatch):
    monkeypatch.setattr(gpu_repeats, "REPEATS", 30)
    found = gpu_repeats.run("layer_norm, fp32", context("repeats"))
    assert (found["problems"], found["facts"]["repeats"]) == ([], 30)
    calls = []

    def sometimes(out):
        calls.append(1)
        return one_value_off(out) if len(calls) == 17 else out

    monkeypatch.setattr(keye_ops, "layer_norm", spoiled(sometimes))
    found = gpu_repeats.run("layer_norm, fp32", context("repeats"))
    assert found["problems"][0] == "result 0 differs in 1 of 30 repeats"


def test_repeats_end_with_their_share_of_the_time(monkeypatch):
    monkeypatch.setattr(gpu_repeats, "REPEATS", 10**9)
    own = context("repeats", seconds=4)
    own.rest = 8
    begin = time.monotonic()
    found = gpu_repeats.run("layer_norm, fp32", own)
    assert 0.5 < time.monotonic() - begin < 3
    assert found["facts"]["repeats"] % 50 == 0


def test_an_op_without_a_kernel_is_no_evidence(monkeypatch):
    monkeypatch.setattr(gpu_device, "has_kernel", lambda op, context: op != "add_layer_norm")
    for module in (gpu_repeats, gpu_graphs, gpu_syncs):
        with pytest.raises(NotRun, match="add_layer_norm has no kernel for cpu: its reference"):
            module.run("layer_norm, bf16", context("any"))
    found = gpu_parity.run("layer_norm, bf16", context("parity"))
    assert found["facts"]["implementation"] == "reference: no CUDA kernel"


@pytest.mark.parametrize("name", gpu_cases.names())
def test_graphs_pass(name):
    found = gpu_graphs.run(f"{name}, bf16", context("graphs"))
    assert found["problems"] == []


def test_graphs_see_a_replay_of_old_values(monkeypatch):
    def capture(function, device):
        outputs = tuple(x.detach().clone() for x in function())
        kept = [x.clone() for x in outputs]

        def replay():
            for output, value in zip(outputs, kept, strict=True):
                output.copy_(value)

        return outputs, replay

    monkeypatch.setattr(gpu_device, "capture", capture)
    for name in ("rope_2d", "merge_norm"):
        found = gpu_graphs.run(f"{name}, bf16", context("graphs"))
        assert found["problems"][0] == "result 0 of replay 1 is not that of a call"


def test_graphs_see_a_replay_that_keeps_old_positions(monkeypatch):
    real = keye_ops.rope_2d

    def with_old_positions(q, k, positions):
        kept.setdefault("positions", positions.clone())
        return real(q, k, kept["positions"] if capturing else positions)

    kept, capturing = {}, []
    capture = gpu_device.capture

    def stale(function, device):
        outputs, replay = capture(function, device)

        def replay_stale():
            capturing.append(1)
            replay()
            capturing.clear()

        return outputs, replay_stale

    monkeypatch.setattr(keye_ops, "rope_2d", with_old_positions)
    monkeypatch.setattr(gpu_device, "capture", stale)
    assert gpu_graphs.run("rope_2d, bf16", context("graphs"))["problems"]


def test_fuzz_passes_and_sees_faults(monkeypatch):
    monkeypatch.setattr(gpu_fuzz, "_CHUNK", 40)
    deadline = time.monotonic() + 60
    for op in ("rope", "merge_norm", "patch_embed"):
        found = gpu_fuzz.fuzz(op, 40, 0, deadline, context("fuzz"))
        facts = found["facts"][op]
        assert (found["problems"], found["cases"]) == ([], 40)
        assert facts["native"] > 20
        assert facts["seeds"] == [0, 0]

    def wrong(outs):
        return (outs[0] * 1.02, *outs[1:])

    found = gpu_fuzz.fuzz("rope", 400, 0, deadline, context("fuzz"), wrong)
    assert 1 <= len(found["problems"]) <= 4
    assert re.search(r"out_q: .*; seed 0: \{", found["problems"][0])


def test_fuzz_sees_inputs_that_are_written(monkeypatch):
    real = keye_ops.layer_norm

    def writes(x, *args, **options):
        out = real(x, *args, **options)
        with torch.no_grad():
            x.detach().view(-1)[:1].add_(1)
        return out

    monkeypatch.setattr(keye_ops, "layer_norm", writes)
    x = torch.randn(3, 8)[:, 1:]
    with pytest.raises(AssertionError, match="layer_norm wrote to memory of its inputs"):
        gpu_fuzz.OnDevice("cpu").layer_norm(x[1:].clone(), torch.ones(7), torch.zeros(7))


def test_moved_tensors_keep_strides_offsets_surroundings_and_gradients():
    base = torch.randn(100)
    x = base.as_strided((3, 4), (20, 2), 5).requires_grad_()
    kept = []
    y = gpu_fuzz.Move.apply(x, "cpu", kept)
    assert y.stride() == x.stride()
    assert y.storage_offset() == 5
    assert torch.equal(kept[0][1], base)
    assert y.data_ptr() != x.data_ptr()
    (y * 2).sum().backward()
    assert torch.equal(x.grad, torch.full((3, 4), 2.0))


def test_fuzz_beside_itself(monkeypatch):
    some = ("rope", "merge_norm")
    monkeypatch.setattr(fuzz_cases, "OPS", {op: fuzz_cases.OPS[op] for op in some})
    monkeypatch.setattr(gpu_fuzz, "PROBLEMS", 60)
    found = gpu_fuzz.side_by_side(context("fuzz", seconds=90))
    assert found["problems"] == []
    assert found["cases"] >= 60
    assert set(found["facts"]["ops"]) == set(some)


def test_a_worker_that_dies_is_a_problem():
    found = gpu_fuzz._result(("rope", 3), "", "last words", -11, late=False)
    assert found["problems"] == ["rope, seed 3: exit status -11: last words"]
    found = gpu_fuzz._result(("rope", 3), "", "", -9, late=True)
    assert found["problems"] == ["rope, seed 3: did not end in time"]


@pytest.mark.parametrize("fault", gpu_malformed.FAULTS, ids=lambda fault: fault.label)
def test_every_malformed_value_is_one(fault):
    """On the CPU, where the host looks and raises."""
    found = gpu_malformed.run(fault.label, context("malformed"))
    assert found["problems"] == []
    assert found["facts"]["error"][0].startswith(
        fault.case.split()[0].split("_2d")[0].split("_3d")[0]
    )


def test_malformed_values_that_nobody_reports(monkeypatch):
    real = keye_ops.rope_2d
    monkeypatch.setattr(keye_ops, "rope_2d", lambda q, k, p: real(q, k, p.clamp(0, 99)))
    found = gpu_malformed.run("rope_2d, positions negative", context("malformed"))
    assert found["problems"] == ["nothing was reported"]
    assert gpu_malformed.complaints(["merge_norm: it must, got 1"], "rope_") == [
        "not an error of rope_: merge_norm: it must, got 1"
    ]


def test_syncs_pass_and_see_a_wait(monkeypatch):
    for item in ("rope_2d, bf16", *gpu_syncs.items(context("syncs"))[:6]):
        assert gpu_syncs.run(item, context("syncs"))["problems"] == []

    class Raises:
        def __enter__(self):
            raise RuntimeError("called a synchronizing CUDA operation")

        def __exit__(self, *args):
            pass

    monkeypatch.setattr(gpu_device, "no_syncs", lambda device: Raises())
    for item in ("rope_2d, bf16", "tower", "tower with gradients"):
        found = gpu_syncs.run(item, context("syncs"))
        assert found["problems"] == ["called a synchronizing CUDA operation"]


@pytest.mark.parametrize("item", gpu_large.items(None))
def test_large_passes_and_sees_a_row_that_overflowed(item, monkeypatch):
    found = gpu_large.run(item, context("large"))
    assert found["problems"] == []
    assert found["cases"] == 4
    op, make, copies = gpu_large.OPS[item]

    def overflowing(elements, device):
        total, apply, exact = make(elements, device)

        def spoiled(rows):
            out = tuple(x.clone() for x in apply(rows))
            if rows == slice(None):
                out[0][-4:] = 0
            return out

        return total, spoiled, exact

    monkeypatch.setitem(gpu_large.OPS, item, (op, overflowing, copies))
    found = gpu_large.run(item, context("large"))
    assert found["problems"][-1].startswith("result 0, rows ")


def test_large_rows_lie_where_offsets_overflow():
    elements = gpu_large.LIMIT + gpu_large.LIMIT // 64
    total = elements // 1152 // 4 * 4
    _, half, border, end = gpu_large.around(total, elements)
    assert half.start * 1152 < gpu_large.LIMIT / 2 < half.stop * 1152 + 1152 * 8  # in bytes of bf16
    assert border.start * 1152 < gpu_large.LIMIT < border.stop * 1152
    assert end.stop == total


def test_large_says_how_much_memory_it_needs(monkeypatch):
    monkeypatch.setattr(gpu_device, "free_bytes", lambda device: 2**27)
    with pytest.raises(NotRun, match="needs 0 GB, 0 are free"):
        gpu_large.run("rope", context("large"))


def test_failures_of_pytest_are_problems(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_pytest, "TESTS", tmp_path)
    source = "import pytest\n@pytest.fixture(params=['cpu', 'cuda', 'host_cuda'])\n"
    source += "def device(request):\n    return request.param\n"
    source += "def test_good(device):\n    assert device == 'cpu'\n"
    source += "def test_bad(device):\n    assert device == 'something else'\n"
    (tmp_path / "test_some.py").write_text(source)
    (tmp_path / "test_others.py").write_text("def test_it():\n    pass\n")
    assert gpu_pytest.items(context("tests")) == ["test_some.py"]
    found = gpu_pytest.run("test_some.py", context("tests"))
    assert found["cases"] == 2
    [problem] = found["problems"]
    assert problem.startswith("test_bad[cpu]: AssertionError")
    (tmp_path / "test_some.py").write_text("import nonsense_module\n")
    assert gpu_pytest.run("test_some.py", context("tests"))["problems"]


def test_verdicts_of_the_sanitizer():
    clean = "========= COMPUTE-SANITIZER\nRAN rope\n========= ERROR SUMMARY: 0 errors\n"
    assert gpu_sanitizer.verdict(0, clean, 1) == []
    fault = "========= Invalid __global__ write of size 4 bytes\n=========     at fault\n"
    assert gpu_sanitizer.verdict(77, fault, 1)[0].startswith("========= Invalid __global__ write")
    assert gpu_sanitizer.verdict(77, "x", 1) == ["x"]
    assert gpu_sanitizer.verdict(1, "Device not supported", 0)[0].startswith("exit status 1")
    assert gpu_sanitizer.verdict(0, "", 0)  # nothing ran


@pytest.fixture
def sanitizer(tmp_path, monkeypatch):
    """Programs in place of compute-sanitizer and of nvcc."""

    def make(script):
        for name, text in (
            ("compute-sanitizer", script),
            ("nvcc", 'while [ "$1" != -o ]; do shift; done; touch "$2"; chmod +x "$2"'),
        ):
            path = tmp_path / name
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(gpu_sanitizer, "_sound", set())

    return make


def test_a_sanitizer_that_sees_planted_faults_is_used(sanitizer):
    sanitizer(
        'case "$*" in *_good) exit 0;; */memcheck | */racecheck) exit 77;; *) echo RAN all;; esac'
    )
    found = gpu_sanitizer.run(gpu_sanitizer.PLANTED, context("sanitizer"))
    assert found["facts"] == {"see their faults": ["memcheck", "racecheck"]}
    assert gpu_sanitizer.run("memcheck of ops", context("sanitizer"))["problems"] == []


@pytest.mark.parametrize("script", ["exit 0", "exit 77", "echo Device not supported; exit 1"])
def test_a_sanitizer_that_misses_them_is_not(sanitizer, script):
    sanitizer(script)
    with pytest.raises(NotRun, match="does not work here"):
        gpu_sanitizer.run(gpu_sanitizer.PLANTED, context("sanitizer"))
    with pytest.raises(NotRun, match="does not work here: racecheck misses a planted fault"):
        gpu_sanitizer.run("racecheck of ops", context("sanitizer"))
