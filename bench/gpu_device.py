"""What differs between a GPU, the host executor and a CPU: streams, graphs, memory, who computed.

Every call that only a GPU knows is here, in functions of a few lines, so that the stages can run
on a CPU with these exchanged.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_runner import Context, NotRun

from keye_ops import dispatch

Tensors = tuple[torch.Tensor, ...]


def type_of(context: Context) -> str:
    """Of tensors."""
    return "cuda" if context.device == "cuda" else "cpu"


# ---- who computes ----


def host_executor(context: Context) -> Any:
    """The module that runs CUDA kernels on tensors of the CPU."""
    if (context.build / "libhost_executor.so").exists():
        os.environ.setdefault("KEYE_OPS_HOST_CUDA_DIR", str(context.build))
    import host_cuda

    if reason := host_cuda.unavailable():
        raise NotRun(reason)
    return host_cuda


@contextlib.contextmanager
def kernels(context: Context, **schedule: Any) -> Iterator[list[str]]:
    """The kernels of the device in place; gives findings of the host executor, when it is left."""
    found: list[str] = []
    if context.device != "host_cuda":
        yield found
        return
    module = host_executor(context)
    with module.host_cuda(**schedule):
        yield found
        found += [report.text() for report in module.take_reports() if report.findings]


def has_kernel(op: str, context: Context) -> bool:
    """Whether there is a kernel for what stands for the device."""
    if context.device == "host_cuda":
        return op.rstrip("_") in host_executor(context).OPS
    return dispatch.has_kernel(op, type_of(context))


def need_kernel(op: str, context: Context) -> None:
    """Say that an item cannot be judged where only the reference would run."""
    if not has_kernel(op, context):
        raise NotRun(f"{op} has no kernel for {context.device}: its reference runs")


def implementation(op: str, context: Context) -> str:
    """``native`` or ``reference: why``, of what ran last."""
    last = dispatch.last_dispatch(op)
    if last is None:
        return "unknown"
    if last.implementation == "native" and not has_kernel(op, context):
        return "reference: no CUDA kernel"
    return "native" if last.implementation == "native" else f"reference: {last.reason}"


def synchronize(device: str) -> None:
    """Wait."""
    if device == "cuda":
        torch.cuda.synchronize()


# ---- memory ----


def free_bytes(device: str) -> int:
    """That an allocation may take."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines["MemAvailable"].split()[0]) * 1024


# ---- streams ----


@contextlib.contextmanager
def side_stream(device: str) -> Iterator[None]:
    """Another stream than the default one, which waits for it, and the other way round."""
    if device != "cuda":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


class Noise:
    """Work on a stream of its own: matrix products and copies, which compete for the GPU."""

    def __init__(self, device: str, size: int = 1024) -> None:
        self.device, self.stream = device, None
        if device == "cuda":
            self.stream = torch.cuda.Stream()
            self.a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
            self.b = torch.empty_like(self.a)

    def make(self) -> None:
        """Some more of it."""
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                torch.mm(self.a, self.a, out=self.b)
                self.b.copy_(self.a)


# ---- graphs ----


def capture(function: Callable[[], Tensors], device: str) -> tuple[Tensors, Callable[[], None]]:
    """Outputs that a replay fills anew, and the replay."""
    if device == "cuda":
        return _capture_graph(function)
    outputs = tuple(x.detach().clone() for x in function())

    def replay() -> None:
        for output, value in zip(outputs, function(), strict=True):
            output.copy_(value.detach())

    return outputs, replay


def _capture_graph(function: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
    with side_stream("cuda"):
        for _ in range(3):  # what is lazily made is made outside of the graph
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()

    def replay() -> None:
        graph.replay()

    replay.graph = graph
    return outputs, replay


# ---- syncs ----


@contextlib.contextmanager
def no_syncs(device: str) -> Iterator[None]:
    """Raise where the host would wait for the device."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
