"""Loading of the native libraries: absent, broken and present; and what Python defines itself."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import keye_ops
from keye_ops import extension

PACKAGE = Path(keye_ops.__file__).parent

REPORT = """
import json, torch, keye_ops
from keye_ops import extension
x = torch.ones(2, 3)
names = %s
print(json.dumps({
    "libraries": [[l.name, l.path, l.error] for l in extension.libraries],
    "builds": [l.build for l in extension.libraries],
    "schemas": {n: str(getattr(torch.ops.keye_ops, n).default._schema) for n in names},
    "value": keye_ops.linear_gelu(x, x, torch.ones(2)).tolist(),
    "kernel": keye_ops.dispatch.has_kernel("rope", "cpu"),
}))
"""
OPS = (
    "rope",
    "rope_",
    "rope_backward",
    "patch_embed",
    "patch_embed_backward",
    "patchify",
    "varlen_attention",
    "varlen_attention_backward",
    "varlen_attention_plan",
    "add_layer_norm",
    "add_layer_norm_backward",
    "add_rms_norm",
    "add_rms_norm_backward",
    "merge_norm",
    "merge_norm_backward",
    "linear_gelu",
    "linear_gelu_forward",
    "linear_gelu_backward",
)


@pytest.fixture(scope="module")
def pure(tmp_path_factory):
    """A copy of the package without its libraries."""
    target = tmp_path_factory.mktemp("pure") / "keye_ops"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return target


@pytest.fixture
def broken(pure, tmp_path):
    """A copy whose library is garbage."""
    target = tmp_path / "keye_ops"
    shutil.copytree(pure, target)
    (target / "_C.abi3.so").write_bytes(b"this is not a shared library" * 100)
    return target


# An editable installation would find the original's libraries for the copy.
ALONE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]
"""


def run(package, code=REPORT % (OPS,), **environment):
    """Run code on a copy of the package; what it printed, or None, and stderr."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("KEYE_OPS_")}
    done = subprocess.run(
        [sys.executable, "-c", ALONE + code],
        env={**plain, "PYTHONPATH": str(package.parent), **environment},
        cwd=package.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return (json.loads(done.stdout) if done.returncode == 0 else None), done.stderr


@pytest.fixture(scope="module")
def pure_report(pure):
    report, stderr = run(pure)
    assert report is not None, stderr
    return report


def test_without_libraries_everything_runs_on_the_references(pure_report):
    assert pure_report["libraries"][0] == ["_C", None, "not built"]
    name, path, error = pure_report["libraries"][1]
    assert (name, path) == ("_C_cuda", None)
    assert error in ("not built", "this torch was built without CUDA")
    assert pure_report["builds"] == [{}, {}]
    assert not pure_report["kernel"]
    want = torch.nn.functional.gelu(torch.full((2, 2), 4.0))
    torch.testing.assert_close(torch.tensor(pure_report["value"]), want)


def test_a_broken_library_is_recorded_with_its_reason(broken, pure_report):
    report, stderr = run(broken)
    assert report is not None, stderr
    name, path, error = report["libraries"][0]
    assert (name, path) == ("_C", None)
    assert "_C.abi3.so" in error
    assert report["libraries"][1][2] in (error, "this torch was built without CUDA")
    assert report["value"] == pure_report["value"]


def test_strict_raises_for_an_absent_library(pure):
    report, stderr = run(pure, KEYE_OPS_STRICT="1")
    assert report is None
    assert "ModuleNotFoundError: No module named 'keye_ops._C'" in stderr


def test_strict_raises_for_a_broken_library(broken):
    report, stderr = run(broken, KEYE_OPS_STRICT="1")
    assert report is None
    assert "ImportError" in stderr
    assert "_C.abi3.so" in stderr


def test_importing_needs_no_optional_package(pure):
    code = """
import sys
for name in ("PIL", "av", "safetensors", "tokenizers", "tqdm", "rich", "matplotlib"):
    sys.modules[name] = None
import keye_ops
print(len(keye_ops.__all__))
"""
    report, stderr = run(pure, code)
    assert report == len(keye_ops.__all__), stderr


@pytest.mark.parametrize("name", OPS)
def test_schemas_of_the_libraries_equal_those_of_python(pure_report, name):
    op = getattr(torch.ops.keye_ops, name).default
    assert str(op._schema) == pure_report["schemas"][name]


def test_libraries_say_what_they_are():
    assert [library.name for library in extension.libraries] == ["_C", "_C_cuda"]
    for library in extension.libraries:
        assert (library.path is None) == (library.error is not None)
        if library.path is not None:
            assert Path(library.path).is_file()
            assert library.build["compiler"]


def test_define_gives_a_schema_once_and_a_reference():
    extension.define("extension_test_op", "(Tensor x) -> Tensor", lambda x: x + 1)
    op = torch.ops.keye_ops.extension_test_op
    assert str(op.default._schema) == "keye_ops::extension_test_op(Tensor x) -> Tensor"
    assert op(torch.ones(2)).tolist() == [2.0, 2.0]
    assert torch.Tag.pt2_compliant_tag in op.default.tags

    library = torch.library.Library("keye_ops", "FRAGMENT")
    library.define("extension_test_native(Tensor x) -> Tensor")
    library.impl("extension_test_native", lambda x: x + 2, "CPU")
    extension.define("extension_test_native", "(Tensor other) -> Tensor", lambda x: x + 1)
    op = torch.ops.keye_ops.extension_test_native
    assert str(op.default._schema).endswith("(Tensor x) -> Tensor")
    assert op(torch.ones(2)).tolist() == [3.0, 3.0]
    library._destroy()
