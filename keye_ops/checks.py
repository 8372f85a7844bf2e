"""The one form that every op's error takes: op, requirement, value received."""

from __future__ import annotations

import torch


def check(condition: bool, op: str, requirement: str, received: object) -> None:
    """Raise ``RuntimeError("<op>: <requirement>, got <received>")`` unless ``condition`` holds.

    The native libraries raise the same type with the same text, so callers see one behaviour
    whichever implementation runs.
    """
    if not condition:
        raise RuntimeError(f"{op}: {requirement}, got {received}")


def describe(tensor: torch.Tensor) -> str:
    """Shape, dtype and device of a tensor, as error messages print them."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def check_floating(op: str, name: str, tensor: torch.Tensor) -> None:
    """Require fp64, fp32, fp16 or bf16."""
    allowed = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    check(tensor.dtype in allowed, op, f"{name} must be fp64, fp32, fp16 or bf16", tensor.dtype)


def check_shape(op: str, name: str, tensor: torch.Tensor, shape: tuple[int | str, ...]) -> None:
    """Require a shape; a string stands for a free dimension and is printed as such."""
    matches = tensor.dim() == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(tensor.shape, shape, strict=False)
    )
    if not matches:  # torch.compile cannot print symbolic sizes, so only a failure is formatted
        wanted = "[" + ", ".join(map(str, shape)) + "]"
        check(False, op, f"{name} must be {wanted}", list(tensor.shape))


def check_same(op: str, name: str, tensor: torch.Tensor, other_name: str, other: object) -> None:
    """Require the dtype and device of ``other``."""
    assert isinstance(other, torch.Tensor)
    same = tensor.dtype == other.dtype and tensor.device == other.device
    check(
        same,
        op,
        f"{name} must have the dtype and device of {other_name} ({other.dtype}, {other.device})",
        f"{tensor.dtype}, {tensor.device}",
    )


def check_integer(op: str, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Require int32 or int64 on ``device``."""
    good = tensor.dtype in (torch.int32, torch.int64) and tensor.device == device
    check(
        good,
        op,
        f"{name} must be int32 or int64 on {device}",
        f"{tensor.dtype} on {tensor.device}",
    )
