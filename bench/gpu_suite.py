"""Checks everything that needs a GPU, a stage at a time, and saves what every stage found.

``python bench/gpu_suite.py --minutes 9 --output bench/results``, from a checkout. Every stage is a
process of its own, so that a fault or a hang in one leaves the others alone.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "python_tests")]

import twin  # noqa: E402

BUILD = ROOT / "build" / "host_executor"
HOST, CUDA = "host_cuda_twin.so", "twin_cuda.so"
STAGE_SECONDS = {"build": 300, "environment": 60, "twin": 60, "selftest": 30, "rope": 60}
DTYPES = ("float32", "float16", "bfloat16")
Result = dict[str, Any]


def output_of(*command: Any) -> str:
    """What a program prints, stripped, or nothing where it fails or is absent."""
    try:
        result = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, cwd=ROOT, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


# ---- stages: each returns what it found; "problems" are failures ----


def environment(folder: Path) -> Result:
    """Versions, the GPU, the commit, and hashes of the sources and of the libraries."""
    import torch

    def digest(paths: list[Path]) -> str:
        return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]

    libraries = [*ROOT.glob("keye_ops/*.so"), *folder.glob("*.so")]
    return {
        "gpu": output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "commit": output_of("git", "rev-parse", "HEAD") or "unknown",
        "changed": output_of("git", "status", "--porcelain").splitlines(),
        "csrc": digest(sorted(path for path in ROOT.glob("csrc/**/*") if path.is_file())),
        "libraries": {path.name: digest([path]) for path in sorted(libraries)},
        "nvcc": output_of("nvcc", "--version").splitlines()[-1:],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def build(folder: Path) -> Result:
    """Use the libraries that are there; make those that are absent or do not load."""
    made = []

    def run(*command: Any) -> None:
        made.append(" ".join(map(str, command)))
        subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr)

    try:
        twin.Machine(folder / HOST)
        ctypes.CDLL(str(folder / CUDA))
    except OSError:
        pybind11 = output_of(sys.executable, "-m", "pybind11", "--cmakedir")
        options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}"]
        run("cmake", "-S", ROOT / "csrc" / "host_executor", "-B", folder, *options)
        targets = [path.removesuffix(".so") for path in (HOST, CUDA)]
        run("cmake", "--build", folder, "--parallel", os.cpu_count(), "--target", *targets)
    import torch

    if not output_of(sys.executable, "-c", "import keye_ops._C, keye_ops._C_cuda; print(1)"):
        package = Path(torch.__file__).parent
        include = output_of(
            sys.executable, "-c", "import sysconfig; print(sysconfig.get_paths()['include'])"
        )
        options = [
            f"-DKEYE_TORCH_INCLUDE={package / 'include'}",
            f"-DKEYE_OUTPUT_DIR={ROOT}/keye_ops",
        ]
        options += [f"-DKEYE_TORCH_LIB={package / 'lib'}", f"-DKEYE_PYTHON_INCLUDE={include}"]
        options += ["-DKEYE_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=80-real;90a-real"]
        run("cmake", "-S", ROOT, "-B", ROOT / "build" / "gpu", *options)
        run("cmake", "--build", ROOT / "build" / "gpu", "--parallel", os.cpu_count())
    return {"made": made}


def twins(folder: Path, function: str, host_only: bool) -> Result:
    """The twins of a function on the GPU (or under another schedule) as on the host executor."""
    host = twin.Machine(folder / HOST)
    other = twin.Machine(folder / HOST, seed=1) if host_only else twin.Machine(folder / CUDA)
    some = [one for one in other.twins if one.function == function]
    result = twin.compare(host, other, some[:2] if host_only else some)
    problems = [f"{m.twin}, {m.label}: {m.count} words, {m.detail}" for m in result.mismatches]
    return {"cases": result.cases.total(), "problems": problems}


def selftest(folder: Path, name: str) -> Result:
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
        return {"problems": [error.decode()]}
    actual = arrays[1 if "sum" in name else 2]
    if actual.dtype == np.uint16:
        actual = (actual.astype(np.uint32) << 16).view(np.float32)
    bad = ~(np.abs(actual - expected) <= bound)
    problems = [f"{bad.sum()} of {bad.size} values are wrong"] if bad.any() else []
    return {"cases": bad.size, "problems": problems}


def rope(dtype_name: str) -> Result:
    """Values and gradients of rope on cuda, held to twice the error of plain PyTorch."""
    import torch
    from test_rope import Case, outputs_and_gradients, public
    from tolerance import assert_within_twice

    from keye_ops.rope import rope_reference

    if not torch._C._dispatch_has_kernel_for_dispatch_key("keye_ops::rope", "CUDA"):
        return {"problems": ["the library holds no rope for cuda"]}
    cases, problems = 0, []
    dtype = getattr(torch, dtype_name)
    for shape in ((4097, 16, 16, 72, 2), (1031, 32, 8, 128, 3), "one token", "largest head"):
        for norm, interleaved in ((False, False), (False, True), (True, False), (True, True)):
            on_gpu = Case(shape, dtype, "cuda", norm, interleaved)
            case = Case(shape, dtype, "cpu", norm, interleaved)
            actual = outputs_and_gradients(public, on_gpu)
            plain = outputs_and_gradients(rope_reference, case)
            exact = outputs_and_gradients(rope_reference, case, torch.float64)
            for i, three in enumerate(zip(actual, plain, exact, strict=True)):
                cases += 1
                try:
                    assert_within_twice(*three)
                except AssertionError as error:
                    problems.append(f"{shape}, norm {norm}, result {i}: {error}")
    return {"cases": cases, "problems": problems}


# ---- running them ----


def run_stage(name: str, folder: Path, host_only: bool) -> Result:
    """A stage by name, in this process."""
    kind, _, which = name.partition(" ")
    if kind == "twin":
        return twins(folder, which, host_only)
    if kind in ("selftest", "rope"):
        return selftest(folder, which) if kind == "selftest" else rope(which)
    return {"environment": environment, "build": build}[kind](folder)


def run_apart(name: str, arguments: argparse.Namespace, seconds: float) -> Result:
    """A stage by name, in a process of its own."""
    command = [sys.executable, __file__, "--stage", name, "--build", str(arguments.build)]
    command += ["--host-only"] * arguments.host_only
    begin = time.monotonic()
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False
        )
        last = (result.stdout.strip().splitlines() or [""])[-1]
        found = json.loads(last) if result.returncode == 0 else None
        error = f"exit status {result.returncode}: {result.stderr[-2000:]}"
    except subprocess.TimeoutExpired:
        found, error = None, f"took more than {seconds:.0f} s"
    found = found or {"problems": [error]}
    problems = found.setdefault("problems", [])
    status = "failed" if problems else "skipped" if found.get("cases") == 0 else "passed"
    return {"stage": name, "status": status, "seconds": time.monotonic() - begin, **found}


def main() -> int:
    """Run all stages, or one; 0 if all passed, 1 if not, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", metavar="DIR")
    parser.add_argument("--build", type=Path, default=BUILD, metavar="DIR", help="of the executor")
    parser.add_argument("--host-only", action="store_true", help="some twins, without a GPU")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(run_stage(arguments.stage, arguments.build, arguments.host_only)))
        return 0

    gpu = output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").split("\n")[0]
    if not gpu and not arguments.host_only:
        print("gpu_suite: it needs a GPU and its driver, nvidia-smi names none; try --host-only")
        return 2
    begin, stages = time.monotonic(), []
    folder = arguments.output / ("host" if arguments.host_only else gpu.lower().replace(" ", "-"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.now(timezone.utc):%Y-%m-%dT%H-%M-%S}.json"

    def stage(name: str) -> None:
        left = arguments.minutes * 60 - (time.monotonic() - begin)
        if left < 5:
            found = {"status": "not run", "seconds": 0.0, "problems": ["no time left"]}
            found["stage"] = name
        else:
            found = run_apart(name, arguments, min(left, STAGE_SECONDS[name.split()[0]]))
        stages.append(found)
        path.write_text(json.dumps({"gpu": gpu, "stages": stages}, indent=1) + "\n")
        print(f"{found['status']} {name}, {found['seconds']:.1f} s", flush=True)

    # The environment last of the first two, so that it tells of the libraries that are used.
    for name in () if arguments.host_only else ("build", "environment"):
        stage(name)
    try:
        functions = dict.fromkeys(
            one.function for one in twin.Machine(arguments.build / HOST).twins
        )
    except OSError as error:
        print(f"gpu_suite: no twin runs without {HOST}: {error}")
        functions = {}
    for function in functions:
        stage(f"twin {function}")
    if not arguments.host_only:
        for name in ("gemm_mma", "gemm_wgmma", "cluster_sum", "row_sums"):
            stage(f"selftest {name}")
        for dtype in DTYPES:
            stage(f"rope {dtype}")

    from keye_ops.table import print_table

    rows = [
        [
            s["stage"],
            s["status"],
            s.get("cases", ""),
            f"{s['seconds']:.1f}",
            (s["problems"] or [""])[0].strip().split("\n")[-1],
        ]
        for s in stages
    ]
    print_table(f"gpu_suite, {gpu or 'host'}", ["stage", "status", "cases", "s", "problem"], rows)
    print(f"saved {path}")
    return 0 if functions and not any(s["problems"] for s in stages) else 1


if __name__ == "__main__":
    sys.exit(main())
