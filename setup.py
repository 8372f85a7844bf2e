"""A thin shell over CMake: decides what to build, and says so.

No C++ compiler: a pure-Python package. A compiler: _C. nvcc as well: _C and _C_cuda, whether or not
a GPU is visible.

Environment:
    KEYE_OPS_NO_EXT=1      build no library
    KEYE_OPS_CUDA=0|1      forbid or require _C_cuda (default: build it where nvcc is found)
    KEYE_OPS_BUILD_TESTS=1 also build the host executor, for tests, into build/host_executor
    KEYE_OPS_CUDA_ARCHS    for example "80;90a" (default: all of 80;86;89;90a;100a;120a that this
                           nvcc knows, and PTX)
    CUDA_HOME, CXX, MAX_JOBS

GEMMs with fused epilogues are built where CUTLASS's headers are in reach: those of the PyPI package
nvidia-cutlass (``pip install --no-deps nvidia-cutlass==4.2.0.0``: its requirements are not ours).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
DEFAULT_ARCHS = ("80", "86", "89", "90a", "100a", "120a")


def say(text: str) -> None:
    """Print where pip shows it with -v, and always in the build's log."""
    print(f"keye_ops: {text}", file=sys.stderr, flush=True)


def environment_flag(name: str) -> bool | None:
    """The boolean of an environment variable, or None if it is unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def find_compiler() -> list[str] | None:
    """The C++ compiler as a command (``CXX`` may name a launcher before it), or None."""
    if wanted := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(wanted[0]) is None:
            raise SystemExit(f"keye_ops: CXX must name a program, got {os.environ['CXX']!r}")
        return wanted
    names = ("c++", "g++", "clang++")
    return next(([path] for name in names if (path := shutil.which(name))), None)


def missing_tool() -> str | None:
    """What keeps this machine from building a library, or None."""
    if not sys.platform.startswith("linux"):
        return f"libraries are built on Linux only, this is {sys.platform}"
    if find_compiler() is None:
        return "no C++ compiler was found"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "Python.h was not found (package python3-dev or python3-devel)"
    return None


def find_nvcc() -> str | None:
    """The CUDA compiler, or None."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [f"{home}/bin/nvcc" for home in homes if home]
    candidates.insert(1 if homes[0] else 0, "nvcc")
    return next((path for name in candidates if (path := shutil.which(name))), None)


def find_package(name: str) -> Path | None:
    """The folder of a package: in this environment, or in the one that pip isolates us from."""
    code = f"import importlib.util as u; s = u.find_spec('{name}'); print(s.origin if s else '')"
    for flags in ([], ["-I"]):
        command = [sys.executable, *flags, "-c", code]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.stdout.strip():
            return Path(result.stdout.strip()).parent
    return None


def torch_version(torch: Path) -> str:
    """The version of the torch in a folder, without importing it; at least 2.10."""
    found = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (torch / "version.py").read_text())
    if found and (int(found[2]), int(found[3])) < (2, 10):
        raise SystemExit(f"keye_ops: building needs torch >= 2.10, got {found[1]} in {torch}")
    return found[1] if found else "unknown"


def find_cutlass() -> tuple[Path | None, str]:
    """CUTLASS's include folder, or None, and what ``keye-ops info`` says of it."""
    package = find_package("cutlass_library")
    include = package / "source" / "include" if package else None
    if include is None or not (include / "cutlass" / "version.h").is_file():
        return None, "torch's: built without CUTLASS (package nvidia-cutlass)"
    text = (include / "cutlass" / "version.h").read_text()
    parts = [re.search(rf"CUTLASS_{name} (\d+)", text) for name in ("MAJOR", "MINOR", "PATCH")]
    version = tuple(int(part[1]) if part else 0 for part in parts)
    if version < (4, 2):
        found = ".".join(map(str, version))
        return None, f"torch's: CUTLASS must be 4.2 or later, found {found}"
    return include, f"fused, by CUTLASS {'.'.join(map(str, version))}"


def cuda_archs(nvcc: str) -> list[str]:
    """Architectures to compile for: the wanted ones that this nvcc knows."""
    wanted = os.environ.get("KEYE_OPS_CUDA_ARCHS", "")
    if wanted:
        return [arch for arch in re.split(r"[;, ]+", wanted) if arch]
    listing = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    # It lists sm_90 and not sm_90a, which it knows as well.
    known = set(re.findall(r"sm_(\d+)", listing.stdout))
    return [arch for arch in DEFAULT_ARCHS if arch.rstrip("a") in known]


def build_host_executor(cmake: str, jobs: str, torch: Path, library: Path) -> None:
    """Build what runs CUDA kernels on the CPU in tests; it does not belong to the package."""
    pybind11 = find_package("pybind11")
    if pybind11 is None:
        raise SystemExit("keye_ops: KEYE_OPS_BUILD_TESTS=1 requires pybind11, found none")
    build = ROOT / "build" / "host_executor"
    arguments = [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11 / 'share' / 'cmake' / 'pybind11'}",
        f"-DKEYE_TORCH_INCLUDE={torch / 'include'}",
        f"-DKEYE_C_LIBRARY={library}",
    ]
    source = ROOT / "csrc" / "host_executor"
    subprocess.run([cmake, "-S", str(source), "-B", str(build), *arguments], check=True)
    subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)


class CMakeBuild(build_ext):
    """Builds both libraries with one run of CMake."""

    def run(self) -> None:
        """Configure and build into the place where setuptools expects the first library."""
        output = Path(self.get_ext_fullpath("keye_ops._C")).parent.resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        for stale in output.glob("_C*.so"):  # of a build with other settings
            stale.unlink()
        torch = find_package("torch")
        if torch is None:
            raise SystemExit("keye_ops: building needs torch >= 2.10, found none")
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit("keye_ops: building needs cmake >= 3.18, found none")
        compiler = find_compiler()
        extra = {"torch": torch_version(torch)}
        arguments = [
            f"-DKEYE_TORCH_INCLUDE={torch / 'include'}",
            f"-DKEYE_TORCH_LIB={torch / 'lib'}",
            f"-DKEYE_PYTHON_INCLUDE={sysconfig.get_paths()['include']}",
            f"-DKEYE_OUTPUT_DIR={output}",
            f"-DKEYE_CUDA={'ON' if NVCC else 'OFF'}",
            f"-DCMAKE_CXX_COMPILER={compiler[-1]}",
            f"-DCMAKE_CXX_COMPILER_LAUNCHER={';'.join(compiler[:-1])}",
        ]
        if NVCC is not None:
            archs = cuda_archs(NVCC)
            extra["cuda_archs"] = archs
            cutlass, extra["gemms"] = find_cutlass()
            say(f"GEMMs are {extra['gemms']}")
            # Code for every architecture, and PTX of the last plain one for GPUs to come.
            plain = [arch for arch in archs if arch.isdigit()]
            codes = [f"{arch}-real" for arch in archs] + [f"{arch}-virtual" for arch in plain[-1:]]
            arguments += [
                f"-DCMAKE_CUDA_COMPILER={NVCC}",
                f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(codes)}",
                f"-DKEYE_CUTLASS_INCLUDE={cutlass or ''}",
            ]
        members = json.dumps(extra)[1:-1]
        arguments.append(f"-DKEYE_BUILD_INFO_EXTRA=, {members}")
        if ninja := shutil.which("ninja"):
            # Named, because the cache may hold the one of an isolated build that is gone.
            arguments += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        say(f"building {' and '.join(LIBRARIES)} against torch {extra['torch']} in {torch}")
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), *arguments], check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)
        if environment_flag("KEYE_OPS_BUILD_TESTS"):
            build_host_executor(cmake, jobs, torch, output / "_C.abi3.so")

    def get_outputs(self) -> list[str]:
        """The built files, for the wheel's record."""
        return [self.get_ext_fullpath(f"keye_ops.{name}") for name in LIBRARIES]


def choose_libraries() -> tuple[list[str], str | None]:
    """Names of the libraries to build, and nvcc if one of them needs it."""
    if environment_flag("KEYE_OPS_NO_EXT"):
        say("KEYE_OPS_NO_EXT=1: pure Python, every op runs its PyTorch reference")
        return [], None
    cuda = environment_flag("KEYE_OPS_CUDA")
    nvcc = find_nvcc() if cuda is not False else None
    if cuda and nvcc is None:
        raise SystemExit("keye_ops: KEYE_OPS_CUDA=1 requires nvcc, found none")
    if reason := missing_tool():
        if cuda:
            raise SystemExit(f"keye_ops: KEYE_OPS_CUDA=1 requires a compiler, but {reason}")
        say(f"{reason}: pure Python, every op runs its PyTorch reference")
        return [], None
    return ["_C", "_C_cuda"] if nvcc else ["_C"], nvcc


LIBRARIES, NVCC = choose_libraries()

setup(
    ext_modules=[Extension(f"keye_ops.{name}", [], py_limited_api=True) for name in LIBRARIES],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIBRARIES else {},
    # Only asked for where a library will be built and no torch is in reach.
    setup_requires=["torch>=2.10"] if LIBRARIES and find_package("torch") is None else [],
)
