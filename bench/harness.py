"""How every benchmark is timed: interleaved rounds, medians with spread, this machine's own limits.

A script ``bench_<op>.py`` lists cases; a case builds providers on random data (never zeros, which
are faster to multiply); the harness times all providers of a case in turns, so that a drift of the
machine hits all alike. Nothing here asserts.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from keye_ops.bench.memory import available_bytes, peak_bytes
from keye_ops.bench.timer import synchronize, timer_of

Provider = Callable[[], object]

_MEMORY_LIMIT = 8e9  # bytes that one provider may need, where so much is available
_CALL_LIMIT = 60.0  # seconds: a provider whose one call takes longer is skipped
_SLOW_CALL = 8.0  # seconds: such a call is not repeated for its own sake


@dataclass(frozen=True)
class Skip:
    """A provider that is not timed, and why."""

    reason: str


@dataclass(frozen=True)
class Settings:
    """What the command line chose.

    Attributes:
        quick: representative shapes only, few rounds, nothing that has to be compiled first.
        rounds: at most so many timed calls a provider.
        seconds: about so long for all timed calls of a provider, and three calls at least (one if
            quick, or if a call takes many seconds).
        layers: of the vision tower.
        compile: whether to time what has to be compiled first; None leaves it to ``quick``.
    """

    device: str = "cpu"
    quick: bool = False
    rounds: int = 31
    seconds: float = 2.0
    layers: int = 3
    seed: int = 0
    compile: bool | None = None

    @property
    def skips_compilation(self) -> bool:
        """Whether what has to be compiled first is left out."""
        return self.quick if self.compile is None else not self.compile


@dataclass
class Workload:
    """The providers of a case; the first of ours is the one that README's table shows.

    Attributes:
        ours: keye_ops.
        peers: what a user would otherwise call for the same result.
        yardsticks: what bounds the case or is a part of it, such as a copy of the same bytes.
    """

    ours: dict[str, Provider | Skip]
    peers: dict[str, Provider | Skip]
    yardsticks: dict[str, Provider | Skip] = field(default_factory=dict)

    def providers(self) -> Iterable[tuple[str, str, Provider | Skip]]:
        """(role, name, provider) of all."""
        roles = {"ours": self.ours, "peer": self.peers, "yardstick": self.yardsticks}
        for role, providers in roles.items():
            for name, provider in providers.items():
                yield role, name, provider


@dataclass(frozen=True)
class Case:
    """One op on one shape.

    Attributes:
        op: name of the script without ``bench_``.
        group: cases of one group are one line in a plot.
        shape: what is processed, in words.
        size: how many of ``unit`` that is.
        dtype: of weights and activations.
        num_bytes: least traffic with memory.
        flops: useful floating-point operations; 0 for an op that only moves data.
        build: makes the inputs and the providers.
        mode: ``"forward"``, or ``"full"`` for forward and backward.
        quick: part of ``--quick``.
        headline: the op's row in README's table.
    """

    op: str
    group: str
    shape: str
    size: int
    dtype: torch.dtype
    num_bytes: int
    flops: int
    build: Callable[[], Workload]
    unit: str = "patches"
    mode: str = "forward"
    quick: bool = False
    headline: bool = False

    @property
    def dtype_name(self) -> str:
        """Without ``torch.``."""
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Timing:
    """One provider on one case; times in milliseconds."""

    op: str
    group: str
    shape: str
    size: int
    unit: str
    dtype: str
    mode: str
    headline: bool
    role: str  # "ours", "peer" or "yardstick"
    provider: str
    median: float
    low: float  # 20th percentile
    high: float  # 80th percentile
    rounds: int
    num_bytes: int
    flops: int
    percent_of_limit: float
    limit: str  # "copy" or "gemm": what bounds the case
    peak_bytes: int | None  # memory that one call needs at its peak, or None if unknown

    @property
    def gigabytes_per_second(self) -> float:
        """At the least possible traffic."""
        return self.num_bytes / self.median / 1e6

    @property
    def gigaflops_per_second(self) -> float:
        """Useful ones only."""
        return self.flops / self.median / 1e6


@dataclass(frozen=True)
class Skipped:
    """A provider that was not timed on a case."""

    op: str
    shape: str
    dtype: str
    mode: str
    provider: str
    reason: str


@dataclass
class Limits:
    """What this machine can do, measured in the run that is compared with it.

    Attributes:
        copy: GB/s read and written by a copy far larger than the caches.
        gemm: GFLOP/s of the best F.linear of a few large shapes, by dtype.
    """

    copy: float
    gemm: dict[str, float] = field(default_factory=dict)

    @classmethod
    def measure(cls, dtypes: Iterable[torch.dtype], settings: Settings) -> Limits:
        """Time a large copy, and large matrix products of every dtype."""
        on_gpu = settings.device.startswith("cuda")
        num_bytes = 2 << 30 if on_gpu else 256 << 20  # more than any cache
        best = _best(copy_of(2 * num_bytes, settings.device), 5, settings.device)
        limits = cls(2 * num_bytes / best / 1e9)
        shapes = [(2048, 2048, 2048), (2048, 1152, 4304), (2048, 4608, 4608)]
        shapes = [(8192, 8192, 8192), (8192, 4608, 4608)] if on_gpu else shapes
        for dtype in dtypes:
            rates = []
            for m, k, n in shapes[: 2 if settings.quick else 3]:
                x, weight = (torch.randn(r, k, device=settings.device).to(dtype) for r in (m, n))
                linear = lambda x=x, weight=weight: F.linear(x, weight)  # noqa: E731
                rates.append(2 * m * k * n / _best(linear, 5, settings.device) / 1e9)
            limits.gemm[str(dtype).removeprefix("torch.")] = max(rates)
        return limits

    def milliseconds(self, case: Case, copy: float | None = None) -> tuple[float, str]:
        """The least time of a case, and what bounds it; ``copy`` is the case's own GB/s."""
        moving = case.num_bytes / (copy or self.copy) / 1e6
        computing = case.flops / self.gemm[case.dtype_name] / 1e6 if case.flops else 0.0
        return max(moving, computing), "gemm" if computing > moving else "copy"


# ---- formulas ----


def attention_flops(
    lengths: Sequence[int],
    num_heads: int,
    head_dim: int,
    causal: bool = False,
    mode: str = "forward",
) -> int:
    """Useful ones at the true head_dim: 4 S² H D a segment, half if causal; backward is 2.5 x."""
    forward = sum(4 * s * s for s in lengths) * num_heads * head_dim // (2 if causal else 1)
    return forward if mode == "forward" else forward * 7 // 2


def linear_flops(m: int, k: int, n: int, mode: str = "forward") -> int:
    """2 M K N; three times that with the gradients of x and weight."""
    return 2 * m * k * n * (1 if mode == "forward" else 3)


# ---- timing ----


@dataclass
class Measured:
    """Milliseconds of every call by provider, peak bytes of one, and why others have no times."""

    times: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, int | None] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def _best(provider: Provider, calls: int, device: str) -> float:
    """Seconds of the fastest call."""
    timer = timer_of(device)
    return min(timer.seconds(provider) for _ in range(calls + 1))


def measure(
    providers: dict[str, Provider], settings: Settings, progress: Callable[[str], object] = str
) -> Measured:
    """Time all providers in turns.

    A round calls each provider once. One that is slow takes part in fewer rounds, evenly spread.
    """
    result, timer = Measured(), timer_of(settings.device)
    turns: dict[str, int] = {}
    for name, provider in providers.items():
        progress(name)
        try:
            seconds, result.peaks[name] = _warm_up(provider, settings.device)
        except Exception as error:  # a peer that breaks is no reason to lose the others
            first_line = (str(error).splitlines() or [""])[0]
            result.failed[name] = f"failed: {type(error).__name__}: {first_line}"[:200]
            continue
        if seconds > _CALL_LIMIT:
            result.failed[name] = f"one call takes {seconds:.0f} s"
            continue
        least = 1 if settings.quick or seconds > _SLOW_CALL else 3
        turns[name] = min(settings.rounds, max(least, int(settings.seconds / seconds)))
    result.times = {name: [] for name in turns}
    rounds = max(turns.values(), default=0)
    for index in range(rounds):
        for name, count in turns.items():
            if (index + 1) * count // rounds > index * count // rounds:
                progress(name)
                result.times[name].append(timer.seconds(providers[name]) * 1e3)
    return result


def _warm_up(provider: Provider, device: str) -> tuple[float, int | None]:
    """Seconds and peak memory of a call after the one that faults pages in, or compiles."""
    begin = time.perf_counter()
    peak = peak_bytes(provider, device)
    synchronize(device)
    seconds = time.perf_counter() - begin
    if seconds > _SLOW_CALL and not getattr(provider, "compiles", False):
        return seconds, peak
    begin = time.perf_counter()
    peak = peak_bytes(provider, device)
    synchronize(device)
    return time.perf_counter() - begin, peak


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile (of the values themselves, not interpolated)."""
    ordered = sorted(values)
    fifth = len(ordered) // 5
    return statistics.median(ordered), ordered[fifth], ordered[-1 - fifth]


def run_case(
    case: Case, settings: Settings, limits: Limits, progress: Callable[[str], object] = str
) -> tuple[list[Timing], list[Skipped]]:
    """Build a case and time its providers."""
    torch.manual_seed(settings.seed)
    where = (case.op, case.shape, case.dtype_name, case.mode)
    with torch.inference_mode() if case.mode == "forward" else contextlib.nullcontext():
        workload = case.build()
        roles, providers, skipped = {}, {}, []
        for role, name, provider in workload.providers():
            if isinstance(provider, Skip):
                skipped.append(Skipped(*where, name, provider.reason))
            else:
                roles[name], providers[name] = role, provider
        measured = measure(providers, settings, progress)
    skipped += [Skipped(*where, name, reason) for name, reason in measured.failed.items()]
    times = measured.times
    # Small data stays in the caches, for the op as for a copy: take the copy that was timed beside.
    copy = case.num_bytes / statistics.median(times["copy"]) / 1e6 if "copy" in times else None
    least, limit = limits.milliseconds(case, copy)
    timings = []
    for name, values in times.items():
        median, low, high = spread(values)
        timings.append(
            Timing(
                op=case.op,
                group=case.group,
                shape=case.shape,
                size=case.size,
                unit=case.unit,
                dtype=case.dtype_name,
                mode=case.mode,
                headline=case.headline,
                role=roles[name],
                provider=name,
                median=median,
                low=low,
                high=high,
                rounds=len(values),
                num_bytes=case.num_bytes,
                flops=case.flops,
                percent_of_limit=100 * least / median,
                limit=limit,
                peak_bytes=measured.peaks[name],
            )
        )
    return timings, skipped


# ---- memory ----


def if_it_fits(num_bytes: float, provider: Provider, device: str = "cpu") -> Provider | Skip:
    """The provider, or a Skip if it needs more memory than there is."""
    limit = 0.8 * available_bytes(device)
    limit = limit if device.startswith("cuda") else min(_MEMORY_LIMIT, limit)
    if num_bytes <= limit:
        return provider
    return Skip(f"needs {num_bytes / 1e9:.0f} GB of memory")


# ---- yardsticks ----


def copy_of(num_bytes: int, device: str) -> Provider:
    """Read and write as many bytes as an op does that reads and writes ``num_bytes`` in all."""
    source = torch.randint(0, 255, (num_bytes // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def clone_of(num_bytes: int, device: str) -> Provider:
    """The same into fresh memory, as an op that is not in place has to."""
    source = torch.randint(0, 255, (num_bytes // 2,), dtype=torch.uint8, device=device)
    return source.clone


def copies(num_bytes: int, device: str) -> dict[str, Provider | Skip]:
    """Both copies, by the names that the tables use."""
    return {
        "copy": copy_of(num_bytes, device),
        "copy into fresh memory": clone_of(num_bytes, device),
    }


# ---- what the scripts share ----


def bytes_of(*tensors: torch.Tensor) -> int:
    """Sum of the tensors' sizes."""
    return sum(tensor.nbytes for tensor in tensors)


def random(
    *shape: int, dtype: torch.dtype, device: str = "cpu", scale: float = 1.0
) -> torch.Tensor:
    """Normal values."""
    return (torch.randn(*shape, device=device) * scale).to(dtype)


def with_gradients(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]
) -> Provider:
    """Forward and backward of ``function(*inputs)`` for random gradients of its result."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    gradients: list[torch.Tensor] = []

    def call() -> object:
        out = function(*leaves)
        if not gradients:
            gradients.append(torch.randn(out.shape, dtype=out.dtype, device=out.device))
        return torch.autograd.grad(out, leaves, gradients[0])

    return call


def in_mode(mode: str, function: Callable[..., Any], inputs: Sequence[Any]) -> Provider:
    """``function(*inputs)`` alone, or with its gradients."""
    return with_gradients(function, inputs) if mode == "full" else lambda: function(*inputs)


def environment() -> dict[str, str]:
    """Variables that change what the CPU libraries run."""
    prefixes = ("KEYE_OPS_", "ONEDNN_", "DNNL_", "OMP_", "KMP_", "MKL_", "ATEN_", "ZENTORCH_")
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith((*prefixes, "ZENDNN_"))}


SHAPES: dict[str, list[tuple[int, int, int]]] = {
    "image 378²": [(1, 27, 27)],
    "image 392²": [(1, 28, 28)],  # where 2 x 2 patches are merged
    "1-megapixel image": [(1, 72, 72)],
    "64 thumbnails": [(1, 16, 16)] * 64,
    "60-frame clip": [(60, 16, 20)],
    "1000-frame clip": [(1000, 12, 16)],
}
MERGED = [name for name in SHAPES if name != "image 378²"]
UNMERGED = [name for name in SHAPES if name != "image 392²"]


def patches(name: str) -> int:
    """Patches of a shape."""
    return sum(math.prod(grid) for grid in SHAPES[name])


def frame_lengths(name: str) -> list[int]:
    """Patches of every frame: the attention segments of Keye-VL-1.5."""
    return [h * w for t, h, w in SHAPES[name] for _ in range(t)]


def size_of(dtype: torch.dtype) -> int:
    """Bytes a value."""
    return torch.empty(0, dtype=dtype).element_size()


def reference(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function on the PyTorch references of all ops."""
    from keye_ops import dispatch

    def call(*args: Any) -> Any:
        with dispatch.backend("reference"):
            return function(*args)

    return call
