"""The ``--device`` argument of the commands."""

from __future__ import annotations

import torch


def resolve_device(name: str) -> torch.device:
    """The device that ``name`` means, once it is known to work here.

    Raises:
        ValueError: PyTorch has no such device, or it cannot be used.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device that only its name exists of fails here
    except (RuntimeError, AssertionError, ImportError) as error:
        if name.split(":")[0] == "cuda":
            need = "needs a PyTorch built with CUDA and a visible GPU of that number"
            got = f"torch {torch.__version__} and {torch.cuda.device_count()} GPUs"
            raise ValueError(f"--device {name} {need}, got {got}") from error
        need = "must be a device that works here, such as cpu, cuda or cuda:0"
        raise ValueError(f"--device {need}, got {name!r}") from error
    return device
