"""CUDA kernels on CPU tensors, by the host executor, which is built when first needed."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from keye_ops import dispatch, extension

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "host_executor"
OPS = (
    "add_layer_norm",
    "add_rms_norm",
    "check_errors",
    "linear_gelu",
    "merge_norm",
    "patch_embed",
    "patchify",
    "rope",
    "varlen_attention",
)
ATTENTION_ARCHS = (80, 90)  # whose kernels of varlen_attention there are
SEED = int(os.environ.get("KEYE_OPS_HOST_CUDA_SEED", "0"))


def unavailable() -> str | None:
    """Why CUDA kernels cannot run on CPU tensors here, or None."""
    if extension.libraries[0].error or os.environ.get("KEYE_OPS_BACKEND") == "reference":
        return "the native library does not run here"
    if "KEYE_OPS_HOST_CUDA_DIR" in os.environ:
        return None
    if shutil.which("cmake") is None or importlib.util.find_spec("pybind11") is None:
        return "the host executor needs cmake and pybind11"
    return None


def cutlass_settings() -> list[str]:
    """For CMake: where CUTLASS and CUDA's headers are; nothing unless both are installed."""
    cutlass = importlib.util.find_spec("cutlass_library")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.insert(0, str(Path(nvcc).resolve().parents[1]))
    includes = [Path(home) / "include" for home in homes if home]
    cuda = next((path for path in includes if (path / "cuda_runtime.h").exists()), None)
    if cutlass is None or cuda is None:
        return []
    include = Path(cutlass.origin).parent / "source" / "include"
    return [f"-DKEYE_CUTLASS_INCLUDE={include}", f"-DKEYE_CUDA_INCLUDE={cuda}"]


@functools.cache
def build() -> Path:
    """The folder of the executor and of the kernels' libraries, made up to date.

    The environment variable ``KEYE_OPS_HOST_CUDA_DIR`` names a folder to use as it is.

    Raises:
        RuntimeError: CMake or a compiler fails; with what they wrote.
    """
    if folder := os.environ.get("KEYE_OPS_HOST_CUDA_DIR"):
        return Path(folder)
    import pybind11

    configure = [
        *("cmake", "-S", ROOT / "csrc" / "host_executor", "-B", BUILD),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DKEYE_TORCH_INCLUDE={Path(torch.__file__).parent / 'include'}",
        f"-DKEYE_C_LIBRARY={extension.libraries[0].path or ''}",
        *cutlass_settings(),
    ]
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    with alone_in(BUILD):
        for command in (configure, ["cmake", "--build", BUILD, "--parallel", jobs]):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                output = result.stdout + result.stderr
                raise RuntimeError(f"the host executor must build, got:\n{output}")
    return BUILD


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No other process is in such a block of the folder's: tests run in several."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def executor() -> ModuleType:
    """The executor's Python module."""
    sys.path.insert(0, str(build()))
    return importlib.import_module("_host_executor")


@functools.cache
def _kernels(op: str) -> ctypes.CDLL:
    # NOTE: the executor first, so that it binds its own copies of inline functions, not those of
    # the kernels, which are instrumented.
    executor()
    return ctypes.CDLL(str(build() / f"host_cuda_{op}_op.so"))


def take_reports() -> list[Any]:
    """Reports of the launches since this was last called."""
    return executor().take_reports()


@contextmanager
def host_cuda(attention_arch: int = 90, **schedule: Any) -> Iterator[None]:
    """CUDA kernels in place of the CPU's inside a ``with`` block.

    Args:
        attention_arch: one of ``ATTENTION_ARCHS``.
        schedule: of :class:`_host_executor.Schedule`; the seed is by default
            ``KEYE_OPS_HOST_CUDA_SEED``.
    """
    executor().set_default_schedule(executor().Schedule(**{"seed": SEED, **schedule}))
    take_reports()
    for op in OPS:
        getattr(_kernels(op), f"{op}_host_cuda_install")()
    _kernels("varlen_attention").varlen_attention_host_cuda_set_arch(attention_arch)
    try:
        with mock.patch.object(dispatch, "kernel_device", return_value="cuda"):
            yield
    finally:
        for op in OPS:
            getattr(_kernels(op), f"{op}_host_cuda_restore")()


@contextmanager
def fused_gemms() -> Iterator[None]:
    """As :func:`host_cuda`, with plain loops in place of the GEMMs that GPUs fuse."""
    with host_cuda():
        for op in ("linear_gelu", "patch_embed"):
            getattr(_kernels(op), f"{op}_host_cuda_install_fused")()
        yield


if __name__ == "__main__":
    print(build())
