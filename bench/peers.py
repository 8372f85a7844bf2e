"""What keye_ops is timed beside, where it is installed: torch.compile, zentorch, transformers.

zentorch is AMD's CPU plug-in (``pip install zentorch``, of the version that fits torch): attention,
linear layers with fused activations, and a backend of torch.compile. It runs on Intel CPUs too,
without their AMX tiles.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from keye_ops.bench.harness import Provider, Settings, Skip, in_mode, reference

import keye_ops


def compiled(
    function: Callable[..., Any],
    settings: Settings,
    *args: Any,
    backend: str = "inductor",
    mode: str = "forward",
) -> Provider | Skip:
    """``function(*args)`` on the references of ops, compiled by torch.compile at the first call.

    In mode "full" with the gradients of its arguments, which must be tensors then.
    """
    if backend == "zentorch":
        module = zentorch(settings)
        if isinstance(module, Skip):
            return module
    if settings.skips_compilation:
        when = "with --quick" if settings.quick else "timed on this case"
        return Skip(f"not {when}: it has to be compiled first")
    # A fresh start, or the shapes of the case before would make this one dynamic.
    torch.compiler.reset()
    # The references are chosen outside of the graph, where it breaks nothing.
    graph = reference(torch.compile(function, backend=backend))
    provider = in_mode(mode, graph, args)
    provider.compiles = True
    return provider


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def by_segment(attend: Attention, lengths: Sequence[int]) -> Attention:
    """A call a segment, as transformers does without FlashAttention.

    Takes packed [rows, heads, dim]; ``attend`` has [1, heads, rows, dim].
    """
    sizes = list(lengths)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = zip(*(x.transpose(0, 1)[None].split(sizes, 2) for x in (q, k, v)), strict=True)
        return torch.cat([attend(*part) for part in parts], 2)[0].transpose(0, 1)

    return call


def together(attend: Attention, lengths: Sequence[int]) -> Attention:
    """One call for all segments, which must have one length."""
    count = len(lengths)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v).transpose(1, 2).flatten(0, 1)

    return call


def with_attention(attend: Attention, provider: Provider | Skip) -> Provider | Skip:
    """A provider that runs the model, with another function in place of varlen_attention."""
    if isinstance(provider, Skip):
        return provider

    def replacement(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
        return attend(q, k, v)

    def call() -> Any:
        own, keye_ops.varlen_attention = keye_ops.varlen_attention, replacement
        try:
            return provider()
        finally:
            keye_ops.varlen_attention = own

    call.compiles = getattr(provider, "compiles", False)
    return call


def zentorch(settings: Settings) -> Any:
    """The module, or why there is none."""
    if not settings.device.startswith("cpu"):
        return Skip("a CPU library")
    if importlib.util.find_spec("zentorch") is None:
        return Skip("not installed")
    return _import_zentorch()


@functools.cache
def _import_zentorch() -> Any:
    try:
        return importlib.import_module("zentorch")
    except Exception as error:  # a binary for another torch fails in many ways
        return Skip(f"does not load: {type(error).__name__}: {str(error).splitlines()[0]}"[:200])


def transformers_models(name: str) -> Any:
    """A module of ``transformers.models``, or why there is none."""
    try:
        return importlib.import_module(f"transformers.models.{name}")
    except ImportError as error:
        return Skip(f"not installed: {error}" if "transformers" in str(error) else str(error))


def paddleocr_config(num_hidden_layers: int = 27) -> Any:
    """PaddleOCR-VL, whose vision tower and projector have the sizes of Keye-VL's; or a Skip."""
    module = transformers_models("paddleocr_vl.configuration_paddleocr_vl")
    if isinstance(module, Skip):
        return module
    vision = module.PaddleOCRVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    vision._attn_implementation = "sdpa"
    return module.PaddleOCRVLConfig(
        vision_config=vision.to_dict(), text_config={"hidden_size": 4096}
    )


def paddleocr_module(name: str, config: Any, state: dict[str, torch.Tensor]) -> Any:
    """A module of PaddleOCR-VL with the given weights, in their dtype, or why there is none."""
    modeling = transformers_models("paddleocr_vl.modeling_paddleocr_vl")
    if isinstance(modeling, Skip):
        return modeling
    if hasattr(config, "_attn_implementation"):
        config._attn_implementation = "sdpa"
    like = next(iter(state.values()))
    module = getattr(modeling, name)(config).to(like.device, like.dtype).eval()
    module.load_state_dict(state)
    return module


def versions() -> dict[str, str]:
    """Versions of the peers that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    known = ("transformers", "zentorch", "liger-kernel", "flash-attn", "triton", "xformers")
    for name in known:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
