"""How long a call takes: by the clock on a CPU, between events on a GPU."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

_FLUSH_BYTES = 256 << 20  # more than any GPU's L2
_SLEEP_CYCLES = 200_000  # a tenth of a millisecond, in which the host launches what is timed


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


class Timer:
    """On a CPU."""

    def seconds(self, provider: Callable[[], object]) -> float:
        """Of one call."""
        begin = time.perf_counter()
        provider()
        return time.perf_counter() - begin


class EventTimer(Timer):
    """On a GPU: of the kernels of a call, with nothing in L2, nor a gap before the first one."""

    def __init__(self, device: str) -> None:
        shape = (_FLUSH_BYTES // 4,)
        self.flush = torch.randint(0, 9, shape, dtype=torch.int32, device=device)

    def seconds(self, provider: Callable[[], object]) -> float:
        """Of one call."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # NOTE: read, not written: dirty lines would be written back while the call is timed.
        self.flush.amax()
        if hasattr(torch.cuda, "_sleep"):
            torch.cuda._sleep(_SLEEP_CYCLES)
        begin.record()
        provider()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


@functools.cache
def timer_of(device: str) -> Timer:
    """The timer of a device."""
    return EventTimer(device) if device.startswith("cuda") else Timer()
