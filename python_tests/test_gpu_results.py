"""What becomes of the GPU suite's benchmarks: timers, targets, README's text, plots."""

from __future__ import annotations

import json
import re

import bench_path
import gpu_targets
import pytest
import torch
from fake_cuda import fake_cuda
from fake_cuda import unavailable as no_fakes

from keye_ops.bench_command import bench_module

pytest.importorskip("tqdm")
pytest.importorskip("rich")
ROOT = bench_path.ROOT
# What has no values cannot run what needs some.
NEEDS_VALUES = ("DataDependentOutputException", "DynamicOutputShapeException")


@pytest.mark.skipif(no_fakes() is not None, reason=str(no_fakes()))
@pytest.mark.parametrize("op", bench_module("suite").ops())
def test_providers_stay_on_the_gpu(op, monkeypatch):
    """Every provider of every benchmark on fake tensors: a tensor left on the CPU would raise."""
    from test_bench import TINY

    harness, suite = bench_module("harness"), bench_module("suite")
    for name, grids in TINY.items():
        monkeypatch.setitem(harness.SHAPES, name, grids)
    for name, value in {"MERGED": 64, "THUMBNAILS": (1, 3), "TEXT": (24,)}.items():
        if hasattr(suite.script(op), name) and op != "projector":
            monkeypatch.setattr(suite.script(op), name, value)
    settings = harness.Settings(device="cuda", layers=1, compile=False)
    ran = 0
    for case in suite.script(op).cases(settings):
        if case.dtype == torch.float32 or case.mode == "full":
            continue
        with fake_cuda(), torch.no_grad():
            for _, _, provider in case.build().providers():
                if isinstance(provider, harness.Skip):
                    continue
                ran += not raised(provider)
    assert ran > 5


def raised(provider):
    """Whether a provider needs values."""
    try:
        provider()
    except Exception as error:
        if type(error).__name__ in NEEDS_VALUES:
            return True
        raise
    return False


def test_every_name_of_torch_cuda_exists():
    for path in (ROOT / "bench").glob("*.py"):
        for name in re.findall(r"torch\.cuda\.(\w+)", path.read_text(encoding="utf-8")):
            assert hasattr(torch.cuda, name) or name == "_sleep", f"{path.name}: {name}"


def test_events_are_recorded_around_the_call_alone(monkeypatch):
    timer = bench_module("timer")
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, other):
            return 250.0

    monkeypatch.setattr(timer, "_FLUSH_BYTES", 64)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"), raising=False)
    own = timer.EventTimer("cpu")
    own.flush = type("Flush", (), {"amax": lambda self: log.append("flush")})()
    assert own.seconds(lambda: log.append("call")) == 0.25
    assert log == ["flush", "sleep", "event", "call", "event", "wait"]


def timing(role, provider, median, **fields):
    base = {"op": "rope", "group": "g", "shape": "rope_2d, 60-frame clip", "size": 10}
    base |= {"unit": "patches", "dtype": "bfloat16", "mode": "forward", "headline": True}
    base |= {"role": role, "provider": provider, "median": median, "low": median, "high": median}
    base |= {"rounds": 3, "num_bytes": 10**9, "flops": 0, "limit": "copy", "peak_bytes": 0}
    return base | {"percent_of_limit": 93.0} | fields


def benchmark_stages(*timings, how="native", item="rope: a case"):
    facts = {"timings": list(timings), "implementation": {"rope_": how}}
    limits = {"copy_gigabytes_per_second": 4300.0, "gemm_gigaflops_per_second": {"bfloat16": 8e5}}
    rates = {"item": "limits", "status": "passed", "facts": {"limits": limits}}
    items = [rates, {"item": item, "status": "passed", "facts": facts}]
    return [{"stage": "benchmarks", "status": "passed", "items": items}]


def verdicts(stages, gpu="NVIDIA H200"):
    found = gpu_targets.judge(gpu, gpu_targets.gather(stages), stages)
    return {one["target"]: one["status"] for one in found}


def test_targets_are_met_missed_or_not_measured():
    copy = "rope_2d in place: 90 % of copy"
    ours = timing("ours", "keye_ops in place", 1.0)
    assert set(verdicts([]).values()) == {"not measured"}
    assert verdicts(benchmark_stages(ours))[copy] == "met"
    slow = timing("ours", "keye_ops in place", 1.0, percent_of_limit=89.0)
    assert verdicts(benchmark_stages(slow))[copy] == "missed"
    found = verdicts(benchmark_stages(ours, how="reference: no CUDA kernel"))
    assert found[copy] == "not measured: rope_ without a kernel"
    assert verdicts(benchmark_stages(ours), "NVIDIA A100")[copy].startswith("not measured: the")


def test_targets_take_the_best_peer_and_the_worst_shape():
    fields = {"op": "varlen_attention", "flops": 6 * 10**11}
    pairs = []
    for shape, peer in (("image 378²", 1.5), ("60-frame clip", 1.2)):
        own = fields | {"shape": shape}
        pairs.append([timing("ours", "keye_ops", 1.0, **own)])
        pairs[-1] += [timing("peer", f"peer {x}", x, **own) for x in (peer, peer + 1)]
        pairs[-1] += [timing("yardstick", "part", 0.1, **own)]
    stages = [one for i, pair in enumerate(pairs) for one in benchmark_stages(*pair, item=str(i))]
    found = {
        one["target"]: one for one in gpu_targets.judge("H200", gpu_targets.gather(stages), [])
    }
    one = found["vision, forward, S up to 1024: 1.3 x the best peer"]
    assert (one["measured"], one["status"]) == ("1.2 x", "missed")
    own = fields | {"shape": "1-megapixel image"}
    stages = benchmark_stages(timing("ours", "keye_ops", 1.0, **own))
    assert verdicts(stages)["vision, forward: 550 TFLOP/s"] == "met"
    own |= {"mode": "full", "flops": 6 * 10**11 * 7 // 2}
    stages += benchmark_stages(timing("ours", "keye_ops", 5.0, **own), item="full")
    assert verdicts(stages)["vision, backward: 430 TFLOP/s"] == "missed"  # 375


def gpu_result():
    stages = benchmark_stages(
        timing("ours", "keye_ops in place", 1.0), timing("peer", "torch.compile", 2.0)
    )
    stages += [
        {
            **{"stage": "parity", "status": "passed", "planned": 60, "passed": 55, "not_run": 5},
            **{"cases": 1234, "items": []},
        }
    ]
    benchmarks = gpu_targets.gather(stages)
    benchmarks["skipped"] = [{"provider": "Liger", "reason": "not installed"}]
    return {
        "gpu": "NVIDIA H200",
        "finished": True,
        "stages": stages,
        "benchmarks": benchmarks,
        "targets": gpu_targets.judge("NVIDIA H200", benchmarks, stages),
    }


def test_readme_gets_what_a_gpu_gave(tmp_path):
    report, report_gpu = bench_module("report"), bench_module("report_gpu")
    assert report_gpu.text(report_gpu.load(tmp_path)) == report_gpu.NOTHING
    folder = tmp_path / "nvidia-h200"
    folder.mkdir()
    old = gpu_result() | {"stages": [], "benchmarks": {}, "targets": []}
    (folder / "2026-01-01T00-00-00.json").write_text(json.dumps(old))
    (folder / "2026-01-02T00-00-00.json").write_text(json.dumps(gpu_result()))
    host = tmp_path / "host"
    host.mkdir()
    (host / "2026-01-03T00-00-00.json").write_text(json.dumps(gpu_result() | {"gpu": None}))
    text = report_gpu.text(report_gpu.load(tmp_path))
    row = "| `rope` | rope_2d, 60-frame clip, bf16, in place | 1 | torch.compile | 2 | 2.00× | "
    assert f"{row}93 of copy |" in text
    assert "4300 GB/s copied, 800 TFLOP/s in bf16 matrix products. Not installed there: Li" in text
    assert "| `rope` | rope_2d in place: 90 % of copy | 93 % | met |" in text
    assert "parity 55 of 55 (1,234 cases)" in text
    assert "sanitizer not run" in text
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    for path in (ROOT / "bench" / "results").glob("cpu-*.json"):
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    options = ["--readme", str(readme), "--results", str(tmp_path)]
    assert report.main([*options, "--check"]) == 1
    assert report.main(options) == 0
    assert row in readme.read_text(encoding="utf-8")
    assert report.main([*options, "--check"]) == 0
    (host / "2026-01-03T00-00-00.json").write_text("{}")
    assert report.main([*options, "--check"]) == 1  # a file that is none of ours


def test_a_row_of_a_reference_says_so():
    report_gpu = bench_module("report_gpu")
    result = gpu_result()
    result["benchmarks"]["implementations"] = {"rope: a case": {"rope_": "reference: no kernel"}}
    assert "| `rope` (reference of rope_) |" in report_gpu.text([result])


def test_plots_of_a_gpu(tmp_path):
    pytest.importorskip("matplotlib")
    [path] = bench_module("gpu_plot").save(gpu_result(), tmp_path)
    assert path.name == "cuda-rope.png"
    assert path.read_bytes().startswith(b"\x89PNG")
