"""Stages build and environment: the libraries, made if need be; and everything they depend on."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import twin
from gpu_kernels import CUDA, HOST
from gpu_runner import Context, Found, NotRun

ROOT = Path(__file__).resolve().parents[1]
_NVIDIA = (
    *("name", "driver_version", "vbios_version", "compute_cap", "memory.total", "memory.used"),
    *("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.draw", "power.limit"),
    *("temperature.gpu", "utilization.gpu", "pstate", "ecc.mode.current", "mig.mode.current"),
    *("clocks_event_reasons.active", "compute_mode", "persistence_mode"),
)
_PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "liger-kernel", "flash-attn", "flash-attn-3"),
    *("flash-attn-4", "xformers", "hypothesis", "pytest", "nvidia-cudnn-cu13", "nvidia-cublas"),
)


def items(context: Context) -> list[str]:
    """What each stage does."""
    if context.stage == "build":
        return ["libraries"]
    return ["machine", "gpu", "software", "sources", "ops"]


def run(item: str, context: Context) -> Found:
    """One of them."""
    if context.stage == "build":
        return build(context)
    return {"facts": globals()[f"{item}_facts"](context)}


def output_of(*command: Any) -> str:
    """What a program prints, stripped, or nothing where it fails or is absent."""
    try:
        result = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, cwd=ROOT, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


# ---- facts ----


def machine_facts(context: Context) -> Found:
    """The processor and the system."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def nvidia_smi(*fields: str) -> Found:
    """What nvidia-smi tells of the first GPU; a field that it does not know is left out."""
    query = ("nvidia-smi", "-i", "0", "--format=csv,noheader")
    values = output_of(*query, f"--query-gpu={','.join(fields)}")
    if values:
        return dict(zip(fields, (x.strip() for x in values.split(",")), strict=False))
    if len(fields) <= 1:
        return {}
    return {k: v for field in fields for k, v in nvidia_smi(field).items()}


def gpu_facts(context: Context) -> Found:
    """The GPU, its clocks and its power, as they are found."""
    if context.device != "cuda":
        raise NotRun("needs a GPU")
    import torch

    properties = torch.cuda.get_device_properties(0)
    names = ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
    names += ("shared_memory_per_block_optin", "shared_memory_per_multiprocessor")
    free, total = torch.cuda.mem_get_info()
    return {
        "nvidia_smi": nvidia_smi(*_NVIDIA),
        "properties": {n: getattr(properties, n) for n in names if hasattr(properties, n)},
        "free_bytes": free,
        "total_bytes": total,
    }


def software_facts(context: Context) -> Found:
    """Versions of everything that takes part."""
    import torch

    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    on_gpu = context.device == "cuda"
    return {
        "packages": found,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "nvcc": output_of("nvcc", "--version").splitlines()[-1:],
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("KEYE_OPS_")},
    }


def sources_facts(context: Context) -> Found:
    """The commit, and hashes of the sources and of the libraries that are used."""

    def digest(paths: list[Path]) -> str:
        return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]

    libraries = [*ROOT.glob("keye_ops/*.so"), *context.build.glob("*.so")]
    return {
        "commit": output_of("git", "rev-parse", "HEAD") or os.environ.get("COMMIT", "unknown"),
        "changed": output_of("git", "status", "--porcelain").splitlines(),
        "csrc": digest(sorted(path for path in ROOT.glob("csrc/**/*") if path.is_file())),
        "python": digest(sorted(ROOT.glob("keye_ops/**/*.py"))),
        "suite": digest(sorted(ROOT.glob("bench/*.py"))),
        "libraries": {path.name: digest([path]) for path in sorted(libraries)},
    }


def ops_facts(context: Context) -> Found:
    """What ``keye-ops info`` tells."""
    from keye_ops import info

    return info.collect()


# ---- building ----


def _run(*command: Any) -> str:
    words = list(map(str, command))
    result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {(result.stdout + result.stderr)[-3000:]}")
    return " ".join(Path(word).name for word in words)


def _generator() -> list[str]:
    return ["-GNinja"] if shutil.which("ninja") else []


def _architecture() -> str:
    """Of the GPU that is here, with the instructions that only it has."""
    capability = nvidia_smi("compute_cap").get("compute_cap", "9.0").replace(".", "")
    return f"{capability}a-real" if int(capability) >= 90 else f"{capability}-real"


def build(context: Context) -> Found:
    """Both kinds of libraries at a time: neither keeps all processors busy to its end."""
    makers = {"keye_ops": build_ops, "executor and twins": build_twins}
    begin = time.monotonic()
    facts: Found = {}
    problems = []
    with ThreadPoolExecutor() as pool:
        futures = {name: pool.submit(maker, context) for name, maker in makers.items()}
        for name, future in futures.items():
            try:
                facts[name] = future.result()
            except (RuntimeError, OSError, NotRun) as error:
                problems.append(f"{name}: {error}")
    facts["seconds"] = round(time.monotonic() - begin, 1)
    return {"facts": facts, "problems": problems}


def build_ops(context: Context) -> list[str]:
    """Use the extension libraries that load; make them otherwise, for this GPU alone."""
    if context.device != "cuda":
        return []
    load = "import torch, keye_ops._C, keye_ops._C_cuda; from keye_ops import dispatch; "
    # NOTE: a library that was built for another torch may load and not register: ask for an op.
    load += "assert dispatch.has_kernel('rope', 'cuda'); print(1)"
    if output_of(sys.executable, "-c", load):
        return []
    import torch

    package = Path(torch.__file__).parent
    include = output_of(
        sys.executable, "-c", "import sysconfig; print(sysconfig.get_paths()['include'])"
    )
    folder = ROOT / "build" / "gpu"
    options = [
        f"-DKEYE_TORCH_INCLUDE={package / 'include'}",
        f"-DKEYE_TORCH_LIB={package / 'lib'}",
        f"-DKEYE_PYTHON_INCLUDE={include}",
        f"-DKEYE_OUTPUT_DIR={ROOT / 'keye_ops'}",
        "-DKEYE_CUDA=ON",
        f"-DCMAKE_CUDA_ARCHITECTURES={_architecture()}",
    ]
    made = [_run("cmake", "-S", ROOT, "-B", folder, *_generator(), *options)]
    made.append(_run("cmake", "--build", folder, "--parallel", os.cpu_count()))
    if not output_of(sys.executable, "-c", load):
        raise RuntimeError("the libraries were built and do not load: try `keye-ops info`")
    return made


def build_twins(context: Context) -> list[str]:
    """The host executor and the twins; without a GPU they must be there."""
    on_gpu = context.device == "cuda"
    try:
        twin.Machine(context.build / HOST)
        if on_gpu:
            ctypes.CDLL(str(context.build / CUDA))
        return []
    except OSError:
        if not on_gpu and not shutil.which("cmake"):
            raise NotRun(f"{HOST} is not built") from None
    pybind11 = output_of(sys.executable, "-m", "pybind11", "--cmakedir")
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}"]
    if on_gpu:
        options.append(f"-DCMAKE_CUDA_ARCHITECTURES={_architecture()}")
    folder = context.build
    generator = [] if (folder / "CMakeCache.txt").exists() else _generator()
    source = ROOT / "csrc" / "host_executor"
    made = [_run("cmake", "-S", source, "-B", folder, *generator, *options)]
    names = (HOST, CUDA) if on_gpu else (HOST,)
    targets = [name.removesuffix(".so") for name in names]
    arguments = ("--parallel", os.cpu_count(), "--target", *targets)
    made.append(_run("cmake", "--build", folder, *arguments))
    return made
