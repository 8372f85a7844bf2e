"""The commands, as a user runs them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

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
    names = {"patch_embed", "rope_2d", "rope_3d", "varlen_attention", "merge_norm", "linear_gelu"}
    assert {row["op"] for row in facts["ops"]} == names
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
        (["demo", "--checkpoint", "nowhere"], "keye-ops demo: config: no config.json in nowhere"),
    ],
)
def test_errors_are_one_line(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


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
