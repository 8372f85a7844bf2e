"""The one tolerance of the op tests: an op may be at most twice as wrong as plain PyTorch."""

from __future__ import annotations

import torch

MAX_FACTOR = 2.0
MAX_ULPS = 2.0
MEAN_FACTOR = 1.05
# An fp64 result cannot be judged by an fp64 truth: both round, and plain may be the truth itself.
FP64_SLACK = 1e-12


def ulp(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance of neighbouring numbers of ``dtype`` at the magnitude of ``value``, as fp64."""
    info = torch.finfo(dtype)
    magnitude = value.abs().double().clamp(min=info.smallest_normal)
    return torch.ldexp(torch.full_like(magnitude, info.eps), magnitude.frexp().exponent - 1)


def assert_within_twice(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """Hold ``actual`` to the error that plain PyTorch makes in the same dtype.

    Every error is at most 2 x plain's largest error + 2 ulp of the value, and the mean error at
    most 1.05 x plain's plus the noise of a mean of so few elements. NaN and infinities lie exactly
    where the truth, rounded to the dtype, has them; where only plain has them they do not count.

    Args:
        actual: the result to judge.
        plain: what plain PyTorch gives, in the dtype of ``actual``.
        exact: the truth in fp64.

    Raises:
        AssertionError: with the place of the worst element.
    """
    assert exact.dtype == torch.float64, f"exact must be fp64, got {exact.dtype}"
    assert actual.dtype == plain.dtype, f"dtype {actual.dtype} instead of {plain.dtype}"
    assert actual.shape == exact.shape, f"shape {list(actual.shape)}, not {list(exact.shape)}"
    assert plain.shape == exact.shape, f"plain has shape {list(plain.shape)}"
    dtype = actual.dtype
    actual, plain, exact = (x.detach().cpu() for x in (actual, plain, exact))
    assert_same_kind(actual, exact.to(dtype))

    finite = actual.isfinite()
    judged = finite & plain.isfinite()
    error = torch.where(finite, (actual.double() - exact).abs(), 0.0)
    plain_error = (plain.double() - exact)[judged].abs()
    spacing = ulp(torch.where(finite, exact, 0.0), dtype)
    scale = exact[finite].abs().max().item() if finite.any() else 0.0
    slack = FP64_SLACK * scale if dtype == torch.float64 else 0.0

    largest = plain_error.max().item() if judged.any() else 0.0
    excess = error - (MAX_FACTOR * largest + MAX_ULPS * spacing + slack)
    if (excess > 0).any():
        place = _place(excess.argmax().item(), excess)
        raise AssertionError(
            f"error {error[place]:.3e} at {place}, where {exact[place]:.6e} is right and plain "
            f"PyTorch is off by at most {largest:.3e} anywhere"
        )

    if judged.any():
        count = judged.sum().item()
        spread = plain_error.std(correction=0).item() + spacing[judged].mean().item() / 2
        bound = MEAN_FACTOR * plain_error.mean().item() + 3 * spread / count**0.5 + slack
        mean = error[judged].mean().item()
        assert mean <= bound, (
            f"mean error {mean:.3e} above {bound:.3e}; plain PyTorch's is {plain_error.mean():.3e}"
        )


def assert_same_kind(actual: torch.Tensor, rounded: torch.Tensor) -> None:
    """NaN, +inf and -inf in the same places."""
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(actual) != test(rounded)
        if wrong.any():
            place = _place(wrong.int().argmax().item(), wrong)
            raise AssertionError(
                f"{name} disagrees at {place}: {actual[place]} where {rounded[place]} is right"
            )


def _place(flat: int, tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(x.item() for x in torch.unravel_index(torch.tensor(flat), tensor.shape))
