"""``keye-ops info``: what is available here, and why the rest is not."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from typing import Any

import torch

from keye_ops import dispatch, extension
from keye_ops._version import __version__

HELP = "Print every op, backend and architecture with its availability, and how things were built."

# The dispatcher's names, by public op.
OPS = {
    "patchify": "patchify",
    "patch_embed": "patch_embed",
    "rope_2d": "rope",
    "rope_2d_": "rope_",
    "rope_3d": "rope",
    "rope_3d_": "rope_",
    "varlen_attention": "varlen_attention",
    "add_layer_norm": "add_layer_norm",
    "layer_norm": "add_layer_norm",
    "add_rms_norm": "add_rms_norm",
    "rms_norm": "add_rms_norm",
    "merge_norm": "merge_norm",
    "linear_gelu": "linear_gelu",
}
# Public ops without a kernel of their own.
COMPOSITES = {"projector": "made of merge_norm and linear_gelu"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def collect() -> dict[str, Any]:
    """Everything that the command prints, ready for JSON."""
    cpu, cuda = extension.libraries
    return {
        "keye_ops": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "machine": platform.machine(),
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("KEYE_OPS_")},
        "libraries": [_library(library) for library in (cpu, cuda)],
        "ops": [
            {"op": op, "backend": backend, "architecture": architecture, "status": status}
            for op, name in OPS.items()
            for backend, architecture, status in _backends(name, cpu, cuda)
        ]
        + [
            {"op": op, "backend": "-", "architecture": "-", "status": status}
            for op, status in COMPOSITES.items()
        ],
    }


def _library(library: extension.NativeLibrary) -> dict[str, Any]:
    loaded = library.error is None
    return {
        "name": library.name,
        "path": library.path,
        "build": library.build,
        "status": "loaded" if loaded else f"not loaded: {library.error}",
    }


def _gpu(index: int) -> dict[str, str]:
    major, minor = torch.cuda.get_device_capability(index)
    return {"name": torch.cuda.get_device_name(index), "capability": f"{major}.{minor}"}


def _backends(
    name: str, cpu: extension.NativeLibrary, cuda: extension.NativeLibrary
) -> list[tuple[str, str, str]]:
    """(backend, architecture, status) of one op, best first."""
    rows = [("reference", "any device", "available")]
    if cpu.error is not None:
        rows.append(("cpu", "-", f"not available: _C is {_reason(cpu)}"))
    elif not dispatch.has_kernel(name, "cpu"):
        rows.append(("cpu", "-", "not available: no native kernel yet"))
    else:
        best = sys.modules["keye_ops._C"].cpu_capability
        for isa in cpu.build["isas"]:
            used = " (in use)" if isa == best else ""
            rows.append(("cpu", isa, f"available{used}"))
    if cuda.error is not None:
        rows.append(("cuda", "-", f"not available: _C_cuda is {_reason(cuda)}"))
    elif not dispatch.has_kernel(name, "cuda"):
        rows.append(("cuda", "-", "not available: no native kernel yet"))
    else:
        seen = "available" if torch.cuda.is_available() else "built, no GPU visible"
        rows += [("cuda", f"sm_{arch}", seen) for arch in cuda.build.get("cuda_archs", ())]
    return rows


def _reason(library: extension.NativeLibrary) -> str:
    return f"not loaded ({library.error})"


def run(arguments: argparse.Namespace) -> int:
    """Print the tables, or JSON."""
    facts = collect()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    from keye_ops.table import print_table

    gpus = ", ".join(f"{g['name']} (sm_{g['capability'].replace('.', '')})" for g in facts["gpus"])
    versions = [
        ["keye_ops", facts["keye_ops"]],
        ["python", f"{facts['python']} on {facts['machine']}"],
        ["torch", f"{facts['torch']}, CUDA {facts['torch_cuda'] or 'none'}"],
        ["GPUs", gpus or "none visible"],
        *[[key, value] for key, value in facts["environment"].items()],
    ]
    for library in facts["libraries"]:
        versions.append([library["name"], library["status"]])
        versions += [["", library["path"]]] if library["path"] else []
        versions += [["", f"{key}: {_flat(value)}"] for key, value in library["build"].items()]
    print_table("keye-ops", ["", ""], versions)
    rows = [list(row.values()) for row in facts["ops"]]
    print_table("Ops", ["op", "backend", "architecture", "status"], rows)
    return 0


def _flat(value: object) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)
