"""Which implementation an op runs, chosen in one place and never silently.

The native kernel of the device runs where there is one and where it takes the arguments. Everything
else runs the PyTorch reference, and :func:`last_dispatch` says so with the reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

_MODES = ("auto", "native", "reference")
_logger = logging.getLogger("keye_ops")


@dataclass(frozen=True)
class Dispatch:
    """What ran: the op, ``"native"`` or ``"reference"``, the device type, and why."""

    op: str
    implementation: str
    device: str
    reason: str


def _mode_from_environment() -> str:
    mode = os.environ.get("KEYE_OPS_BACKEND", "auto")
    if mode not in _MODES:
        raise ValueError(f"KEYE_OPS_BACKEND must be one of {', '.join(_MODES)}, got {mode!r}")
    return mode


STRICT = os.environ.get("KEYE_OPS_STRICT", "0") == "1"
_LOG = os.environ.get("KEYE_OPS_LOG", "0") == "1"
if _LOG and not _logger.handlers:
    _logger.addHandler(logging.StreamHandler())
    _logger.setLevel(logging.INFO)

_default_mode = _mode_from_environment()
_mode: ContextVar[str] = ContextVar("keye_ops_backend", default=_default_mode)
_last: dict[str, Dispatch] = {}
_OP_OF_FORM = {
    **{"rope_2d": "rope", "rope_3d": "rope", "rope_2d_": "rope_", "rope_3d_": "rope_"},
    "layer_norm": "add_layer_norm",
    "rms_norm": "add_rms_norm",
}
_last_op = ""


@contextmanager
def backend(mode: str) -> Iterator[None]:
    """Choose implementations inside a ``with`` block.

    Args:
        mode: ``"auto"`` (native where possible), ``"native"`` (raise instead of falling back) or
            ``"reference"`` (plain PyTorch). The environment variable ``KEYE_OPS_BACKEND`` sets the
            process's default; ``KEYE_OPS_STRICT=1`` makes ``"auto"`` raise as ``"native"`` does.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in _MODES:
        raise ValueError(f"backend: mode must be one of {', '.join(_MODES)}, got {mode!r}")
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


def last_dispatch(op: str | None = None) -> Dispatch | None:
    """What ran last, of all ops or of one; None if nothing did.

    Args:
        op: a public name. The forms of rope report as ``rope`` and, in place, as ``rope_``;
            ``layer_norm`` as ``add_layer_norm``, ``rms_norm`` as ``add_rms_norm``; a projector as
            its parts. Compiled graphs are not tracked.
    """
    return _last.get(_OP_OF_FORM.get(op, op) if op else _last_op)


def dispatches() -> list[Dispatch]:
    """What ran last of every op that has run, in the order of their first runs."""
    return list(_last.values())


def kernel_device(tensor: torch.Tensor) -> str:
    """The device type whose kernels a tensor goes to."""
    return tensor.device.type


def has_kernel(op: str, device_type: str) -> bool:
    """Whether a native kernel of ``op`` is registered for a device type (``"cpu"``, ``"cuda"``)."""
    known = _kernels.get((op, device_type))
    if known is None:
        key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        known = key is not None and has(f"keye_ops::{op}", key)
        _kernels[op, device_type] = known
    return known


_kernels: dict[tuple[str, str], bool] = {}


def use_native(op: str, tensor: torch.Tensor, unsupported: str | None = None) -> bool:
    """Whether to call the registered op; False means the reference.

    Args:
        op: its name without the namespace.
        tensor: an argument that tells the device.
        unsupported: why the native kernel does not take these arguments, or None if it does.

    Raises:
        RuntimeError: a fallback would be needed where none is allowed.
    """
    if torch.compiler.is_compiling():
        # The registered op stays one opaque node; the dispatcher picks its kernel at run time.
        return _mode_while_tracing() != "reference" and unsupported is None
    device = tensor.device.type
    mode = _mode.get()
    if mode == "reference":
        _record(op, "reference", device, "asked for")
        return False
    if unsupported is None and not has_kernel(op, device):
        unsupported = f"no native kernel for {device}"
    if unsupported is None and _is_transformed():
        unsupported = "it has no rule for torch.func transforms and forward-mode gradients"
    if unsupported is None:
        _record(op, "native", device, "available")
        return True
    if mode == "native" or STRICT:
        raise RuntimeError(f"{op}: the native kernel was required, but {unsupported}")
    _record(op, "reference", device, unsupported)
    return False


def plans_on(tensor: torch.Tensor) -> bool:
    """Whether attention on this tensor's device takes a plan of its work."""
    if kernel_device(tensor) != "cuda":
        return False
    mode = _mode_while_tracing() if torch.compiler.is_compiling() else _mode.get()
    return mode != "reference" and has_kernel("varlen_attention_plan", tensor.device.type)


def unsupported_strides(*tensors: torch.Tensor | None) -> str | None:
    """Why kernels that want contiguous rows do not take all tensors, or None if they do."""
    good = all(x is None or _has_contiguous_rows(x) for x in tensors)
    return None if good else "it needs a unit last stride"


def fit_for_kernel(x: torch.Tensor) -> torch.Tensor:
    """The tensor with contiguous rows, where a graph leaves no other choice."""
    return x if _has_contiguous_rows(x) else x.clone(memory_format=torch.contiguous_format)


MAX_CUDA_ROW = 2**20  # values of a row that the norms' CUDA kernels take


def unsupported_rows(x: torch.Tensor, width: int, *others: torch.Tensor | None) -> str | None:
    """Why kernels of rows do not take x and the other tensors, or None if they do.

    On CUDA rows of ``width`` values are read 16 bytes at a time, from a multiple of 16 bytes on.
    """
    tensors = (x, *others)
    if reason := unsupported_strides(*tensors):
        return reason
    if kernel_device(x) != "cuda" or x.dim() != 2:
        return None
    if x.dtype == torch.float64:
        return "it has no fp64 on cuda"
    if any(n * x.element_size() % 16 for n in (x.shape[1], width)) or width > MAX_CUDA_ROW:
        return f"it has no rows of {x.shape[1]} values in {x.dtype} on cuda"
    if not all(map(has_fitting_rows, tensors)):
        return "it needs rows at multiples of 16 bytes on cuda"
    return None


def has_fitting_rows(x: torch.Tensor | None) -> bool:
    """Whether rows are where kernels take them: on CUDA at multiples of 16 bytes.

    Where tensors have no address, in a graph and in transforms, the answer is yes.
    """
    if x is None or torch.compiler.is_compiling() or kernel_device(x) != "cuda":
        return True
    return _is_transformed() or _has_aligned_rows(x)


def fit_rows(x: torch.Tensor) -> torch.Tensor:
    """The tensor with rows where kernels take them."""
    return x if has_fitting_rows(x) else x.clone(memory_format=torch.contiguous_format)


def fit_gradient(x: torch.Tensor) -> torch.Tensor:
    """A contiguous gradient as kernels take it."""
    return fit_rows(x).contiguous()


def _has_aligned_rows(x: torch.Tensor) -> bool:
    strides = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    size = x.element_size()
    return x.data_ptr() % 16 == 0 and all(n <= 1 or s * size % 16 == 0 for n, s in strides)


def _has_contiguous_rows(x: torch.Tensor) -> bool:
    return x.dim() == 0 or x.shape[-1] <= 1 or x.stride(-1) == 1


def _is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is under way."""
    dual = torch.autograd.forward_ad._current_level >= 0
    return dual or torch._C._functorch.peek_interpreter_stack() is not None


@torch.compiler.assume_constant_result
def _mode_while_tracing() -> str:
    # torch.compile cannot trace a ContextVar; a graph keeps the mode that it was compiled under.
    return _mode.get()


def call(op: Any, args: tuple[Any, ...]) -> Any:
    """Call a registered op; without gradients to keep, pass its autograd layer by."""
    tensors = (x for x in args if isinstance(x, torch.Tensor))
    if torch.compiler.is_compiling() or (
        torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    ):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _record(op: str, implementation: str, device: str, reason: str) -> None:
    global _last_op
    _last_op = op
    last = _last.get(op)
    same = last is not None and last.implementation == implementation and last.reason == reason
    if not same or last.device != device:
        _last[op] = Dispatch(op, implementation, device, reason)
    if _LOG:
        _logger.info("%s: %s on %s (%s)", op, implementation, device, reason)
