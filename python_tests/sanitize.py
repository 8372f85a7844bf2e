"""Runs the tests of the native CPU ops under the address and undefined behaviour sanitizers."""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
PACKAGE = BUILD / "package" / "keye_ops"
TESTS = (
    "rope",
    "varlen_attention",
    "merge_norm",
    "add_layer_norm",
    "add_rms_norm",
    "patch_embed",
    "patchify",
    "linear_gelu",
    "fuzz",
    "malformed",
)
# Compilers and the host executor are not the subject here, nor are the faults that fuzzing must
# find; the tests of lesser instruction sets run themselves again.
NOT_SELECTED = (
    *("compile", "export", "lesser", "fault_is_reported"),
    *("host_cuda", "cuda_threads", "random_launches", "several_schedules"),
)
CAPABILITIES = ("", "avx2", "default")  # "" is the best of this CPU

FAULT = """
import ctypes, torch
fault = ctypes.CDLL({library!r})
x = torch.zeros(1024)
fault.read_at.argtypes = [ctypes.c_void_p, ctypes.c_int64]
fault.read_at(x.data_ptr(), 1023)
fault.add(2**30, 2**30 - 1)
print("no fault yet", flush=True)
{statement}
"""
FAULTS = {
    "fault.read_at(x.data_ptr(), 1024)": "heap-buffer-overflow",
    "fault.add(2**30, 2**30)": "signed integer overflow",
}
WHICH = "import keye_ops.extension as e; print(e.libraries[0].path or e.libraries[0].error)"


def build() -> None:
    """Put a copy of the package with a sanitized library, and the planted faults, into BUILD."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "keye_ops", PACKAGE, ignore=ignored, dirs_exist_ok=True)
    shutil.copytree(ROOT / "bench", PACKAGE / "bench", ignore=ignored, dirs_exist_ok=True)
    folder = Path(torch.__file__).parent
    configure = [
        "cmake",
        "-S",
        ROOT,
        "-B",
        BUILD,
        "-DKEYE_SANITIZE=ON",
        f"-DKEYE_TORCH_INCLUDE={folder / 'include'}",
        f"-DKEYE_TORCH_LIB={folder / 'lib'}",
        f"-DKEYE_PYTHON_INCLUDE={sysconfig.get_paths()['include']}",
        f"-DKEYE_OUTPUT_DIR={PACKAGE}",
    ]
    subprocess.run(configure, check=True)
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    subprocess.run(["cmake", "--build", BUILD, "--parallel", jobs], check=True)


def environment(capability: str) -> dict[str, str]:
    """Variables of a process that loads the sanitized library."""
    compiler = os.environ.get("CXX", "g++")
    runtimes = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    variables = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        # Python and torch keep memory until the end.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": str(PACKAGE.parent),
        "KEYE_OPS_FUZZ_EXAMPLES": os.environ.get("KEYE_OPS_FUZZ_EXAMPLES", "150"),
    }
    variables.pop("KEYE_OPS_CPU_CAPABILITY", None)
    return variables | ({"KEYE_OPS_CPU_CAPABILITY": capability} if capability else {})


def catch_faults() -> None:
    """Fail unless each planted fault ends its process with the right report."""
    library = str(PACKAGE / "sanitize_fault.abi3.so")
    for statement, report in FAULTS.items():
        code = FAULT.format(library=library, statement=statement)
        result = subprocess.run(
            [sys.executable, "-c", code],
            env=environment(""),
            cwd=BUILD,
            capture_output=True,
            text=True,
            check=False,
        )
        caught = result.returncode != 0 and report in result.stderr
        if not caught or "no fault yet" not in result.stdout:
            sys.exit(f"{statement} must end in {report!r}, got:\n{result.stdout}{result.stderr}")
        print(f"planted fault caught: {report}", flush=True)


def run_tests(capability: str) -> None:
    """Run the op tests with one instruction set; fail on a report or a failed test."""
    begin = time.monotonic()
    # Not in ROOT: its unsanitized package would come first.
    settings = {"env": environment(capability), "cwd": BUILD}
    loaded = subprocess.check_output([sys.executable, "-c", WHICH], text=True, **settings).strip()
    if Path(loaded).parent != PACKAGE:
        sys.exit(f"the tests must load the sanitized library in {PACKAGE}, got {loaded}")
    files = [path for name in TESTS if (path := ROOT / f"python_tests/test_{name}.py").exists()]
    command = [sys.executable, "-m", "pytest", "-x", "-s", "-p", "no:cacheprovider"]
    # A report ends its process.
    selected = " and ".join(f"not {word}" for word in NOT_SELECTED)
    command += ["-n", "auto", "--dist", "loadfile", "--max-worker-restart", "0"]
    subprocess.run([*command, "-k", selected, *files, *sys.argv[1:]], check=True, **settings)
    seconds = time.monotonic() - begin
    print(f"no report with {capability or 'the best instruction set'}, {seconds:.0f} s", flush=True)


build()
catch_faults()
for capability in CAPABILITIES:
    run_tests(capability)
