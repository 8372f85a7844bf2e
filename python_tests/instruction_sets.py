"""Running tests once more on every lesser instruction set than this machine's best."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from keye_ops import extension
from keye_ops.dispatch import has_kernel

VARIABLE = "KEYE_OPS_CPU_CAPABILITY"


def native(op):
    """Whether the native CPU kernel of ``op`` runs here."""
    return has_kernel(op, "cpu") and os.environ.get("KEYE_OPS_BACKEND") != "reference"


def needs_native_kernel(op):
    """Mark a test of the native CPU kernel of ``op``."""
    return pytest.mark.skipif(not native(op), reason="the native library does not run here")


def lesser_instruction_sets():
    """Those that the native library was built for, below the one it runs on."""
    if extension.libraries[0].error or os.environ.get("KEYE_OPS_BACKEND") == "reference":
        return []
    from keye_ops import _C

    isas = extension.libraries[0].build["isas"]
    return isas[: isas.index(_C.cpu_capability)] if _C.cpu_capability in isas else []


def on_each_lesser_instruction_set(test):
    """Run a test, which takes ``isa``, for each, but not in a run that is already such a one."""
    test = pytest.mark.parametrize("isa", lesser_instruction_sets())(test)
    return pytest.mark.skipif(VARIABLE in os.environ, reason="runs inside itself")(test)


def rerun(file, isa, chosen, **environment):
    """Run the tests of ``file`` that ``-k chosen`` selects on instruction set ``isa``."""
    environment = {**os.environ, VARIABLE: isa, **environment}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", file, "-k", chosen]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]
    code = "import keye_ops; from keye_ops import _C; print(_C.cpu_capability)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == isa
