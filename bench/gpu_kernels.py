"""Stages twin and selftest: the kernel vocabulary, and the executor's own kernels, on the GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import twin
from gpu_runner import Context, Found, NotRun

HOST, CUDA = "host_cuda_twin.so", "twin_cuda.so"
SELFTESTS = ("gemm_mma", "gemm_wgmma", "cluster_sum", "row_sums")
_machines: dict[tuple[Path, int], twin.Machine] = {}


def machine(path: Path, seed: int = 0) -> twin.Machine:
    """A machine, loaded once."""
    if (path, seed) not in _machines:
        _machines[path, seed] = twin.Machine(path, seed)
    return _machines[path, seed]


def items(context: Context) -> list[str]:
    """Functions of the vocabulary, or names of kernels."""
    if context.stage == "selftest":
        return list(SELFTESTS)
    return list(dict.fromkeys(one.function for one in machine(context.build / HOST).twins))


def run(item: str, context: Context) -> Found:
    """One of them."""
    if context.stage == "selftest":
        return selftest(context.build, item)
    return twins(context.build, item, on_gpu=context.device == "cuda")


def twins(folder: Path, function: str, on_gpu: bool) -> Found:
    """The twins of a function on the GPU (or under another schedule) as on the host executor."""
    host = machine(folder / HOST)
    other = machine(folder / CUDA) if on_gpu else machine(folder / HOST, seed=1)
    some = [one for one in other.twins if one.function == function]
    if not some:
        raise NotRun(f"{CUDA} holds none for this GPU")
    result = twin.compare(host, other, some if on_gpu else some[:2])
    problems = [f"{m.twin}, {m.label}: {m.count} words, {m.detail}" for m in result.mismatches]
    # What CUDA reports once it reports for ever, so that others need a process of their own.
    spoiled = on_gpu and any(not m.detail.startswith("word ") for m in result.mismatches)
    return {"cases": result.cases.total(), "problems": problems, "spoiled": spoiled}


def selftest(folder: Path, name: str) -> Found:
    """A kernel of the executor's self-tests on the GPU, against numpy."""
    rng = np.random.default_rng(0)

    def bf16(*shape: int) -> tuple[np.ndarray, np.ndarray]:
        bits = twin.to_bf16(rng.standard_normal(shape, np.float32))
        return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    if name.startswith("gemm"):
        m, n, k = 328, 200, 1096
        (a, exact_a), (b, exact_b) = bf16(m, k), bf16(n, k)
        wgmma = name == "gemm_wgmma"
        arrays = [a, b, np.zeros((m, n), np.uint16 if wgmma else np.float32)]
        numbers, tile = [m, n, k], [-(-m // 64), -(-n // 64)]
        shape = [*tile, 160, 4 * 16384 + 8192 + 64, 1] if wgmma else [*tile, 128, 3 * 8192, 1]
        expected = exact_a @ exact_b.T
        # A rounding of the result, and of sums of products.
        bound = np.abs(exact_a) @ np.abs(exact_b.T) * 2.0**-16 + wgmma * np.abs(expected) * 2.0**-8
    elif name == "cluster_sum":
        x = rng.standard_normal((5, 8, 1024), np.float32)
        arrays, numbers = [x, np.zeros(5, np.float32)], [1024]
        shape = [40, 1, 128, 4096 * 4 + 200, 8]
        expected, bound = x.sum((1, 2), np.float64), np.abs(x).sum((1, 2)) * 2.0**-16
    else:
        x = rng.standard_normal((300, 512), np.float32)
        arrays = [x, np.zeros(300, np.float32), np.zeros(1, np.float32), np.zeros(1, np.uint32)]
        numbers, shape = [512, 512], [300, 1, 64, 64, 1]
        expected, bound = x.sum(1, np.float64), np.abs(x).sum(1) * 2.0**-16
    library = ctypes.CDLL(str(folder / CUDA))
    library.selftest_run.restype = ctypes.c_char_p
    error = library.selftest_run(
        name.encode(),
        len(arrays),
        (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays)),
        (ctypes.c_size_t * len(arrays))(*(array.nbytes for array in arrays)),
        (ctypes.c_int64 * len(numbers))(*numbers),
        (ctypes.c_uint32 * len(shape))(*shape),
    )
    if error is not None:
        return {"problems": [error.decode()], "spoiled": True}
    actual = arrays[1 if "sum" in name else 2]
    if actual.dtype == np.uint16:
        actual = (actual.astype(np.uint32) << 16).view(np.float32)
    bad = ~(np.abs(actual - expected) <= bound)
    problems = [f"{bad.sum()} of {bad.size} values are wrong"] if bad.any() else []
    return {"cases": bad.size, "problems": problems}
