"""The commands, as a user runs them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import keye_ops
from keye_ops.cli import main

pytest.importorskip("rich")
pytest.importorskip("av")
pytest.importorskip("matplotlib")


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capfd):
    """Run a command in this process."""

    def run_command(*arguments):
        status = main([str(argument) for argument in arguments])
        return Result(status, *capfd.readouterr())

    return run_command


@pytest.fixture(scope="module", params=["preview", "1.5"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    assert main(["make-checkpoint", "--tiny", str(folder), "--version", request.param]) == 0
    return folder


def test_the_installed_command():
    command = [str(Path(sys.executable).parent / "keye-ops"), "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout == f"keye-ops {keye_ops.__version__}\n"


def test_small_demo(run, tmp_path):
    result = run("demo", "--small", "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    for text in ("vision tower", "projector", "slow frame at 0.0 s", "fast frame", "rope_"):
        assert text in result.stdout
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "clip.mp4").stat().st_size > 1000
    errors = [line for line in result.stdout.splitlines() if "vision tower" in line]
    ours, plain = (float(cell) for cell in errors[-1].replace("│", " ").split()[2:4])
    assert 0 < ours <= 2 * plain


def test_demo_with_a_checkpoint_answers(run, checkpoint, tmp_path):
    result = run(
        "demo", "--checkpoint", checkpoint, "--output", tmp_path, "--max-new-tokens", 3, "--small"
    )
    assert result.returncode == 0, result.stderr
    assert "> What do the picture and the clip show?" in result.stdout


def test_demo_keeps_the_model_in_the_dtype_of_the_file(run, checkpoint, tmp_path, monkeypatch):
    from keye_ops import demo, model

    folder = shutil.copytree(checkpoint, tmp_path / "half")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    answering, passes = [], {}

    def generate(keye, inputs, **options):
        answering.append({parameter.dtype for parameter in keye.parameters()})

    def timed_pass(label, tower, projector, pixels, grid):
        passes[label] = {p.dtype for module in (tower, projector) for p in module.parameters()}
        return original(label, tower, projector, pixels, grid)

    original = demo.timed_pass
    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr(demo, "timed_pass", timed_pass)
    result = run("demo", "--checkpoint", folder, "--output", tmp_path, "--small")
    assert result.returncode == 0, result.stderr
    assert answering == [{torch.float16}]
    assert list(passes.values()) == [{torch.float32}, {torch.bfloat16}, {torch.bfloat16}]


def test_generate_on_an_image_and_a_clip(run, checkpoint, tmp_path):
    from keye_ops.demo import DATA, make_clip

    clip = make_clip(tmp_path / "clip.mp4")
    arguments = ["generate", "--checkpoint", checkpoint, "--image", DATA / "rocket.jpg"]
    arguments += ["--video", clip, "--prompt", "What is it?", "--max-new-tokens", 6]
    first, second = run(*arguments), run(*arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    sampled = run(*arguments, "--temperature", 1.5, "--top-p", 0.9, "--seed", 3)
    assert sampled.returncode == 0, sampled.stderr


def test_info_lists_every_op_and_library(run):
    result = run("info", "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    names = {"patch_embed", "rope_2d", "rope_2d_", "rope_3d", "rope_3d_", "varlen_attention"}
    names |= {"add_layer_norm", "layer_norm", "add_rms_norm", "rms_norm", "patchify"}
    names |= {"merge_norm", "linear_gelu"}
    assert {row["op"] for row in facts["ops"]} == names | {"projector"}
    assert all(callable(getattr(keye_ops, row["op"])) for row in facts["ops"])
    projector = [row["status"] for row in facts["ops"] if row["op"] == "projector"]
    assert projector == ["made of merge_norm and linear_gelu"]
    for name in names:
        backends = {row["backend"] for row in facts["ops"] if row["op"] == name}
        assert backends == {"reference", "cpu", "cuda"}
    assert [library["name"] for library in facts["libraries"]] == ["_C", "_C_cuda"]
    for library in facts["libraries"]:
        assert library["status"] == "loaded" or library["status"].startswith("not loaded: ")
    text = run("info").stdout
    assert "rope_2d" in text
    assert facts["torch"] in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--image", "no.jpg"], "keye-ops demo: no such file: no.jpg"),
        (["generate", "--checkpoint", "nowhere", "--prompt", "x"], "nowhere"),
        (["demo", "--checkpoint", "nowhere"], "keye-ops demo: no config.json in nowhere"),
        (
            ["demo", "--device", "nonsense"],
            "keye-ops demo: --device must be a device that works here, such as cpu, cuda or "
            "cuda:0, got 'nonsense'",
        ),
        (["demo", "--device", "meta"], "got 'meta'"),
        (
            ["generate", "--checkpoint", "x", "--prompt", "x", "--device", "cuda:99"],
            "keye-ops generate: --device cuda:99 needs a PyTorch built with CUDA and a visible "
            f"GPU of that number, got torch {torch.__version__} and ",
        ),
    ],
)
def test_errors_are_one_line(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(run):
    result = run("demo", "--device", "cuda")
    assert result.returncode == 1
    assert result.stderr.startswith("keye-ops demo: --device cuda needs a PyTorch built with CUDA")
    assert result.stderr.endswith(" and 0 GPUs\n")


def test_errors_of_ops_are_one_line(run, monkeypatch):
    def fail(arguments):
        raise RuntimeError("rope: something must be so, got 3\nException raised from f at g.cpp:1")

    monkeypatch.setattr("keye_ops.info.run", fail)
    result = run("info")
    assert result.returncode == 1
    assert result.stderr == "keye-ops info: rope: something must be so, got 3\n"


def test_a_truncated_checkpoint_says_which_file(run, checkpoint, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    result = run("generate", "--checkpoint", folder, "--prompt", "x")
    assert result.returncode == 1
    assert shard.name in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unreadable_picture_says_so(run, checkpoint, tmp_path):
    picture = tmp_path / "picture.jpg"
    picture.write_bytes(b"not a picture")
    result = run("generate", "--checkpoint", checkpoint, "--image", picture, "--prompt", "x")
    assert result.returncode == 1
    assert "picture.jpg" in result.stderr
    assert "Traceback" not in result.stderr
