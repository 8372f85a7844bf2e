"""clang-tidy finds a 32-bit product that is used as a 64-bit offset."""

import subprocess
import sys
from pathlib import Path

import kernel_tidy
import pytest

pytestmark = pytest.mark.skipif(
    kernel_tidy.find_clang_tidy() is None, reason="clang-tidy is not installed"
)
KERNEL = """
#pragma once
#include <cstdint>
template <class T>
__attribute__((always_inline)) inline T load(const T* x, int row, int stride, int64_t wide) {{
  constexpr int kRows = 4, kWidth = 8;
  const int64_t fits = kRows * kWidth;
  return x[{offset} + fits];
}}
"""


def run_tidy(folder, offset):
    scratch = folder / "csrc" / "scratch"
    scratch.mkdir(parents=True)
    (scratch / "scratch.cuh").write_text(KERNEL.format(offset=offset))
    (scratch / "scratch_host_cuda_kernel.cpp").write_text(
        '#include "scratch/scratch.cuh"\n'
        "float run(const float* x, int row, int64_t wide) { return load(x, row, row, wide); }\n"
    )
    program = Path(kernel_tidy.__file__)
    return subprocess.run(
        [sys.executable, program, folder], capture_output=True, text=True, check=False
    )


def test_64_bit_products_pass(tmp_path):
    result = run_tidy(tmp_path, "row * wide + int64_t{row} * stride")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("offset", ["row * stride", "row * stride + wide", "int64_t{row * stride}"])
def test_a_32_bit_product_fails(tmp_path, offset):
    result = run_tidy(tmp_path, offset)
    assert result.returncode == 1
    assert "scratch.cuh:8" in result.stderr
    assert "bugprone-implicit-widening-of-multiplication-result" in result.stderr


def test_nothing_to_check_fails(tmp_path):
    result = subprocess.run(
        [sys.executable, kernel_tidy.__file__, tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "found none" in result.stderr
