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
    own = ("cutlass", "_sm90_kernel")  # of some architectures only
    names = {kernel for _, kernel in code if not any(part in kernel for part in own)}
    assert len([name for name in names if "rope_kernel" in name]) == 9  # 3 modes, 3 dtypes
    for architecture in architectures:
        assert names <= {kernel for built, kernel in code if built == architecture}


def test_gemms_use_tensor_cores(code):
    """linear_gelu in two forms and patch_embed: wgmma and TMA on sm_90a, mma.sync elsewhere."""
    gemms = {key: lines for key, lines in code.items() if "cutlass" in key[1]}
    if not gemms:
        pytest.skip("_C_cuda was built without CUTLASS")
    # Code for sm_80 is also that of sm_86 and sm_89.
    for architecture in {*built_architectures()} - {"sm_86", "sm_89"}:
        wanted = ("HGMMA", "UTMALDG", "UTMASTG") if architecture == "sm_90a" else ("HMMA", "LDGSTS")
        kernels = [lines for (built, _), lines in gemms.items() if built == architecture]
        assert len(kernels) == 3, architecture
        for lines in kernels:
            counts = cuda_ledger.count_instructions(lines)
            assert all(counts.get(name, 0) > 0 for name in wanted), (architecture, counts)


def test_positions_are_read_by_sixteen_bytes(code):
    """In the epilogue of patch_embed's GEMM: four rows of the table and the bias."""
    for key, lines in code.items():
        if "cutlass" in key[1] and "PatchEmbed" in key[1]:
            assert cuda_ledger.count_instructions(lines)["LDG.E.128"] == 80, key


def test_no_kernel_spills(usage, code):
    assert usage
    for architecture, kernel, registers, stack, local in usage:
        assert stack == 0, f"{kernel} on {architecture} has {stack} bytes of stack"
        assert local == 0, f"{kernel} on {architecture} has {local} bytes of local memory"
        most = 232 if "cutlass" in kernel else 255 if "attention" in kernel else 168
        assert registers <= most, f"{kernel} on {architecture} takes {registers} registers"
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


def test_attention_multiplies_by_72_columns(code):
    """Of head_dim 72, on sm_90a: weights times values have 72 columns, and not 80 or 96."""
    seen = 0
    for key, lines in code.items():
        if "attention_sm90_kernel" in key[1] and "Li72E" in key[1]:
            shapes = {found[1] for x in lines if (found := re.search(r"HGMMA\.(\d+x\d+x16)", x))}
            assert shapes == {"64x64x16", "64x72x16"}, f"{key} has {shapes}"
            seen += 1
    assert seen or "sm_90a" not in {key[0] for key in code}
