"""The benchmarks: their arithmetic, their files, and that providers of a case do the same work."""

from __future__ import annotations

import csv
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import keye_ops
from keye_ops.bench_command import bench_module
from keye_ops.cli import main

pytest.importorskip("tqdm")
pytest.importorskip("rich")

harness, report, results, suite = map(bench_module, ("harness", "report", "results", "suite"))
ROOT = Path(__file__).resolve().parent.parent
OPS = {"rope", "patch_embed", "merge_norm", "linear_gelu", "projector", "varlen_attention"}
OPS |= {"add_layer_norm", "add_rms_norm", "patchify", "vision_tower"}
TINY = {
    "image 378²": [(1, 3, 3)],
    "image 392²": [(1, 4, 4)],
    "1-megapixel image": [(1, 6, 8)],
    "64 thumbnails": [(1, 4, 2)] * 3,
    "60-frame clip": [(3, 4, 2)],
    "1000-frame clip": [(4, 2, 2)],
}
QUICK = harness.Settings(quick=True, rounds=1, layers=1)


# ---- statistics ----


def test_spread_is_median_and_20th_and_80th_percentile():
    assert harness.spread([3.0, 1.0, 2.0, 5.0, 4.0]) == (3.0, 2.0, 4.0)
    assert harness.spread(range(1, 11)) == (5.5, 3, 8)
    assert harness.spread([7.0]) == (7.0, 7.0, 7.0)


def test_rounds_are_interleaved_and_slow_providers_take_part_in_fewer():
    calls = []

    def provider(name, seconds):
        def call():
            calls.append(name)
            time.sleep(seconds)

        return call

    providers = {"quick": provider("quick", 0.0), "slow": provider("slow", 0.02)}
    settings = replace(QUICK, rounds=10, seconds=0.07)
    measured = harness.measure(providers, settings)
    assert len(measured.times["quick"]) == 10
    assert len(measured.times["slow"]) in (2, 3)
    assert min(measured.times["slow"]) >= 20
    timed = calls[4:]  # two calls of each before
    places = [place for place, name in enumerate(timed) if name == "slow"]
    assert max(places) - min(places) >= 4, timed


def test_a_provider_that_fails_or_is_too_slow_is_skipped_with_its_reason(monkeypatch):
    monkeypatch.setattr(harness, "_CALL_LIMIT", 0.01)
    providers = {
        "good": lambda: None,
        "broken": lambda: torch.zeros(2) @ torch.zeros(3),
        "slow": lambda: time.sleep(0.02),
    }
    measured = harness.measure(providers, QUICK)
    assert list(measured.times) == ["good"]
    assert measured.failed["broken"].startswith("failed: RuntimeError: ")
    assert measured.failed["slow"] == "one call takes 0 s"


def test_memory_of_a_call_is_its_peak():
    def call():
        large = torch.ones(200 << 18)  # 200 MB
        del large
        return torch.ones(50 << 18)

    peak = harness.peak_bytes(call, "cpu")
    if peak is None:
        pytest.skip("this system does not tell")
    assert 190e6 < peak < 300e6
    buffer = torch.ones(200 << 18)
    assert harness.peak_bytes(lambda: buffer.add_(1), "cpu") < 20e6


def test_a_provider_that_would_not_fit_is_skipped():
    provider = harness.if_it_fits(1.0, print)
    assert provider is print
    assert harness.if_it_fits(1e15, print) == harness.Skip("needs 1000000 GB of memory")


def test_percent_of_limit_takes_the_nearer_of_both_limits():
    case = attention_case()
    limits = harness.Limits(copy=1.0, gemm={"bfloat16": 1000.0})
    computing = case.flops / 1000.0 / 1e6
    assert limits.milliseconds(case) == (computing, "gemm")
    moving = replace(case, flops=0)
    assert limits.milliseconds(moving) == (case.num_bytes / 1e6, "copy")
    assert limits.milliseconds(moving, copy=2.0) == (case.num_bytes / 2e6, "copy")


def test_limits_are_measured():
    limits = harness.Limits.measure([torch.bfloat16], QUICK)
    assert 0.1 < limits.copy < 1e4
    assert limits.gemm.keys() == {"bfloat16"}
    assert 0.1 < limits.gemm["bfloat16"] < 1e6


# ---- formulas ----


def attention_case():
    cases = suite.script("varlen_attention").cases(QUICK)
    return next(case for case in cases if case.headline)


def test_attention_flops_are_two_products_a_segment_at_the_true_head_dim():
    assert harness.attention_flops([10], 16, 72) == 2 * 2 * 10 * 10 * 16 * 72
    assert harness.attention_flops([10, 30], 1, 8) == 4 * (100 + 900) * 8
    assert harness.attention_flops([10], 2, 8, causal=True) == 4 * 100 * 16 // 2
    assert harness.attention_flops([10], 2, 8, mode="full") == 4 * 100 * 16 * 7 // 2
    assert attention_case().flops == 4 * 5184**2 * 16 * 72


def test_linear_flops():
    assert harness.linear_flops(2, 3, 5) == 60
    assert harness.linear_flops(2, 3, 5, "full") == 180


def test_flops_and_parameters_of_the_tower_are_those_of_its_layers():
    script = suite.script("vision_tower")
    lengths = [6, 4]
    with torch.device("meta"):
        tower = keye_ops.model.VisionTower(
            keye_ops.model.VisionConfig(1152, 4304, 2, 16, 384, "frame")
        )
    assert script.parameters(2) == sum(p.numel() for p in tower.parameters())
    linears = [m for m in tower.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    products = sum(2 * 10 * m.weight.numel() for m in linears)
    attention = 2 * harness.attention_flops(lengths, 16, 72)
    assert script.tower_flops(lengths, 2) == products + attention


def test_bytes_of_rope_and_merge_norm_are_one_read_and_one_write():
    [rope] = [case for case in suite.script("rope").cases(QUICK) if case.headline]
    assert rope.num_bytes == 2 * 2 * (5184 * 16 * 72 * 2)  # q and k, read and written, bf16
    [norm] = [case for case in suite.script("merge_norm").cases(QUICK) if case.headline]
    assert norm.num_bytes == 2 * (5184 * 1152 * 2)


# ---- cases ----


def test_every_op_has_a_script_a_headline_and_quick_cases():
    assert set(suite.ops()) == OPS == set(report.OPS)
    for op in OPS:
        cases = suite.script(op).cases(harness.Settings())
        assert [case.op for case in cases] == [op] * len(cases)
        assert sum(case.headline for case in cases) == 1, op
        assert any(case.quick for case in cases), op
        assert all(case.quick for case in cases if case.headline and op != "vision_tower"), op
        keys = [(case.shape, case.dtype, case.mode) for case in cases]
        assert len(keys) == len(set(keys))
        assert all(case.num_bytes > 0 for case in cases)


def test_the_shapes_are_those_of_the_model():
    assert [harness.patches(name) for name in harness.SHAPES] == [
        *(729, 784, 5184, 64 * 256, 60 * 320, 1000 * 192)
    ]
    assert harness.frame_lengths("60-frame clip") == [320] * 60
    texts = {case.size for case in suite.script("varlen_attention").cases(QUICK)}
    assert texts >= {1024, 32768}


@pytest.fixture
def tiny(monkeypatch):
    """Small sizes under the same names."""
    for name, grids in TINY.items():
        monkeypatch.setitem(harness.SHAPES, name, grids)
    for op, constants in {
        "linear_gelu": {"MERGED": 64},
        "vision_tower": {"THUMBNAILS": (1, 3)},
        "varlen_attention": {"TEXT": (24,)},
        "rope": {"TEXT": (24,)},
        "add_rms_norm": {"TEXT": (24,)},
        "patchify": {"SIZES": {"1080p image": ((2, 40, 90), (28, 56))}},
    }.items():
        for name, value in constants.items():
            monkeypatch.setattr(suite.script(op), name, value)


@pytest.mark.parametrize("op", sorted(OPS))
def test_providers_do_the_same_work(op, tiny):
    """A peer that computed less would be an unfair one."""
    cases = suite.script(op).cases(QUICK)
    dtypes = (torch.bfloat16, torch.uint8)
    groups = {(case.group, case.mode): case for case in cases if case.dtype in dtypes}
    if op in ("varlen_attention", "patch_embed", "projector"):  # whose peers depend on the shape
        groups |= {case.shape: case for case in cases if case.dtype == torch.bfloat16}
        groups |= {(case.shape, case.mode): case for case in cases if case.mode == "full"}
    compared = 0
    for case in groups.values():
        with torch.inference_mode() if case.mode == "forward" else torch.enable_grad():
            workload = case.build()
            providers = {
                name: provider
                for role, name, provider in workload.providers()
                if role != "yardstick" and not isinstance(provider, harness.Skip)
            }
            want = outputs(providers.pop("eager"))
            for name, provider in providers.items():
                if "in place" in name or "uint8" in name:
                    continue
                compared += 1
                for one, wanted in zip(outputs(provider), want, strict=True):
                    assert one.shape == wanted.shape, (case.shape, name)
                    error = (one.float() - wanted.float()).abs().max()
                    assert error <= 0.05 * wanted.float().abs().max(), (case.shape, name)
    native = op != "add_layer_norm" or hasattr(keye_ops, "add_layer_norm")
    assert compared or not native


def test_add_layer_norm_is_timed_on_what_eager_computes(tiny):
    for case in suite.script("add_layer_norm").cases(QUICK):
        workload = case.build()
        got, want = outputs(workload.ours["keye_ops"]), outputs(workload.peers["eager"])
        assert len(got) == len(want) == (2 if case.shape.startswith("add") else 1)
        for actual, expected in zip(got, want, strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def outputs(provider):
    torch.manual_seed(0)  # for the random gradients of the result
    result = provider()
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


# ---- the command ----


@pytest.fixture
def saved(tiny, tmp_path, monkeypatch, capsys):
    """Results of a run of rope with every kind of file."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/keye-ops", "bench", "--output", "/else/out"])
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    arguments = ["bench", "rope", "--quick", "--rounds", "2", "--threads", "1", "--output"]
    assert main([*arguments, str(tmp_path), "--json", "--csv", "--plot"]) == 0
    return tmp_path, capsys.readouterr().out


def test_the_command_prints_and_saves(saved):
    folder, text = saved
    assert "rope_2d, 1-megapixel image" in text
    assert "skipped torch.compile on 3 cases: not with --quick: it has to be compiled first" in text
    assert (folder / "cpu-rope.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((folder / "cpu-rope.json").read_text())
    for key in ("keye_ops", "torch", "python", "cpu", "timestamp", "capability", "peers"):
        assert key in result
    assert result["op"] == "rope"
    assert result["threads"] == 1
    assert result["seed"] == 0
    assert result["quick"] is True
    assert len(result["commit"].removesuffix("-dirty")) in (40, len("unknown"))
    assert result["limits"]["copy_gigabytes_per_second"] > 0
    assert result["environment"]["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE_BF16"
    assert result["command"] == ["keye-ops", "bench", "--output", "out"]
    assert str(folder) not in json.dumps(result)
    for timing in result["timings"]:
        assert 0 < timing["low"] <= timing["median"] <= timing["high"]
        assert timing["rounds"] in (1, 2)
        assert timing["percent_of_limit"] > 0
    assert {s["reason"] for s in result["skipped"] if s["provider"] == "torch.compile"} == {
        "not with --quick: it has to be compiled first"
    }


def test_csv_has_the_columns_of_liger(saved):
    folder, _ = saved
    with (folder / "cpu-rope.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    liger = "kernel_name kernel_provider kernel_operation_mode metric_name metric_unit x_name "
    liger += "x_label x_value y_value_50 y_value_20 y_value_80 extra_benchmark_config_str gpu_name "
    liger += "timestamp liger_version"
    assert list(rows[0]) == [*liger.split(), "torch", "commit", "cpu"]
    result = json.loads((folder / "cpu-rope.json").read_text())
    speeds = [row for row in rows if row["metric_name"] == "speed"]
    assert [float(row["y_value_50"]) for row in speeds] == [
        timing["median"] for timing in result["timings"]
    ]
    for row in rows:
        assert row["kernel_name"] == "rope"
        assert row["metric_unit"] in ("ms", "GB/s", "MB")
        assert float(row["y_value_20"]) <= float(row["y_value_50"]) <= float(row["y_value_80"])
        assert json.loads(row["extra_benchmark_config_str"])["dtype"] in ("bfloat16", "float32")


def test_list_times_nothing(capsys):
    assert main(["bench", "--list", "--quick"]) == 0
    text = capsys.readouterr().out
    assert all(op in text for op in OPS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "op must be one of add_layer_norm, add_rms_norm, linear_gelu, "),
        (["rope", "--mode", "full"], "no chosen case has --mode full"),
        (["rope", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["rope", "--device", "nonsense"], "--device must be a device that works here"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"keye-ops bench: {message}")
    assert error.count("\n") == 1


def test_threads_are_given_back():
    before = torch.get_num_threads()
    assert main(["bench", "--list", "rope", "--threads", str(before + 1)]) == 0
    assert torch.get_num_threads() == before


def test_the_command_uses_the_benchmarks_of_this_checkout():
    assert Path(harness.__file__).parent == ROOT / "bench"


def test_zentorch_is_skipped_with_a_note_where_it_is_absent(monkeypatch):
    peers = bench_module("peers")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.zentorch(QUICK) == harness.Skip("not installed")
    assert peers.zentorch(replace(QUICK, device="cuda")) == harness.Skip("a CPU library")
    compiled = peers.compiled(print, replace(QUICK, quick=False), backend="zentorch")
    assert compiled == harness.Skip("not installed")


# ---- README ----


def test_readme_agrees_with_the_results():
    assert report.main(["--check"]) == 0


def test_a_planted_difference_is_caught(tmp_path, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    begin = readme.index(report.BEGIN)
    place = readme.index("×", begin) - 1  # the last digit of a speed-up
    digit = str((int(readme[place]) + 1) % 10)
    edited = tmp_path / "README.md"
    edited.write_text(readme[:place] + digit + readme[place + 1 :], encoding="utf-8")
    assert report.main(["--check", "--readme", str(edited)]) == 1
    assert "README.md and bench/results disagree" in capsys.readouterr().err
    assert report.main(["--readme", str(edited)]) == 0
    assert edited.read_text(encoding="utf-8") == readme

    folder = tmp_path / "results"
    folder.mkdir()
    for path in (ROOT / "bench" / "results").glob("cpu-*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        for timing in result["timings"]:
            timing["median"] *= 1.5 if timing["role"] == "ours" else 1
        (folder / path.name).write_text(json.dumps(result), encoding="utf-8")
    assert report.main(["--check", "--results", str(folder)]) == 1


def test_a_readme_without_markers_is_one_line(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    assert report.main(["--readme", str(readme)]) == 1
    assert capsys.readouterr().err.startswith("report: README.md must hold <!-- bench:cpu begin")


def test_the_table_has_speed_ups_memory_and_time_per_patch():
    def timing(role, provider, median, **fields):
        base = {"headline": True, "role": role, "provider": provider, "median": median}
        base |= {"shape": "an image", "dtype": "bfloat16", "size": 100, "group": "images"}
        base |= {"percent_of_limit": 50.4, "limit": "gemm", "peak_bytes": None}
        return base | fields

    thumbnails = {"headline": False, "group": "thumbnails"}
    result = {
        "op": "vision_tower",
        "cpu": "A CPU, 2 cores",
        "threads": 2,
        "capability": "avx2",
        "torch": "2.13.0",
        "commit": "0123456789abcdef-dirty",
        "environment": {"KEYE_OPS_CPU_CAPABILITY": "avx2"},
        "quick": False,
        "limits": {
            "copy_gigabytes_per_second": 20.2,
            "gemm_gigaflops_per_second": {"bfloat16": 900.4},
        },
        "timings": [
            timing("ours", "keye_ops", 10.0, peak_bytes=60e6),
            timing("peer", "eager", 25.0, peak_bytes=100e6),
            timing("peer", "torch.compile", 20.0),
            timing("yardstick", "a part", 1.0),
            timing("ours", "keye_ops", 1.0, shape="1 thumbnail", size=256, **thumbnails),
            timing("ours", "keye_ops", 2.0, shape="2 thumbnails", size=512, **thumbnails),
        ],
        "skipped": [{"provider": "zentorch", "reason": "not installed"}],
    }
    text = report.table({"vision_tower": result})
    assert text.startswith("A CPU, 2 cores, 2 threads, instruction set avx2, torch 2.13.0, ")
    assert "keye_ops at 012345678-dirty, KEYE_OPS_CPU_CAPABILITY=avx2:\n" in text
    row = "| `vision_tower` | an image, bf16 | 10 | torch.compile | 20 | 2.00× | 50 of gemm |"
    assert row in text
    assert "20 GB/s copied, 900 GFLOP/s in bf16 matrix products." in text
    assert "needs 60 MB at its peak, eager's 100 MB (0.60×)." in text
    assert "The tower's time per patch with 1, 2 thumbnails: 3.9, 3.9 µs." in text
    assert text.endswith("Not installed there: zentorch.")
