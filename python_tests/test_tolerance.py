"""The tolerance helper passes what it should and catches planted faults."""

import math

import pytest
import torch
from tolerance import assert_within_twice, ulp

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LOW = [torch.float32, torch.float16, torch.bfloat16]


def sample(dtype, shape=(64, 48), seed=0):
    """A truth and an honest result: the truth with three roundings' worth of noise."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    plain = (exact + 1.5 * noise * ulp(exact, dtype)).to(dtype)
    return plain, exact


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_itself_and_the_rounded_truth_pass(dtype):
    plain, exact = sample(dtype)
    assert_within_twice(plain, plain, exact)
    assert_within_twice(exact.to(dtype), plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_noise_of_the_same_size_passes(dtype):
    plain, exact = sample(dtype)
    noise = torch.rand(exact.shape, generator=torch.Generator().manual_seed(7)).double() * 2 - 1
    assert_within_twice((exact + 1.5 * noise * ulp(exact, dtype)).to(dtype), plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 4), (1,), ()])
def test_empty_and_tiny_tensors_pass(dtype, shape):
    plain, exact = sample(dtype, shape)
    assert_within_twice(plain, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_element_is_caught_with_its_place(dtype):
    plain, exact = sample(dtype)
    wrong = plain.clone()
    wrong[17, 5] += 0.1
    with pytest.raises(AssertionError, match=r"at \(17, 5\)"):
        assert_within_twice(wrong, plain, exact)


@pytest.mark.parametrize("dtype", LOW)
def test_one_element_five_ulps_off_beside_an_exact_plain_is_caught(dtype):
    exact = torch.ones(8, dtype=torch.float64)
    plain = exact.to(dtype)
    off = plain.clone()
    off[3] += 5 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match=r"at \(3,\)"):
        assert_within_twice(off, plain, exact)


@pytest.mark.parametrize("dtype", LOW)
def test_a_small_bias_is_caught_by_the_mean(dtype):
    plain, exact = sample(dtype)
    biased = (exact + 1.5 * ulp(exact, dtype)).to(dtype)  # no element is far off
    with pytest.raises(AssertionError, match="mean error"):
        assert_within_twice(biased, plain, exact)


@pytest.mark.parametrize("dtype", LOW)
def test_a_tenth_more_error_on_average_is_caught(dtype):
    plain, exact = sample(dtype, (400, 400))
    noise = torch.rand(exact.shape, generator=torch.Generator().manual_seed(3)).double() * 2 - 1
    worse = (exact + 1.5 * 1.15 * noise * ulp(exact, dtype)).to(dtype)
    with pytest.raises(AssertionError, match="mean error"):
        assert_within_twice(worse, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swapped_rows_are_caught(dtype):
    plain, exact = sample(dtype)
    swapped = plain.clone()
    swapped[[2, 3]] = plain[[3, 2]]
    with pytest.raises(AssertionError, match=r"error .* at \([23], \d+\)"):
        assert_within_twice(swapped, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("value", "name"), [(math.nan, "NaN"), (math.inf, r"\+inf"), (-math.inf, "-inf")]
)
def test_a_special_value_too_many_or_too_few_is_caught(dtype, value, name):
    plain, exact = sample(dtype)
    special = plain.clone()
    special[1, 1] = value
    with pytest.raises(AssertionError, match=rf"{name} disagrees at \(1, 1\)"):
        assert_within_twice(special, plain, exact)
    exact[1, 1] = value
    with pytest.raises(AssertionError, match=rf"{name} disagrees at \(1, 1\)"):
        assert_within_twice(plain, special, exact)
    assert_within_twice(special, special, exact)


def test_infinity_of_the_wrong_sign_is_caught():
    exact = torch.tensor([1.0, torch.inf], dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"\+inf disagrees at \(1,\)"):
        assert_within_twice(-exact.float(), exact.float(), exact)


def test_overflow_of_plain_alone_excuses_nothing():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    plain = torch.tensor([1.0, torch.inf])
    assert_within_twice(exact.float(), plain, exact)
    with pytest.raises(AssertionError, match=r"at \(1,\)"):
        assert_within_twice(torch.tensor([1.0, 2.5]), plain, exact)


def test_an_overflowing_truth_wants_infinity():
    exact = torch.tensor([1e6], dtype=torch.float64)
    infinite = torch.tensor([torch.inf], dtype=torch.float16)
    assert_within_twice(infinite, infinite, exact)


def test_shape_and_dtype_must_agree():
    plain, exact = sample(torch.float32)
    with pytest.raises(AssertionError, match="shape"):
        assert_within_twice(plain[:1], plain, exact)
    with pytest.raises(AssertionError, match=r"dtype torch.float64 instead of torch.float32"):
        assert_within_twice(exact, plain, exact)
    with pytest.raises(AssertionError, match="exact must be fp64"):
        assert_within_twice(plain, plain, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1.0, 1.75, 2.0, 100.0, 0.3])
def test_ulp_is_the_step_to_the_next_number(dtype, value):
    here = torch.tensor(value, dtype=dtype)
    above = torch.nextafter(here, torch.tensor(math.inf, dtype=dtype))
    assert ulp(here, dtype).item() == above.double().item() - here.double().item()
