"""The GPU suite without a GPU: budgets, faults of stages, early ends; its body on the executor."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import bench_path
import gpu_runner
import gpu_suite
import host_cuda
import pytest
import torch
from gpu_runner import Stage

pytest.importorskip("rich")
pytest.importorskip("hypothesis")
ROOT = bench_path.ROOT

PLANTED = """
import os, sys, time
from gpu_runner import NotRun
def items(context):
    if context.stage == "nothing":
        raise NotRun("there is none")
    if context.stage == "breaks":
        raise OSError("no such library")
    if context.stage.startswith("slow"):
        return [f"item {i}" for i in range(50)]
    return ["good", "wrong", "raises", "hangs", "crashes", "absent", "last"]
def run(item, context):
    if context.stage.startswith("slow"):
        time.sleep(0.1)
        return {"cases": 1}
    if item == "wrong":
        return {"cases": 2, "problems": ["three is not four"]}
    if item == "raises":
        raise ValueError("a message")
    if item == "hangs":
        context.note({"seen": 1})
        time.sleep(600)
    if item == "crashes":
        print("last words", file=sys.stderr, flush=True)
        os.abort()
    if item == "absent":
        raise NotRun("needs more memory")
    return {"cases": 3, "facts": {"who": os.getpid()}}
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Stages of a module that misbehaves in every way."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "planted.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def make(*stages, minutes=1.0, **options):
        arguments = gpu_suite.parse(["--output", str(tmp_path / "out"), "--device", "cpu"])
        arguments.minutes = minutes
        for name, value in options.items():
            setattr(arguments, name, value)
        return gpu_suite.Run(arguments, "", stages)

    return make


def stage(name, **options):
    return Stage(name, "planted", **{"seconds": 30, "at_least": 1, **options})


def saved(run):
    return json.loads(run.path.read_text())


# ---- what a stage does to the others ----


def test_a_stage_that_raises_hangs_or_crashes_is_reported_and_the_others_go_on(planted, capsys):
    run = planted(stage("faults", item_seconds=1.5), stage("breaks"), stage("nothing"))
    run.run()
    faults, breaks, nothing = saved(run)["stages"]
    items = {item["item"]: item for item in faults["items"]}
    assert {name: item["status"] for name, item in items.items()} == {
        "good": "passed",
        "wrong": "failed",
        "raises": "failed",
        "hangs": "hung",
        "crashes": "crashed",
        "absent": "not run",
        "last": "passed",
    }
    assert items["wrong"]["problems"] == ["three is not four"]
    assert items["raises"]["problems"][0] == "ValueError: a message"
    assert items["hangs"]["problems"] == ["took more than 2 s"]
    assert items["hangs"]["facts"] == {"seen": 1}
    assert "exit status -6: last words" in items["crashes"]["problems"][0]
    assert items["absent"]["reason"] == "needs more memory"
    # The two that died cost a process each; what came before was not run again.
    assert items["good"]["facts"] != items["last"]["facts"]
    assert (faults["status"], faults["planned"], faults["passed"]) == ("failed", 7, 2)
    assert faults["cases"] == 8
    assert breaks["status"] == "failed"
    assert "OSError: no such library" in breaks["reason"]
    assert (nothing["status"], nothing["reason"]) == ("not run", "there is none")
    assert saved(run)["finished"]
    assert "  wrong: three is not four" in capsys.readouterr().out


KILLED = """
import sys; sys.path[:0] = {paths!r}
import gpu_suite
from gpu_runner import Stage
arguments = gpu_suite.parse(["--output", {output!r}, "--device", "cpu"])
gpu_suite.STAGES = tuple(Stage(name, "planted", 30) for name in ("nothing", "slow", "last"))
sys.exit(gpu_suite.main(["--output", {output!r}, "--device", "cpu"]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_keeps_what_it_found(planted, tmp_path, number):
    paths = [str(ROOT / "bench"), str(ROOT), str(tmp_path / "modules")]
    code = KILLED.format(paths=paths, output=str(tmp_path / "out"))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    file, deadline = None, time.monotonic() + 30
    while time.monotonic() < deadline:
        file = next((tmp_path / "out").glob("cpu/*.json"), None)
        if file and file.read_text().count('"item": "item ') >= 3:
            break
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(10) == (-9 if number == signal.SIGKILL else 1)
    result = json.loads(file.read_text())
    assert not result["finished"]
    nothing, slow = result["stages"]
    assert nothing["status"] == "not run"
    assert slow["status"] == "cut short"
    assert [item["status"] for item in slow["items"][:2]] == ["passed"] * 2


def test_budgets_are_shares_that_shrink_and_flow_on():
    first, second = stage("a", seconds=60), stage("b", seconds=30, host_seconds=5)
    assert gpu_runner.budget(first, [second], 900, "cuda") == 120  # at most twice the wish
    assert gpu_runner.budget(first, [second], 45, "cuda") == 30
    assert gpu_runner.budget(second, [], 15, "cuda") == 15
    assert gpu_runner.budget(first, [second], 45, "host_cuda") == 0
    essential = stage("c", essential=True)
    assert gpu_runner.budget(essential, [first, second], 500, "cuda") == 500
    total = sum(one.seconds for one in gpu_suite.STAGES[1:])
    assert 400 <= total <= 600  # nine minutes, where the libraries are there
    assert sum(one.host_seconds for one in gpu_suite.STAGES) <= 90


def test_budgets_are_kept(planted):
    begin = time.monotonic()
    run = planted(stage("slow"), stage("slow too"), stage("no time", at_least=20), minutes=4 / 60)
    run.run()
    assert time.monotonic() - begin < 9
    slow, _, last = saved(run)["stages"]
    assert slow["status"] == "cut short"
    assert slow["budget"] == pytest.approx(4 / 3, abs=0.2)
    assert 0 < slow["passed"] < 30
    assert slow["not_run"] == slow["planned"] - slow["passed"]
    assert (last["status"], last["planned"]) == ("not run", 0)
    assert re.fullmatch(r"\d s are too few", last["reason"])


def test_a_stage_that_does_not_end_is_ended(planted, monkeypatch):
    monkeypatch.setattr(gpu_runner, "_GRACE_SECONDS", 0.5)
    run = planted(stage("faults"), minutes=3 / 60)
    run.run()
    [faults] = saved(run)["stages"]
    assert faults["seconds"] < 6
    assert faults["items"][-1]["reason"] == "no time left"
    assert faults["status"] == "failed"  # for what failed before


def test_a_run_goes_on_where_another_ended(planted):
    first = planted(stage("faults", item_seconds=1), stage("slow", seconds=60))
    first.run()
    second = planted(stage("faults", item_seconds=1), stage("slow"), resume=first.path)
    second.run()
    faults, slow = saved(second)["stages"]
    assert "resumed" not in faults
    assert slow["resumed"] == first.path.name
    assert slow["passed"] == 50


# ---- the whole ----


def run_suite(*arguments):
    command = [sys.executable, str(ROOT / "bench" / "gpu_suite.py"), *map(str, arguments)]
    environment = {**os.environ, "PATH": os.defpath}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def folder():
    if reason := host_cuda.unavailable():
        pytest.skip(reason)
    return host_cuda.build()


def test_on_the_host_executor(folder, tmp_path):
    begin = time.monotonic()
    result = run_suite("--device", "host_cuda", "--build", folder, "--output", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert time.monotonic() - begin < 120  # 72, and more where others use the processors, too
    [path] = tmp_path.glob("host/*.json")
    assert str(ROOT) not in path.read_text()
    found = json.loads(path.read_text())
    stages = {one["stage"]: one for one in found["stages"]}
    assert list(stages) == [one.name for one in gpu_suite.STAGES]
    for name in ("environment", "twin", "parity", "repeats", "fuzz", "malformed"):
        assert stages[name]["status"] in ("passed", "cut short"), stages[name]
        assert stages[name]["passed"] > 0
    for name in ("selftest", "graphs", "syncs", "large", "tests", "sanitizer", "benchmarks"):
        assert (stages[name]["status"], stages[name]["reason"]) == ("not run", "needs a GPU")
    software = {i["item"]: i["facts"] for i in stages["environment"]["items"] if "facts" in i}
    assert software["software"]["torch"] == torch.__version__
    assert stages["fuzz"]["cases"] > 20
    assert found["gpu"] is None


def test_the_twins_alone(folder, tmp_path):
    result = run_suite("--host-only", "--build", folder, "--output", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    [path] = tmp_path.glob("host/*.json")
    [twins] = json.loads(path.read_text())["stages"]
    assert twins["passed"] == twins["planned"] > 25
    assert all(item["cases"] > 0 for item in twins["items"])
    result = run_suite("--host-only", "--build", tmp_path, "--output", tmp_path / "other")
    assert result.returncode == 1
    assert "cannot open shared object file" in result.stdout


def test_it_says_that_there_is_no_gpu(tmp_path):
    if os.access("/usr/bin/nvidia-smi", os.X_OK):
        pytest.skip("there is a GPU")
    result = run_suite("--output", tmp_path)
    assert result.returncode == 2
    assert len(result.stdout.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_unknown_stages_are_refused():
    result = run_suite("--only", "parity,nonsense")
    assert result.returncode == 2
    assert "a stage must be one of benchmarks, " in result.stderr
