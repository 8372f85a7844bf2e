"""varlen_attention's CUDA kernels: rows that lie anywhere in memory, and rows without company."""

import pytest
import torch
from test_varlen_attention_cuda import DTYPES, compare, device, make, run

__all__ = ["device"]  # a fixture


def equal(got, want):
    return all(map(torch.equal, got, want))


@pytest.mark.parametrize("shape", [(1, 1, 72), (85, 1, 72), (85, 2, 1), (1, 2, 72)], ids=str)
def test_gradients_that_repeat_rows(device, shape):
    (q, k, v, _), cu = make(([20, 65], [20, 65], 0, 0, (2, 2)), torch.bfloat16, 72)
    dout = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(q).expand_as(q)
    got, want = (run(device, (q, k, v, d), cu) for d in (dout, dout.contiguous()))
    assert equal(got, want)


@pytest.mark.parametrize("causal", [False, True])
def test_heads_and_rows_far_apart(device, causal):
    tensors, cu = make(([20, 65], [30, 60], 1, 2, (4, 2)), torch.float16, 80)
    want = run(device, tensors, cu, causal=causal)
    apart = [torch.stack([x, x.flip(0)], 2).repeat(2, 1, 1, 1)[: len(x), :, 0] for x in tensors]
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    assert not any(x.is_contiguous() for x in (*apart, *turned))
    assert equal(run(device, apart, cu, causal=causal), want)
    assert equal(run(device, turned, cu, causal=causal), want)


def test_segments_of_one_row(device):
    """Each gives its value, whatever the scores."""
    ones = [1] * 70
    tensors, cu = make((ones, ones, 0, 0, (2, 1)), torch.bfloat16, 64)
    out, _, dq, dk, dv = run(device, tensors, cu, causal=True)
    assert torch.equal(out, tensors[2].expand_as(out))
    assert torch.equal(dv[:, 0], tensors[3].float().sum(1).bfloat16())
    assert max(dq.abs().max(), dk.abs().max()) < 1e-2


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key_takes_all_the_weight(device, dtype, sign):
    (q, k, v, dout), cu = make(([150], [130], 0, 0, (1, 1)), dtype, 72)
    q, k = torch.full_like(q, 4.0), torch.full_like(k, -4.0)
    k[77] = 4.0
    out, lse, dq, dk, dv = run(device, (q, k * sign, v, dout), cu, softmax_scale=sign * 72**-0.5)
    assert torch.equal(out, v[77].expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, 16 * 72**0.5))
    assert not dv[:77].any()
    assert not dv[78:].any()
    assert all(x.isfinite().all() for x in (dq, dk, dv))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_see_nothing_are_zeros_whatever_they_hold(device, value):
    tensors, cu = make(([5, 70, 3], [0, 40, 0], 2, 2, (2, 1)), torch.bfloat16, 72)
    blind = [*range(35), *range(75, 80)]
    want = run(device, tensors, cu, causal=True)
    for x in (tensors[0], tensors[3]):
        x[[*range(5), *range(75, 80)]] = value
    results = run(device, tensors, cu, causal=True)
    assert equal(results, want)
    out, lse, dq, *_ = results
    assert not out[blind].any()
    assert not dq[blind].any()
    assert (lse[:, blind] == -torch.inf).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[63, 1, 64, 65, 0], [2, 3, 5, 7, 11, 13, 31, 61]], ids=len)
def test_small_segments_beside_each_other(device, lengths, causal):
    tensors, cu = make((lengths, lengths[::-1], 0, 0, (6, 3)), torch.float16, 96)
    compare(device, tensors, cu, causal=causal)
