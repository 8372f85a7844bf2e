"""What keye_ops is timed beside, where it is installed: torch.compile, zentorch, transformers.

zentorch (AMD's CPU plug-in, an optional extra of nobody's: ``pip install zentorch`` of the version
that fits torch) offers an attention op, linear layers with fused activations, and a backend of
torch.compile.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from keye_ops.bench.harness import Provider, Settings, Skip, in_mode


def compiled(
    function: Callable[..., Any],
    settings: Settings,
    *args: Any,
    backend: str = "inductor",
    mode: str = "forward",
) -> Provider | Skip:
    """``function(*args)`` through torch.compile, whose first call compiles.

    In mode "full" with the gradients of its arguments, which must be tensors then.
    """
    if backend == "zentorch":
        module = zentorch(settings)
        if isinstance(module, Skip):
            return module
    if settings.quick:
        return Skip("not with --quick: it has to be compiled first")
    # A fresh start, or the shapes of the case before would make this one dynamic.
    torch.compiler.reset()
    provider = in_mode(mode, torch.compile(function, backend=backend), args)
    provider.compiles = True
    return provider


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
    for name in ("transformers", "zentorch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
