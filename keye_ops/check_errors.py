"""check_errors: what kernels have found wrong with values that only the device sees."""

from __future__ import annotations

import torch

from keye_ops.extension import libraries


def check_errors(device: torch.device | int | None = None) -> None:
    """Raise the first error that kernels have reported since the last call, if there is one.

    ``cu_seqlens``, grids and positions on a GPU are not read by the host, which would have to wait
    for them. Kernels check them instead: they never touch memory outside their tensors, go on with
    values that are safe, and leave a report, which this function raises and clears. It waits for
    the device. ``KEYE_OPS_VALIDATE=1`` in the environment does so after every launch, so that the
    error comes from the call that caused it; not while a CUDA graph is captured.

    Args:
        device: a CUDA device; the current one by default.

    Raises:
        RuntimeError: names the op, the requirement, and the value that the kernel met.
    """
    if libraries[0].error:
        return  # the references raise by themselves
    if isinstance(device, torch.device):
        device = device.index
    if device is None:
        device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    torch.ops.keye_ops.check_errors(device)
