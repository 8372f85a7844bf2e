"""What a file of CUDA code may not say, so that a host compiler can compile every kernel.

Kernels (``.cuh``) use the vocabulary of ``csrc/common`` in place of CUDA's own; only
``csrc/common/ptx`` holds ``asm``; launchers (``.cu``) hold no device code.
"""

from __future__ import annotations

import re
from pathlib import PurePath

from cpp_lexer import KINDS, line_number, tokenize

ASM = r"asm|__asm|__asm__"
CUDA_NAMES = r"threadIdx|blockIdx|blockDim|gridDim|warpSize|cuda\w*|cooperative_groups|nvcuda"
# Identifiers that begin with two underscores are CUDA's or the compiler's.
KERNEL = rf"{ASM}|memcpy|memset|memmove|{CUDA_NAMES}|__(?!restrict__$)\w+|KEYE_HOST_EXECUTOR|<<<"
LAUNCHER = rf"{ASM}|__global__|__device__|__shared__|KEYE_KERNEL|KEYE_DEVICE|<<<"
CUDA_HEADER = (
    r'\#\s*include\s*[<"]((?:cuda|cooperative_groups|crt/|device_|driver_types|mma\.h|nv|sm_|'
    r'vector_)[^>"]*)'
)


def forbidden(path: PurePath) -> str:
    """What the file at a path, relative to csrc, may not say, as a regular expression."""
    if path.parts[:2] == ("common", "ptx"):
        return r"(?!)"
    if path.parts[0] == "common":
        return ASM
    return LAUNCHER if path.suffix == ".cu" else KERNEL


def violations(path: PurePath, text: str) -> list[str]:
    """A line for every forbidden construct in the file at a path relative to csrc."""
    pattern, found = forbidden(path), []
    for token in tokenize(text):
        if token.kind == "directive":
            header = re.match(CUDA_HEADER, token.text.lstrip())
            if header and pattern == KERNEL:
                found.append((token.begin, header[1]))
            code = re.sub(KINDS["comment"] + "|" + KINDS["string"], " ", token.text)
            code = "" if re.match(r"\s*\#\s*include\b", code) else code
            found += [
                (token.begin, name)
                for name in re.findall(r"\w+|<<<", code)
                if re.fullmatch(pattern, name)
            ]
        elif token.kind in ("word", "operator") and re.fullmatch(pattern, token.text):
            found.append((token.begin, token.text))
    place = f"csrc/{path.as_posix()}"
    return [f"{place}:{line_number(text, at)}: {name} is not allowed here" for at, name in found]
