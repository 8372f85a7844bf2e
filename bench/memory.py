"""Memory that calls need, on the CPU and on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable
from pathlib import Path

import torch


def peak_bytes(provider: Callable[[], object], device: str) -> int | None:
    """Memory that one call needs at its peak beyond what is held before it, its result included.

    On the CPU the growth of the process's resident high-water mark, which Linux lets us reset; so
    buffers of native code count too. None where that cannot be read.
    """
    if device.startswith("cuda"):
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        provider()
        return torch.cuda.max_memory_allocated() - held
    try:
        _return_free_memory()
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        provider()
        return max(_status_bytes("VmHWM") - before, 0)
    except (OSError, KeyError):
        return None


def _return_free_memory() -> None:
    """Give freed memory back to the system; what stays resident would hide a call's needs."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[key].split()[0]) * 1024


def available_bytes(device: str = "cpu") -> float:
    """Memory that is free for the taking, or no limit where that is unknown."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(dict(line.split(":", 1) for line in lines)["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return math.inf
