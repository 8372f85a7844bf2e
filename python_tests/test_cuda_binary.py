"""What the compiler made of the CUDA kernels, read from the built library; needs no GPU."""

from __future__ import annotations

import re
import subprocess
import sys

import cuda_ledger
import pytest
from cuda_ledger import LIBRARY

pytestmark = [
    pytest.mark.skipif(not LIBRARY.exists(), reason="_C_cuda was not built"),
    pytest.mark.skipif(cuda_ledger.find_cuobjdump() is None, reason="cuobjdump is not installed"),
]


@pytest.fixture(scope="module")
def usage():
    """(architecture, kernel, registers, stack bytes, local bytes) of every kernel."""
    kernels = cuda_ledger.parse_usage(cuda_ledger.dump(LIBRARY, "-res-usage"))
    return [
        (architecture, name, entry["registers"], entry["stack"], entry["local"])
        for architecture, entries in kernels.items()
        for name, entry in entries.items()
    ]


@pytest.fixture(scope="module")
def code():
    """Instructions of every kernel, by (architecture, kernel)."""
    kernels = cuda_ledger.parse_code(cuda_ledger.dump(LIBRARY, "-sass"))
    return {
        (architecture, name): lines
        for architecture, entries in kernels.items()
        for name, lines in entries.items()
    }


def built_architectures():
    return sorted(set(re.findall(r"(sm_\w+)\.cubin", cuda_ledger.dump(LIBRARY, "-lelf"))))


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


def test_the_ledger_is_up_to_date():
    missing = set(cuda_ledger.REQUIRED) - set(built_architectures())
    if missing:
        pytest.skip(f"_C_cuda was not built for {', '.join(sorted(missing))}")
    ledger, nvcc = cuda_ledger.read_ledger(), cuda_ledger.compilers(LIBRARY)
    if ledger["nvcc"] != nvcc:
        pytest.skip(f"the ledger records nvcc {ledger['nvcc']}, the library is by {nvcc}")
    assert cuda_ledger.complaints(LIBRARY, cuda_ledger.read_kernels(LIBRARY)) == []
