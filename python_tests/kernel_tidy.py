"""Runs clang-tidy over the kernels, as their host builds see them: no 32-bit product is an offset.

``python python_tests/kernel_tidy.py [FOLDER]``, where FOLDER is the repository unless given.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("-std=c++17", "-DKEYE_HOST_EXECUTOR", "-Wno-unknown-pragmas")


def find_clang_tidy() -> Path | None:
    """PyPI's clang-tidy beside this Python: its version is pinned."""
    program = Path(sys.executable).parent / "clang-tidy"
    return program if program.exists() else None


def check(source: Path, csrc: Path) -> str:
    """Check one source and the kernels that it includes; the findings, or nothing."""
    command = [find_clang_tidy(), "--quiet", f"--config-file={ROOT / '.clang-tidy'}", source]
    result = subprocess.run(
        [*command, "--", *FLAGS, f"-I{csrc}"], capture_output=True, text=True, check=False
    )
    return "" if result.returncode == 0 else result.stdout + result.stderr


def main() -> None:
    """Check every host build of kernels."""
    csrc = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT).resolve() / "csrc"
    sources = sorted(csrc.rglob("*_host_cuda_kernel.cpp"))
    # Those with CUTLASS's headers need more than a host compiler has.
    sources = [source for source in sources if source.parent.name != "epilogue"]
    if find_clang_tidy() is None or not sources:
        sys.exit(f"kernel_tidy needs clang-tidy and {csrc}/**/*_host_cuda_kernel.cpp, found none")
    with ThreadPoolExecutor(2) as pool:
        findings = [text for text in pool.map(lambda source: check(source, csrc), sources) if text]
    print(f"clang-tidy: {len(sources)} sources, {len(findings)} with findings")
    if findings:
        sys.exit("\n".join(findings))


if __name__ == "__main__":
    main()
