"""What the compiler made of the CUDA kernels, read from the built library; needs no GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import keye_ops

LIBRARY = Path(keye_ops.__file__).parent / "_C_cuda.abi3.so"


def find_cuobjdump():
    """From PyPI's packages (beside nvdisasm, which it calls), or from a toolkit."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations if spec else []:
        for path in Path(root).glob("*/bin/cuobjdump"):
            return str(path)
    return shutil.which("cuobjdump")


CUOBJDUMP = find_cuobjdump()
pytestmark = [
    pytest.mark.skipif(not LIBRARY.exists(), reason="_C_cuda was not built"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="cuobjdump is not installed"),
]


def dump(option):
    tools = str(Path(CUOBJDUMP).parent)
    result = subprocess.run(
        [CUOBJDUMP, option, str(LIBRARY)],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": f"{tools}:/usr/bin:/bin"},
    )
    return result.stdout


@pytest.fixture(scope="module")
def usage():
    """(architecture, kernel, registers, stack bytes, local bytes) of every kernel."""
    rows, architecture = [], ""
    for line in dump("-res-usage").splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            architecture = found[1]
        elif found := re.search(r"Function (\w+)", line):
            kernel = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            rows.append((architecture, kernel, *map(int, found.groups())))
    return rows


@pytest.fixture(scope="module")
def code():
    """Instructions of every kernel, by (architecture, kernel)."""
    kernels, architecture = {}, ""
    for line in dump("-sass").splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            architecture = found[1]
        elif found := re.search(r"Function : (\w+)", line):
            lines = kernels.setdefault((architecture, found[1]), [])
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/\s", line):
            lines.append(line)
    return kernels


def built_architectures():
    listing = dump("-lelf") if CUOBJDUMP and LIBRARY.exists() else ""
    return sorted(set(re.findall(r"(sm_\w+)\.cubin", listing)))


def test_the_library_loads_and_registers_its_kernels():
    # Without CUDA in torch one symbol (the current stream) is absent until a kernel is launched.
    code = (
        "import ctypes, os, torch, keye_ops; "
        f"ctypes.CDLL({str(LIBRARY)!r}, mode=os.RTLD_LAZY); "
        "has = torch._C._dispatch_has_kernel_for_dispatch_key; "
        "print([has(f'keye_ops::{op}', 'CUDA') for op in ('rope', 'rope_', 'rope_backward')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[True, True, True]"


def test_every_architecture_has_every_kernel(code):
    architectures = built_architectures()
    assert architectures
    names = {kernel for _, kernel in code}
    assert len([name for name in names if "rope_kernel" in name]) == 9  # 3 modes, 3 dtypes
    for architecture in architectures:
        assert {kernel for built, kernel in code if built == architecture} == names


def test_no_kernel_spills(usage, code):
    assert usage
    for architecture, kernel, registers, stack, local in usage:
        assert stack == 0, f"{kernel} on {architecture} has {stack} bytes of stack"
        assert local == 0, f"{kernel} on {architecture} has {local} bytes of local memory"
        assert registers <= 168, f"{kernel} on {architecture} takes {registers} registers"
    for key, lines in code.items():
        local = [line for line in lines if re.search(r"\b(LDL|STL)\b", line)]
        assert not local, f"{key}: {local[0]}"


def test_rope_reads_and_writes_sixteen_bytes(code):
    for key, lines in code.items():
        if "rope_kernel" not in key[1]:
            continue
        loads = sum("LDG.E.128" in line for line in lines)
        stores = sum("STG.E.128" in line for line in lines)
        backward = "RopeModeE2" in key[1]
        # Four rows a step; the backward takes one, but of x, of the gradient and of the weight.
        assert loads >= (3 if backward else 4), f"{key} has {loads} 16-byte loads"
        assert stores >= (1 if backward else 4), f"{key} has {stores} 16-byte stores"
        narrow = [line for line in lines if re.search(r"\b(LDG|STG)\.E\.(U8|U16|S16)", line)]
        assert not narrow, f"{key}: {narrow[0]}"


def test_rope_has_several_loads_on_their_way(code):
    """In the plain rotation four 16-byte loads come before the first store."""
    for key, lines in code.items():
        if "rope_kernel" not in key[1] or "RopeModeE0" not in key[1]:
            continue
        first_store = next(i for i, line in enumerate(lines) if "STG.E.128" in line)
        ahead = sum("LDG.E.128" in line for line in lines[:first_store])
        assert ahead >= 4, f"{key} has {ahead} loads before its first store"
