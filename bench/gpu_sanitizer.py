"""Stage sanitizer: compute-sanitizer over a few calls of every op, where it sees planted faults."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_runner import Context, Found, NotRun

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PLANTED = "planted faults"
_FAULT = 77  # exit status that compute-sanitizer gives where it has found something
_MEMORY = """
__global__ void fault(float* x, int past) { x[threadIdx.x + past] = 1.0f; }
"""
_RACE = """
__global__ void fault(float* x, int past) {
  __shared__ float values[64];
  values[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = values[63 - threadIdx.x];  // a barrier is missing
}
"""
_MAIN = """
#include <cstdio>
int main() {
  float* x = nullptr;
  if (cudaMalloc(&x, 64 * sizeof(float)) != cudaSuccess) return 3;
  cudaMemset(x, 0, 64 * sizeof(float));
  fault<<<1, 64>>>(x, PAST);
  cudaDeviceSynchronize();
  return 0;
}
"""
_sound: set[str] = set()


def items(context: Context) -> list[str]:
    """The planted faults, then every op under every tool."""
    return [PLANTED, *(f"{tool} of {what}" for tool in TOOLS for what in ("twins", "ops"))]


def run(item: str, context: Context) -> Found:
    """One of them."""
    tool = find_tool()
    if item == PLANTED:
        return planted(tool, context)
    name, what = item.split(" of ")
    sound = tools_that_work(tool, context)
    if "memcheck" not in sound or (name == "racecheck" and name not in sound):
        raise NotRun(f"the sanitizer does not work here: {name} misses a planted fault")
    # NOTE: without torch, twins start in a second under a tool that slows all down.
    code = _TWINS if what == "twins" else _OPS
    root = Path(__file__).resolve().parents[1]
    paths = [str(root / "bench"), str(root), str(root / "python_tests")]
    command = [sys.executable, "-c", code.format(paths=paths, build=str(context.build))]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else arrays lie inside of others
    status, text = sanitized(tool, name, command, max(context.share(2), 10), environment)
    if status is None:
        raise NotRun("takes longer than the time that was left")
    ran = text.count("RAN ")
    return {"cases": ran, "problems": verdict(status, text, ran)}


def verdict(status: int, text: str, ran: int) -> list[str]:
    """What a run under the sanitizer tells."""
    lines = [line for line in text.splitlines() if line.startswith("=========")]
    findings = [line for line in lines if re.search(r"Invalid|Race|Uninit|Barrier|hazard", line)]
    if status == _FAULT or findings:
        return [" ".join(findings[:3])[:500] or text[-500:]]
    if status != 0 or not ran:
        return [f"exit status {status}: {text[-500:]}"]
    return []


def find_tool() -> str:
    """The program."""
    places = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/bin")
    found = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(places)
    )
    if not found:
        raise NotRun("compute-sanitizer is not installed")
    return found


def sanitized(
    tool: str, name: str, command: list[str], seconds: float, environment: dict[str, str]
) -> tuple[int | None, str]:
    """Exit status and output of a program under a tool; no status if it takes too long."""
    words = [tool, "--tool", name, "--error-exitcode", str(_FAULT), "--print-limit", "5", *command]
    if name == "memcheck":
        words[3:3] = ["--padding", "64"] if "--padding" in _help(tool) else []
    try:
        result = subprocess.run(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return result.returncode, result.stdout


def _help(tool: str) -> str:
    result = subprocess.run([tool, "--help"], capture_output=True, text=True, check=False)
    return result.stdout


def planted(tool: str, context: Context) -> Found:
    """Each tool must report the fault that is its own, and nothing in a program without one."""
    sound = tools_that_work(tool, context)
    absent = {"memcheck", "racecheck"} - sound
    if "memcheck" in absent:
        raise NotRun("the sanitizer does not work here: it misses a planted write past the end")
    return {"cases": 2, "facts": {"see their faults": sorted(sound)}}


def tools_that_work(tool: str, context: Context) -> set[str]:
    """memcheck and racecheck, if they report a planted fault and no other."""
    if not _sound:
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        if not Path(nvcc).exists():
            raise NotRun("the sanitizer cannot be tried: no nvcc to build planted faults")
        with tempfile.TemporaryDirectory() as folder:
            for name, kernel, past in (("memcheck", _MEMORY, 64), ("racecheck", _RACE, 0)):
                faulty = _compile(nvcc, folder, name, kernel + _MAIN.replace("PAST", str(past)))
                right = _MEMORY + _MAIN.replace("PAST", "0")
                good = _compile(nvcc, folder, f"{name}_good", right)
                bad_status, _ = sanitized(tool, name, [faulty], 30, {})
                good_status, _ = sanitized(tool, name, [good], 30, {})
                if (bad_status, good_status) == (_FAULT, 0):
                    _sound.add(name)
        _sound.add("tried")
    return _sound - {"tried"}


def _compile(nvcc: str, folder: str, name: str, source: str) -> str:
    path = Path(folder) / f"{name}.cu"
    path.write_text(source)
    program = str(path.with_suffix(""))
    command = [nvcc, "-arch=native", "-lineinfo", "-o", program, str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return program


_TWINS = """
import sys; sys.path[:0] = {paths}
from pathlib import Path
import twin
machine = twin.Machine(Path({build!r}) / "twin_cuda.so")
seen = set()
for one in machine.twins:
    if one.function in seen:
        continue
    seen.add(one.function)
    for label, words in twin.inputs(one, 0):
        machine.run(one, words)
    print("RAN", one.name, flush=True)
"""
_OPS = """
import sys; sys.path[:0] = {paths}
import torch, gpu_cases, gpu_device
from pathlib import Path
from gpu_runner import Context
context = Context("sanitizer", "cuda", Path({build!r}))
for name in gpu_cases.names():
    if not gpu_device.has_kernel(gpu_cases.op_of(name), context):
        continue
    for dtype in ("bf16", "fp32"):
        gpu_cases.make(name, dtype, "cuda", False).results()
        torch.cuda.synchronize()
    print("RAN", name, flush=True)
"""
