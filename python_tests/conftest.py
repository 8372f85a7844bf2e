"""Settings and fixtures of all tests."""

import pytest
import torch
from host_cuda import host_cuda, take_reports, unavailable

from keye_ops import dispatch

# Its asserts are those of tests, and tell as much.
pytest.register_assert_rewrite("attention_fuzz")

# The tests are many and small: more threads than that fight over the cores.
torch.set_num_threads(1)


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else []), "host_cuda"])
def device(request, monkeypatch):
    """The device of a test's tensors; ``host_cuda`` runs CUDA kernels on those of the CPU."""
    if request.param != "host_cuda":
        yield request.param
        return
    if reason := unavailable():
        pytest.skip(reason)
    sizes, skipped = [], []
    use_native = dispatch.use_native

    def use_native_or_skip(op, tensor, unsupported=None):
        if unsupported is not None:
            skipped.append(unsupported)
            pytest.skip(f"the CUDA kernel does not take this: {unsupported}")
        sizes.append(tensor.numel())
        return use_native(op, tensor)

    monkeypatch.setattr(dispatch, "use_native", use_native_or_skip)
    with host_cuda():
        yield "cpu"
        reports = take_reports()
        assert [report.text() for report in reports if report.findings] == []
        empty = bool(sizes) and not any(sizes)
        assert reports or empty or skipped
