"""Kernels keep to the vocabulary of csrc/common, and the check sees it when one does not."""

from pathlib import Path, PurePath

import pytest
from cpp_lexer import tokenize
from kernel_rules import violations

CSRC = Path(__file__).resolve().parents[1] / "csrc"
KERNEL = PurePath("rope/rope.cuh")
PLANTED = {
    'asm volatile("bar.sync 0;");': "asm",
    '__asm__("");': "__asm__",
    "#if __CUDA_ARCH__ >= 900": "__CUDA_ARCH__",
    "#  ifdef __CUDACC__": "__CUDACC__",
    "#define WIDTH \\\n  blockDim.x": "blockDim",
    "__shared__ float tile[32];": "__shared__",
    "extern __shared__ unsigned char memory[];": "__shared__",
    "kernel<<<1, 32>>>(params);": "<<<",
    "#include <cuda_runtime.h>": "cuda_runtime.h",
    '# include "cuda_bf16.h"': "cuda_bf16.h",
    "#include <mma.h>": "mma.h",
    "const int i = threadIdx.x;": "threadIdx",
    "const int i = blockIdx.x;": "blockIdx",
    "const int i = gridDim.x;": "gridDim",
    "__syncthreads();": "__syncthreads",
    "__syncwarp();": "__syncwarp",
    "x = __shfl_xor_sync(~0u, x, 1);": "__shfl_xor_sync",
    "float y = __ldg(x);": "__ldg",
    "__global__ void kernel();": "__global__",
    "__nv_bfloat16 x;": "__nv_bfloat16",
    "namespace cg = cooperative_groups;": "cooperative_groups",
}


def sources():
    return sorted(path for path in CSRC.rglob("*.cu*") if path.suffix in (".cu", ".cuh"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(CSRC)))
def test_sources_keep_to_the_rules(path):
    assert violations(path.relative_to(CSRC), path.read_text()) == []


@pytest.mark.parametrize("text", PLANTED)
def test_planted_faults_are_seen(text):
    expected = [f"csrc/rope/rope.cuh:2: {PLANTED[text]} is not allowed here"]
    assert violations(KERNEL, f"// A kernel.\n{text}\n") == expected


@pytest.mark.parametrize("text", PLANTED)
def test_comments_and_strings_are_free(text):
    quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    comments = "".join(f"// {line}\n" for line in text.replace("\\\n", "\n").splitlines())
    for harmless in (comments, f"/* {text} */\n", f'f("{quoted}");\n', f'f(R"({text})");\n'):
        assert violations(KERNEL, harmless) == []


def test_where_what_is_allowed():
    text = 'asm(""); __syncthreads();\n'
    assert violations(PurePath("common/ptx/barrier.cuh"), text) == []
    assert violations(PurePath("common/thread.cuh"), text) == [
        "csrc/common/thread.cuh:1: asm is not allowed here"
    ]
    launcher = "cudaStream_t stream;\nKEYE_KERNEL kernel() {}\nkernel<<<1, 1>>>();\n"
    assert violations(PurePath("rope/rope_cuda.cu"), launcher) == [
        "csrc/rope/rope_cuda.cu:2: KEYE_KERNEL is not allowed here",
        "csrc/rope/rope_cuda.cu:3: <<< is not allowed here",
    ]
    assert violations(KERNEL, "const float* __restrict__ x;\n") == []


def test_tokens():
    text = 'a<b<c>> =1\'000u/**/+-.5e-3f;// x\n#if 1 // y\n\'"\'"//"R"x()")x"\n'
    assert [(token.kind, token.text) for token in tokenize(text)] == [
        ("word", "a"),
        ("operator", "<"),
        ("word", "b"),
        ("operator", "<"),
        ("word", "c"),
        ("operator", ">"),
        ("operator", ">"),
        ("operator", "="),
        ("number", "1'000u"),
        ("operator", "+"),
        ("operator", "-"),
        ("number", ".5e-3f"),
        ("operator", ";"),
        ("directive", "#if 1 "),
        ("string", "'\"'"),
        ("string", '"//"'),
        ("string", 'R"x()")x"'),
    ]
