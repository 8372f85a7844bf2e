"""Stage parity: values and gradients of every op, at most twice as wrong as plain PyTorch."""

from __future__ import annotations

import gpu_cases
import gpu_device
import torch
from gpu_runner import Context, Found
from tolerance import FP64_SLACK, MAX_FACTOR, MAX_ULPS, MEAN_FACTOR, ulp

SEPARATOR = ", "


def items(context: Context) -> list[str]:
    """Cases, in bf16 first."""
    dtypes = gpu_cases.DTYPES
    names = gpu_cases.names()
    if context.device == "host_cuda":  # where every access is simulated
        names = [name for name in names if gpu_device.has_kernel(gpu_cases.op_of(name), context)]
    return [f"{name}{SEPARATOR}{dtype}" for dtype in dtypes for name in names]


def run(item: str, context: Context) -> Found:
    """A case: its results against the reference in the same dtype, and in fp64."""
    name, dtype = item.split(SEPARATOR)
    big = context.device == "cuda"
    call = gpu_cases.make(name, dtype, gpu_device.type_of(context), big)
    with gpu_device.kernels(context) as reports:
        actual = call.results()
        who = gpu_device.implementation(call.op, context)
    plain = call.reference()
    strided = [i for i, x in enumerate(actual) if not x.is_contiguous() and who == "native"]
    if call.exact:
        same = [torch.equal(a, b) for a, b in zip(actual, plain, strict=True)]
        problems = [f"result {i} differs" for i, equal in enumerate(same) if not equal]
    else:
        exact = call.reference(torch.float64)
        wrong = [within_twice(*three) for three in zip(actual, plain, exact, strict=True)]
        count = len(actual) - len(call.leaves) * call.gradients
        labels = [f"result {i}" for i in range(count)] + [f"d{leaf}" for leaf in call.leaves]
        problems = [f"{n}: {w}" for n, w in zip(labels, wrong, strict=False) if w]
    problems += [f"result {i} is not contiguous" for i in strided]
    facts = {"implementation": who}
    return {"cases": len(actual), "problems": [*problems, *reports], "facts": facts}


def within_twice(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> str | None:
    """What ``tolerance.assert_within_twice`` would say, judged on the device."""
    if exact.dtype != torch.float64:
        return f"exact must be fp64, got {exact.dtype}"
    if actual.dtype != plain.dtype:
        return f"dtype {actual.dtype} instead of {plain.dtype}"
    if not actual.shape == plain.shape == exact.shape:
        return f"shape {list(actual.shape)}, not {list(exact.shape)}"
    if actual.numel() == 0:
        return None
    dtype, rounded = actual.dtype, exact.to(actual.dtype)
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        count = int((test(actual) != test(rounded)).sum())
        if count:
            return f"{kind} disagrees in {count} places"
    finite = actual.isfinite()
    judged = finite & plain.isfinite()
    exact = torch.where(finite, exact, 0.0)
    error = torch.where(finite, (actual.double() - exact).abs(), 0.0)
    plain_error = (plain.double() - exact)[judged].abs()
    spacing = ulp(exact, dtype)
    slack = FP64_SLACK * float(exact.abs().max()) if dtype == torch.float64 else 0.0
    largest = float(plain_error.max()) if plain_error.numel() else 0.0
    excess = error - (MAX_FACTOR * largest + MAX_ULPS * spacing + slack)
    if float(excess.max()) > 0:
        flat = int(excess.argmax())
        return (
            f"error {float(error.flatten()[flat]):.3e} at {flat} of {error.numel()}, where "
            f"{float(exact.flatten()[flat]):.6e} is right and plain is off by at most "
            f"{largest:.3e} ({int((excess > 0).sum())} such places)"
        )
    if plain_error.numel():
        mean, count = float(plain_error.mean()), plain_error.numel()
        spread = float(plain_error.std(correction=0)) + float(spacing[judged].mean()) / 2
        bound = MEAN_FACTOR * mean + 3 * spread / count**0.5 + slack
        own = float(error[judged].mean())
        if own > bound:
            return f"mean error {own:.3e} above {bound:.3e}; plain's is {mean:.3e}"
    return None
