"""The numbers to beat on an H200, and whether a run's benchmarks met them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Found = dict[str, Any]
Measured = tuple[float, float] | None  # a figure, and what it must reach

# What cases must be timed first, by the op's benchmark; parts of their shapes.
WANTED_SHAPES = {
    "varlen_attention": ("image 378²", "1-megapixel", "60-frame", "text 4k", "text 8k"),
    "rope": ("rope_2d, 1-megapixel", "rope_2d, 60-frame", "text 8k", "text 32k"),
    "patch_embed": ("1-megapixel", "60-frame"),
    "projector": ("Preview, 64 thumbnails", "Preview, 1-megapixel", "1.5, 1-megapixel"),
    "vision_tower": ("32 images", "8 thumbnails"),
    "merge_norm": ("1-megapixel",),
    "linear_gelu": ("1-megapixel",),
    "add_layer_norm": ("1-megapixel",),
    "add_rms_norm": ("text 8k",),
}


@dataclass(frozen=True)
class Target:
    """What must hold.

    Attributes:
        op: whose benchmark tells.
        text: the target in words.
        measure: from the runs of the op a figure and its bound, or None where it was not timed.
        unit: of the figure.
        parts: ops that must have kernels for it to count.
    """

    op: str
    text: str
    measure: Callable[[list[Found]], Measured]
    unit: str
    parts: tuple[str, ...] = ()


def gather(stages: list[Found]) -> Found:
    """The benchmarks of a run: limits, timings that know what they were timed beside, the rest."""
    limits, timings, skipped, implementations = {}, [], [], {}
    for stage in stages:
        if not stage["stage"].startswith("benchmarks"):
            continue
        for item in stage["items"]:
            facts = item.get("facts", {})
            limits = facts.get("limits", limits)
            own = facts.get("timings", [])
            timings += [timing | {"item": item["item"]} for timing in own]
            skipped += facts.get("skipped", [])
            implementations |= {item["item"]: facts.get("implementation", {})} if own else {}
    found = {"limits": limits, "timings": timings, "skipped": skipped}
    return found | {"implementations": implementations}


# ---- figures of a run ----


def _ours(run: Found) -> Found | None:
    return next((t for t in run["timings"] if t["role"] == "ours"), None)


def _best_peer(run: Found) -> Found | None:
    peers = [t for t in run["timings"] if t["role"] == "peer"]
    return min(peers, key=lambda t: t["median"], default=None)


def _named(run: Found, *names: str) -> Found | None:
    return next((t for t in run["timings"] if t["provider"] in names), None)


def _where(runs: list[Found], shape: str, mode: str = "forward") -> list[Found]:
    """Runs of a shape in bf16."""
    return [
        run
        for run in runs
        if shape in run["timings"][0]["shape"]
        and run["timings"][0]["mode"] == mode
        and run["timings"][0]["dtype"] == "bfloat16"
    ]


def _teraflops(timing: Found) -> float:
    return timing["flops"] / timing["median"] / 1e9


def _speed_up(shapes: Iterable[str], bound: float) -> Callable[[list[Found]], Measured]:
    """Ours against the best peer, of the worst shape and run."""

    def measure(runs: list[Found]) -> Measured:
        ratios = []
        for run in (run for shape in shapes for run in _where(runs, shape)):
            ours, peer = _ours(run), _best_peer(run)
            if ours and peer:
                ratios.append(peer["median"] / ours["median"])
        return (min(ratios), bound) if ratios else None

    return measure


def _over(shape: str, names: tuple[str, ...], bound: float) -> Callable[[list[Found]], Measured]:
    """Ours against a provider, whatever its role."""

    def measure(runs: list[Found]) -> Measured:
        for run in _where(runs, shape):
            ours, other = _ours(run), _named(run, *names)
            if ours and other:
                return other["median"] / ours["median"], bound
        return None

    return measure


def _rate(shape: str, bound: float) -> Callable[[list[Found]], Measured]:
    def measure(runs: list[Found]) -> Measured:
        timings = [t for run in _where(runs, shape) if (t := _ours(run))]
        return (max(map(_teraflops, timings)), bound) if timings else None

    return measure


def _backward(shape: str, bound: float) -> Callable[[list[Found]], Measured]:
    """Both passes less the forward pass: 2.5 times its FLOPs."""

    def measure(runs: list[Found]) -> Measured:
        forward = [t for run in _where(runs, shape) if (t := _ours(run))]
        full = [t for run in _where(runs, shape, "full") if (t := _ours(run))]
        if not forward or not full:
            return None
        time = full[0]["median"] - forward[0]["median"]
        flops = full[0]["flops"] - forward[0]["flops"]
        return (flops / time / 1e9, bound) if time > 0 else None

    return measure


def _of_limit(shape: str, bound: float) -> Callable[[list[Found]], Measured]:
    def measure(runs: list[Found]) -> Measured:
        timings = [t for run in _where(runs, shape) if (t := _ours(run))]
        return (max(t["percent_of_limit"] for t in timings), bound) if timings else None

    return measure


def _crops(runs: list[Found]) -> Measured:
    for run in _where(runs, "32 images"):
        ours = _ours(run)
        if ours and "of 27 layers" not in ours["shape"]:
            return 32 / ours["median"] * 1e3, 600
    return None


_TOWER = ("patch_embed", "rope_", "varlen_attention", "add_layer_norm", "linear_gelu")
_EAGER = ("eager",)
TARGETS = (
    Target(
        "varlen_attention", "vision, forward: 550 TFLOP/s", _rate("1-megapixel", 550), "TFLOP/s"
    ),
    Target(
        "varlen_attention",
        "vision, forward: 1.1 x the best peer",
        _speed_up(("1-megapixel",), 1.1),
        "x",
    ),
    Target(
        "varlen_attention",
        "vision, forward, S up to 1024: 1.3 x the best peer",
        _speed_up(("image 378²", "60-frame"), 1.3),
        "x",
    ),
    Target(
        "varlen_attention",
        "vision, backward: 430 TFLOP/s",
        _backward("1-megapixel", 430),
        "TFLOP/s",
    ),
    Target(
        "varlen_attention",
        "text, forward: 0.97 x the best peer",
        _speed_up(("text 4k", "text 8k"), 0.97),
        "x",
    ),
    Target("rope", "rope_2d in place: 90 % of copy", _of_limit("rope_2d, 60-frame", 90), "%"),
    Target("rope", "norm and rope_3d: 90 % of copy", _of_limit("text 32k", 90), "%"),
    Target("rope", "norm and rope_3d: 2 x eager", _over("text 32k", _EAGER, 2), "x"),
    Target(
        "patch_embed",
        "1.15 x F.linear alone",
        _over("1-megapixel", ("F.linear alone",), 1.15),
        "x",
    ),
    Target(
        "projector",
        "1.05 x the best peer",
        _speed_up(("Preview, 1-megapixel",), 1.05),
        "x",
        ("merge_norm", "linear_gelu"),
    ),
    Target(
        "projector",
        "3 x a loop over 64 small images",
        _over("64 thumbnails", ("eager, a call an image",), 3),
        "x",
        ("merge_norm", "linear_gelu"),
    ),
    Target("vision_tower", "600 crops of 378² a second", _crops, "crops/s", _TOWER),
)


# ---- judging ----


def judge(gpu: str, benchmarks: Found, stages: list[Found]) -> list[Found]:
    """Every target with ``met``, ``missed`` or ``not measured``, and why."""
    runs: dict[str, Found] = {}
    for timing in benchmarks.get("timings", []):
        runs.setdefault(timing["item"], {"timings": []})["timings"].append(timing)
    found = []
    for target in TARGETS:
        own = [run for run in runs.values() if run["timings"][0]["op"] == target.op]
        found.append(_verdict(target, own, benchmarks.get("implementations", {}), gpu))
    return [*found, *_of_stages(stages)]


def _verdict(target: Target, runs: list[Found], implementations: Found, gpu: str) -> Found:
    result = {"op": target.op, "target": target.text, "measured": "", "status": "not measured"}
    references = {
        name
        for run in runs
        for name, how in implementations.get(run["timings"][0]["item"], {}).items()
        if how != "native"
    }
    measured = target.measure(runs)
    if measured is None:
        return result
    value, bound = measured
    result["measured"] = f"{value:.3g} {target.unit}"
    result["value"] = value
    if references:
        result["status"] = f"not measured: {', '.join(sorted(references))} without a kernel"
    elif gpu and "H200" not in gpu:
        result["status"] = f"not measured: the target is an H200's ({gpu})"
    else:
        result["status"] = "met" if value >= bound else "missed"
    return result


def _of_stages(stages: list[Found]) -> list[Found]:
    """The tower's targets that are no figures."""
    items = {i["item"]: i for s in stages if s["stage"] == "syncs" for i in s["items"]}
    found = []
    for name, text in (("tower", "0 host syncs"), ("tower in a graph", "fits a CUDA graph")):
        status = items.get(name, {}).get("status")
        verdict = {"passed": "met", "not run": "not measured", None: "not measured"}
        found.append(
            {
                "op": "vision_tower",
                "target": text,
                "measured": "",
                "status": verdict.get(status, "missed"),
            }
        )
    return found
