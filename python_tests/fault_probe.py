"""Runs one kernel under several schedules and prints the findings as JSON.

The libraries are those in KEYE_OPS_HOST_CUDA_DIR; ``planted_faults.py`` and the mutation tests put
changed ones there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import linear_gelu_probe
import norm_probe
import patch_embed_epilogue_probe
import patch_embed_probe
import patchify_probe
import rope_probe
import selftest_kernels as kernels

PROBES = {
    **norm_probe.PROBES,
    "linear_gelu": linear_gelu_probe,
    "patch_embed": patch_embed_probe,
    "patch_embed_epilogue": patch_embed_epilogue_probe,
    "patchify": patchify_probe,
    "rope": rope_probe,
}
SHAPES = {
    "gemm_mma": [(70, 72, 104), (64, 128, 256)],
    "gemm_wgmma": [(70, 72, 392), (64, 8, 64)],
    "cluster_sum": [(2, 4, 132), (1, 1, 8)],
    "row_sums": [(5, 132), (2, 600), (3, 64, 2**31 + 8)],
}


def schedules(executor: ModuleType) -> list[Any]:
    """In step as on a GPU, in order and late, reversed and early, and two at random."""
    order, completion = executor.Order, executor.Completion
    return [
        executor.Schedule(0, order.in_order, 1, completion.early),
        executor.Schedule(0, order.in_order, 0, completion.late),
        executor.Schedule(1, order.reversed, 0, completion.early),
        executor.Schedule(2, order.random, 4, completion.random, resident_clusters=2),
        executor.Schedule(3, order.random, 16, completion.late),
    ]


def library_of(kernel: str) -> str:
    """The library that has it."""
    return f"host_cuda_{kernel if kernel in PROBES else 'selftest'}.so"


def run(kernel: str, folder: Path) -> list[dict[str, Any]]:
    """The findings of every case and schedule."""
    executor = kernels.load(folder)
    executor.load_library(str(folder / library_of(kernel)))
    if kernel in PROBES:
        makers = PROBES[kernel].launches(executor)
    else:
        make = getattr(kernels, kernel)
        makers = [lambda shape=shape: make(executor, *shape) for shape in SHAPES[kernel]]
    runs = []
    for maker in makers:
        for schedule in schedules(executor):
            report, right = maker().run(executor, schedule)
            findings = findings_of(report)
            runs.append({"findings": findings, "right": right, "traffic": report.traffic})
    return runs


def findings_of(report: Any) -> list[dict[str, Any]]:
    """Kind, text and source lines of every finding."""
    return [
        {"kind": each.kind, "text": each.text, "places": each.places} for each in report.findings
    ]


def main() -> None:
    """Print the runs of the kernels named; with ``--strict``, fail where one is not clean."""
    folder = Path(os.environ["KEYE_OPS_HOST_CUDA_DIR"])
    names = [name for name in sys.argv[1:] if name != "--strict"]
    runs = [one for name in names for one in run(name, folder)]
    print(json.dumps(runs))
    if "--strict" in sys.argv and not all(one["right"] and not one["findings"] for one in runs):
        sys.exit("a run is wrong or has findings")


if __name__ == "__main__":
    main()
