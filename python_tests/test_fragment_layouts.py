"""The executor's layouts of fragments, operands and swizzles are those of CuTe."""

from __future__ import annotations

import re
import shutil
import subprocess

import host_cuda
import pytest

HEADERS = ("KEYE_CUTLASS_INCLUDE", "KEYE_CUDA_INCLUDE")
CHECKS = ["mma_a 16x8x8", "mma_b 16x8x16", "mma_d 16x8x16", "wgmma_a", "wgmma_d 72", "swizzle 64"]
CHECKS += [f"{major} {span} 64" for major in ("k", "mn") for span in ("none", 32, 64, 128)]


@pytest.fixture(scope="module")
def oracle():
    """Runs the oracle, with a fault planted in a check if one is named."""
    pytest.importorskip("pybind11")
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    folder = host_cuda.build()
    cache = (folder / "CMakeCache.txt").read_text()
    for header in HEADERS:
        if not re.search(rf"^{header}:PATH=(?!.*-NOTFOUND$).", cache, re.MULTILINE):
            pytest.skip(f"CMake found no {header}: pip install --no-deps nvidia-cutlass, and CUDA")
    build = ["cmake", "--build", folder, "--target", "layout_oracle"]
    result = subprocess.run(build, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (program,) = folder.glob("**/layout_oracle")
    return lambda *planted: subprocess.run(
        [program, *planted], capture_output=True, text=True, check=False
    )


def test_layouts_are_those_of_cute(oracle):
    result = oracle()
    assert result.returncode == 0, result.stderr
    assert int(result.stderr.removeprefix("OK ")) > 200_000


@pytest.mark.parametrize("check", CHECKS)
def test_a_planted_fault_is_found(oracle, check):
    result = oracle(check)
    assert result.returncode == 1
    assert result.stderr.startswith(f"{check}: ")
    assert len(result.stderr.splitlines()) == 1
