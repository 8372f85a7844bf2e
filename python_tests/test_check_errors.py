"""check_errors: bad values on a device are reported, and the kernel goes on with safe ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from host_cuda import unavailable

import keye_ops

POSITIONS = r"rope: position_ids must be in \[0, 2\*\*24\), got "
HERE = Path(__file__).parent


@pytest.fixture
def kernels(device, request):
    """Where CUDA kernels run; on the CPU's own kernels the host raises at once."""
    if "host_cuda" not in request.node.name and device == "cpu":
        pytest.skip("the host checks values before CPU kernels run")
    yield device
    keye_ops.check_errors()


def inputs(device, *positions):
    q = torch.randn(len(positions), 2, 16, generator=torch.Generator().manual_seed(0)).to(device)
    ids = torch.tensor(positions, dtype=torch.int32, device=device)
    return q, torch.stack([ids, ids], 1)


def rotate(q, ids):
    return keye_ops.rope_2d(q, q, ids)[0]


def test_nothing_to_report(kernels):
    rotate(*inputs(kernels, 0, 1, 2**24 - 1))
    keye_ops.check_errors()
    keye_ops.check_errors(torch.device(kernels))


@pytest.mark.parametrize("bad", [-1, 2**24, 2**31 - 1, -(2**31)])
def test_a_bad_value_is_reported_once_and_clamped(kernels, bad):
    got = rotate(*inputs(kernels, 3, bad, 5))
    with pytest.raises(RuntimeError, match=f"{POSITIONS}{bad}"):
        keye_ops.check_errors()
    keye_ops.check_errors()
    want = rotate(*inputs(kernels, 3, min(max(bad, 0), 2**24 - 1), 5))
    assert torch.equal(got, want)


def test_the_first_error_stays(kernels):
    rotate(*inputs(kernels, -7))
    rotate(*inputs(kernels, 0))
    rotate(*inputs(kernels, -9))
    with pytest.raises(RuntimeError, match=f"{POSITIONS}-7"):
        keye_ops.check_errors()


VALIDATE = """
import torch
from host_cuda import host_cuda
import keye_ops
from test_check_errors import inputs, rotate
with host_cuda():
    rotate(*inputs("cpu", 0, 5))
    try:
        rotate(*inputs("cpu", 0, -3))
        print("nothing raised")
    except RuntimeError as error:
        print(error)
    rotate(*inputs("cpu", 0, 5))
    keye_ops.check_errors()
"""


@pytest.mark.parametrize("validate", ["0", "1"])
def test_validate_raises_from_the_call(validate):
    if reason := unavailable():
        pytest.skip(reason)
    environment = {**os.environ, "KEYE_OPS_VALIDATE": validate, "PYTHONPATH": str(HERE)}
    result = subprocess.run(
        [sys.executable, "-c", VALIDATE], capture_output=True, text=True, env=environment
    )
    if validate == "1":
        assert (result.returncode, result.stdout) == (
            0,
            "rope: position_ids must be in [0, 2**24), got -3\n",
        ), result.stderr
    else:  # the last line finds what the second call left
        assert result.stdout == "nothing raised\n"
        assert result.returncode == 1
        assert "got -3" in result.stderr
