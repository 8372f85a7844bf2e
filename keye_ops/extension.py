"""Loading the native libraries, and defining in Python what they did not define.

Importing never fails: a library that is absent or does not load is recorded with its reason, which
``keye-ops info`` prints. ``KEYE_OPS_STRICT=1`` raises instead.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from keye_ops.dispatch import STRICT

NAMESPACE = "keye_ops"


@dataclass(frozen=True)
class NativeLibrary:
    """One compiled library: where it is and how it was built, or why it is not in use."""

    name: str
    path: str | None = None
    build: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def _load(name: str, skip: str | None = None) -> NativeLibrary:
    if skip is not None:
        return NativeLibrary(name, error=skip)
    try:
        module = importlib.import_module(f"keye_ops.{name}")
    except ImportError as error:
        if STRICT:
            raise
        absent = isinstance(error, ModuleNotFoundError)
        return NativeLibrary(name, error="not built" if absent else str(error))
    return NativeLibrary(name, path=module.__file__, build=json.loads(module.build_info))


def _skip_cuda() -> str | None:
    return None if torch.version.cuda else "this torch was built without CUDA"


# _C_cuda uses symbols of _C, so the order matters.
libraries: tuple[NativeLibrary, ...] = (_load("_C"),)
libraries += (_load("_C_cuda", _skip_cuda() or libraries[0].error),)

_fragment = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(name: str, schema: str, reference: Callable[..., Any]) -> None:
    """Give an op its schema, unless the native library has, and its reference implementation.

    The reference serves every device that has no kernel of its own.
    """
    if not hasattr(torch.ops.keye_ops, name):
        _fragment.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _fragment.impl(name, reference, "CompositeExplicitAutograd")
