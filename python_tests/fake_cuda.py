"""Tensors of a GPU that is not there: shapes, dtypes and devices, with no values behind them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from host_cuda import alone_in
from torch._subclasses.fake_tensor import FakeTensorMode

from keye_ops import dispatch

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def unavailable() -> str | None:
    """Why there are none, or None; a torch without CUDA gets the device guard that it lacks."""
    if torch.version.cuda:
        return None
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return "a torch without CUDA needs a device guard, and there is no compiler for it"
    source = Path(__file__).with_name("cuda_guard.cpp")
    package = Path(torch.__file__).parent
    library = ROOT / "build" / "fake_cuda" / f"cuda_guard-{torch.__version__}.so"
    with alone_in(library.parent):
        if not library.exists():
            command = [compiler, "-std=c++20", "-shared", "-fPIC", source, "-o", library]
            abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
            command += ["-isystem", package / "include", abi, f"-L{package / 'lib'}", "-lc10"]
            result = subprocess.run(list(map(str, command)), capture_output=True, check=False)
            if result.returncode != 0:
                return f"the device guard does not compile: {result.stderr.decode()[-300:]}"
    ctypes.CDLL(str(library))
    return None


@contextlib.contextmanager
def fake_cuda(native: bool = True) -> Iterator[FakeTensorMode]:
    """Tensors are fake inside a ``with`` block, and may be on ``cuda``.

    Args:
        native: whether every op has a CUDA kernel, as far as the choice of an implementation goes.
    """
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(torch.cuda, "current_device", return_value=0))
        enter(mock.patch.object(torch.Tensor, "pin_memory", lambda x: x))
        enter(mock.patch.object(torch.cuda, "mem_get_info", return_value=(2**36, 2**36)))
        enter(mock.patch.object(torch.nn.Module, "to", _move_module))
        if native:
            enter(mock.patch.object(dispatch, "has_kernel", return_value=True))
        yield enter(FakeTensorMode())


def _move_module(module: torch.nn.Module, *where: object) -> torch.nn.Module:
    """As Module.to, which cannot exchange fake parameters."""
    for part in module.modules():
        for kept in (part._parameters, part._buffers):
            for name, x in kept.items():
                if x is not None:
                    moved = x.detach().to(*(w for w in where if x.is_floating_point() or
                                            not isinstance(w, torch.dtype)))  # fmt: skip
                    parameter = isinstance(x, torch.nn.Parameter)
                    kept[name] = torch.nn.Parameter(moved) if parameter else moved
    return module
