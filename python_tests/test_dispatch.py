"""Which implementation runs, how it is said, and how it is chosen."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch

import keye_ops
from keye_ops import Dispatch, dispatch
from keye_ops.checks import check, check_integer, describe

CPU = torch.zeros(1)


def make_op(monkeypatch, kernels=()):
    """Pretend that op ``sample`` has kernels for these device types; forget what ran."""
    monkeypatch.setattr(
        dispatch, "_kernels", {("sample", x): x in kernels for x in ("cpu", "cuda")}
    )
    monkeypatch.setattr(dispatch, "_last", {})
    monkeypatch.setattr(dispatch, "_last_op", "")
    monkeypatch.setattr(dispatch, "STRICT", False)


@pytest.mark.parametrize(
    ("mode", "kernels", "unsupported", "implementation", "reason"),
    [
        ("auto", ["cpu"], None, "native", "available"),
        ("auto", [], None, "reference", "no native kernel for cpu"),
        ("auto", ["cuda"], None, "reference", "no native kernel for cpu"),
        ("auto", ["cpu"], "head_dim is odd", "reference", "head_dim is odd"),
        ("native", ["cpu"], None, "native", "available"),
        ("reference", ["cpu"], None, "reference", "asked for"),
        ("reference", [], "head_dim is odd", "reference", "asked for"),
    ],
)
def test_choice(monkeypatch, mode, kernels, unsupported, implementation, reason):
    make_op(monkeypatch, kernels)
    with keye_ops.backend(mode):
        native = dispatch.use_native("sample", CPU, unsupported)
    assert native == (implementation == "native")
    want = Dispatch("sample", implementation, "cpu", reason)
    assert keye_ops.last_dispatch() == want
    assert keye_ops.last_dispatch("sample") == want


@pytest.mark.parametrize(
    ("kernels", "unsupported", "reason"),
    [([], None, "no native kernel for cpu"), (["cpu"], "head_dim is odd", "head_dim is odd")],
)
@pytest.mark.parametrize("how", ["native", "strict"])
def test_a_fallback_that_is_not_allowed_raises(monkeypatch, kernels, unsupported, reason, how):
    make_op(monkeypatch, kernels)
    monkeypatch.setattr(dispatch, "STRICT", how == "strict")
    message = f"sample: the native kernel was required, but {reason}"
    with (
        keye_ops.backend("native" if how == "native" else "auto"),
        pytest.raises(RuntimeError, match=message),
    ):
        dispatch.use_native("sample", CPU, unsupported)
    assert keye_ops.last_dispatch() is None


def test_strict_does_not_forbid_a_reference_that_was_asked_for(monkeypatch):
    make_op(monkeypatch)
    monkeypatch.setattr(dispatch, "STRICT", True)
    with keye_ops.backend("reference"):
        assert not dispatch.use_native("sample", CPU)


def test_last_dispatch_follows_changes(monkeypatch):
    make_op(monkeypatch, ["cpu"])
    assert keye_ops.last_dispatch() is None
    assert keye_ops.last_dispatch("sample") is None
    with keye_ops.backend("auto"):
        dispatch.use_native("sample", CPU)
        dispatch.use_native("sample", CPU.to("meta"))
        assert keye_ops.last_dispatch().reason == "no native kernel for meta"
        assert keye_ops.last_dispatch().device == "meta"
        dispatch.use_native("sample", CPU)
        assert keye_ops.last_dispatch().implementation == "native"
        dispatch.use_native("linear_gelu", CPU)
    assert keye_ops.last_dispatch().op == "linear_gelu"
    assert keye_ops.last_dispatch("sample").op == "sample"


def test_public_ops_report_themselves():
    x = torch.ones(2, 3)
    with keye_ops.backend("reference"):
        keye_ops.linear_gelu(x, x, torch.ones(2))
    want = Dispatch("linear_gelu", "reference", "cpu", "asked for")
    assert keye_ops.last_dispatch() == keye_ops.last_dispatch("linear_gelu") == want


def test_public_ops_raise_where_native_is_required_and_absent():
    if dispatch.has_kernel("linear_gelu", "cpu"):
        pytest.skip("linear_gelu has a kernel for the CPU")
    x = torch.ones(2, 3)
    message = "linear_gelu: the native kernel was required, but no native kernel for cpu"
    with keye_ops.backend("native"), pytest.raises(RuntimeError, match=message):
        keye_ops.linear_gelu(x, x, torch.ones(2))


def test_has_kernel_asks_the_dispatcher(monkeypatch):
    monkeypatch.setattr(dispatch, "_kernels", {})
    library = torch.library.Library("keye_ops", "FRAGMENT")
    library.define("dispatch_test_op(Tensor x) -> Tensor")
    assert not dispatch.has_kernel("dispatch_test_op", "cpu")
    monkeypatch.setattr(dispatch, "_kernels", {})
    library.impl("dispatch_test_op", lambda x: x.clone(), "CPU")
    assert dispatch.has_kernel("dispatch_test_op", "cpu")
    assert not dispatch.has_kernel("dispatch_test_op", "cuda")
    assert not dispatch.has_kernel("dispatch_test_op", "xpu")
    library._destroy()


def test_a_composite_reference_is_no_kernel():
    assert not dispatch.has_kernel("merge_norm", "meta")


def test_nesting_and_leaving_by_an_exception():
    outer = dispatch._mode.get()
    with keye_ops.backend("reference"):
        with keye_ops.backend("native"):
            assert dispatch._mode.get() == "native"
        assert dispatch._mode.get() == "reference"
        with pytest.raises(KeyError), keye_ops.backend("auto"):
            raise KeyError
        assert dispatch._mode.get() == "reference"
    assert dispatch._mode.get() == outer


def test_unknown_mode():
    outer = dispatch._mode.get()
    message = "backend: mode must be one of auto, native, reference, got 'fast'"
    with pytest.raises(ValueError, match=message), keye_ops.backend("fast"):
        pass
    assert dispatch._mode.get() == outer


def test_threads_do_not_see_each_others_mode():
    seen = {}
    inside, done = threading.Event(), threading.Event()

    def other():
        inside.wait(30)
        seen["before"] = dispatch._mode.get()
        with keye_ops.backend("native"):
            seen["own"] = dispatch._mode.get()
            done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with keye_ops.backend("reference"):
        inside.set()
        assert done.wait(30)
        seen["main"] = dispatch._mode.get()
    thread.join(30)
    assert seen == {"before": dispatch._default_mode, "own": "native", "main": "reference"}


@pytest.mark.parametrize("grad", [False, True])
def test_call_keeps_the_autograd_layer_only_where_a_gradient_is_wanted(grad):
    x, bias = torch.randn(4, 3), torch.randn(3)
    weight = torch.randn(3, 3, requires_grad=True)
    with torch.set_grad_enabled(grad):
        out = dispatch.call(torch.ops.keye_ops.linear_gelu.default, (x, weight, bias))
    assert out.requires_grad == grad


def run(code, **environment):
    """Run code in a fresh process; return what it printed as JSON, or the error, and stderr."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("KEYE_OPS_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**plain, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return (json.loads(done.stdout) if done.returncode == 0 else None), done.stderr


ATTEMPT = """
import json, torch, keye_ops
x = torch.ones(2, 3)
def attempt():
    try:
        keye_ops.linear_gelu(x, x, torch.ones(2))
    except RuntimeError as error:
        return str(error)
    last = keye_ops.last_dispatch()
    return [last.op, last.implementation, last.device, last.reason]
print(json.dumps([attempt(), attempt()]))
"""
HIDE_KERNELS = ATTEMPT.replace(
    "def attempt", "keye_ops.dispatch._kernels['linear_gelu', 'cpu'] = False\ndef attempt", 1
)


def test_environment_chooses_the_mode():
    result, stderr = run(ATTEMPT, KEYE_OPS_BACKEND="reference")
    assert result == [["linear_gelu", "reference", "cpu", "asked for"]] * 2
    assert "linear_gelu" not in stderr  # no log unless asked for


def test_environment_is_strict():
    result, _ = run(HIDE_KERNELS, KEYE_OPS_STRICT="1", KEYE_OPS_BACKEND="auto")
    assert (
        result == ["linear_gelu: the native kernel was required, but no native kernel for cpu"] * 2
    )


def test_environment_logs_every_call():
    result, stderr = run(HIDE_KERNELS, KEYE_OPS_LOG="1")
    assert result == [["linear_gelu", "reference", "cpu", "no native kernel for cpu"]] * 2
    line = "linear_gelu: reference on cpu (no native kernel for cpu)"
    assert stderr.splitlines().count(line) == 2


def test_environment_with_an_unknown_mode():
    result, stderr = run("import keye_ops", KEYE_OPS_BACKEND="fast")
    assert result is None
    assert "KEYE_OPS_BACKEND must be one of auto, native, reference, got 'fast'" in stderr


def test_check_says_op_requirement_and_value():
    check(True, "op", "x must be 1", 2)
    with pytest.raises(RuntimeError, match=r"^op: x must be 1, got 2$"):
        check(False, "op", "x must be 1", 2)


def test_describe():
    assert describe(torch.ones(2, 3, dtype=torch.bfloat16)) == "[2, 3] bfloat16 on cpu"


def test_check_integer_wants_the_dtype_and_the_device():
    check_integer("op", "x", torch.ones(1, dtype=torch.int32), torch.device("cpu"))
    check_integer("op", "x", torch.ones(1, dtype=torch.int64), torch.device("cpu"))
    message = "op: x must be int32 or int64 on cpu, got torch.int16 on cpu"
    with pytest.raises(RuntimeError, match=message):
        check_integer("op", "x", torch.ones(1, dtype=torch.int16), torch.device("cpu"))
    message = "op: x must be int32 or int64 on meta, got torch.int32 on cpu"
    with pytest.raises(RuntimeError, match=message):
        check_integer("op", "x", torch.ones(1, dtype=torch.int32), torch.device("meta"))
