"""A ledger of what the compiler made of every CUDA kernel, read from built libraries; no GPU.

``python python_tests/cuda_ledger.py [LIBRARY ...]`` records registers, memory and the instructions
that matter in ``cuda_ledger.json``; with ``--check`` it fails when that file is stale or a kernel
spills. To be recorded the package's library must have all architectures, to be checked the first
two of them; those of tests need only some.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "keye_ops"
LIBRARY = PACKAGE / "_C_cuda.abi3.so"
LEDGER = Path(__file__).with_suffix(".json")
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_86", "sm_89", "sm_120a")
REQUIRED = ARCHITECTURES[:2]
COUNTED = ("HMMA", "HGMMA", "LDGSTS", "LDSM", "STSM", "UTMALDG", "UTMASTG", "SYNCS", "LDL", "STL")
SPILLS = ("stack", "local", "LDL", "STL")

# {architecture: {kernel: {what: how many}}}; what is absent is zero.
Kernels = dict[str, dict[str, dict[str, int]]]


def find_cuobjdump() -> str | None:
    """From PyPI's packages (beside nvdisasm, which it calls), or from a toolkit."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations if spec else []:
        for path in Path(root).glob("*/bin/cuobjdump"):
            return str(path)
    return shutil.which("cuobjdump")


def dump(library: Path, option: str) -> str:
    """What cuobjdump prints of a library."""
    program = find_cuobjdump()
    if program is None:
        raise FileNotFoundError("the ledger needs cuobjdump, found none; pip install -e .[dev]")
    path = f"{Path(program).parent}:/usr/bin:/bin"
    command = [program, option, str(library)]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PATH": path}
    ).stdout


def compilers(library: Path) -> list[str]:
    """Versions of the nvcc that made a library's device code."""
    return sorted(set(re.findall(r"Cuda compilation tools, .*V([\d.]+)", dump(library, "-elf"))))


def parse_usage(text: str) -> Kernels:
    """Registers and bytes of every kernel, of what ``cuobjdump -res-usage`` printed."""
    kernels: Kernels = {}
    for line in text.splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            architecture = kernels.setdefault(found[1], {})
        elif found := re.search(r"Function (\w+)", line):
            name = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            kinds = ("registers", "stack", "shared", "local")
            architecture[name] = dict(zip(kinds, map(int, found.groups()), strict=True))
    return kernels


def parse_code(text: str) -> dict[str, dict[str, list[str]]]:
    """Instructions of every kernel, of what ``cuobjdump -sass`` printed."""
    kernels: dict[str, dict[str, list[str]]] = {}
    for line in text.splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            architecture = kernels.setdefault(found[1], {})
        elif found := re.search(r"Function : (\w+)", line):
            lines = architecture.setdefault(found[1], [])
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            lines.append(found[1])
    return kernels


def count_instructions(lines: list[str]) -> dict[str, int]:
    """How many of a kernel's instructions are of each kind."""
    counts = {"instructions": len(lines)}
    for line in lines:
        opcode = re.sub(r"^@!?\w+\s+", "", line).split()[0]
        name = opcode.split(".")[0]
        if name in ("LDG", "STG"):
            name += ".E.128" if opcode.startswith(f"{name}.E.128") else ".other"
        elif name not in COUNTED:
            continue
        counts[name] = counts.get(name, 0) + 1
    return counts


def gemm_name(mangled: str) -> str | None:
    """Of a kernel of CUTLASS, which would go on for pages: what is ours of its types."""
    if not mangled.startswith("_ZN7cutlass"):
        return None
    kind = "sm90" if "MainloopSm90" in mangled else "sm80"
    found = re.finditer(r"8keye_ops(\d+)", mangled)
    ours = dict.fromkeys(mangled[at.end() : at.end() + int(at[1])] for at in found)
    return f"gemm_{kind}<{', '.join(ours)}>"


def demangle(names: list[str]) -> dict[str, str]:
    """Readable names of kernels, without their parameters."""
    # c++filt gives up on the names of CUTLASS.
    short = [gemm_name(name) or name for name in names]
    text = subprocess.run(
        ["c++filt", *short], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    readable = [re.sub(r"^void |keye_ops::|\([^()]*\)$", "", line) for line in text]
    if len(set(readable)) != len(readable):
        raise ValueError(f"kernels must differ by more than their parameters, got {readable}")
    return dict(zip(names, readable, strict=True))


def read_kernels(library: Path, required: tuple[str, ...] = REQUIRED) -> Kernels:
    """The entries of a library, without zeros.

    Raises:
        ValueError: the package's library lacks a required architecture.
    """
    usage, code = parse_usage(dump(library, "-res-usage")), parse_code(dump(library, "-sass"))
    kernels: Kernels = {}
    for architecture in ARCHITECTURES:
        if architecture not in usage:
            if library.name == LIBRARY.name and architecture in required:
                raise ValueError(
                    f"{library.name} must be built for {', '.join(required)}, got "
                    f"{', '.join(usage) or 'none'}"
                )
            continue
        names = demangle(sorted(usage[architecture]))
        entries = kernels[architecture] = {}
        for name, readable in sorted(names.items(), key=lambda item: item[1]):
            counts = usage[architecture][name] | count_instructions(code[architecture][name])
            entries[readable] = {what: count for what, count in counts.items() if count}
    return kernels


def spills(kernels: Kernels) -> list[str]:
    """A line for every kernel that keeps registers in memory."""
    return [
        f"{kernel} on {architecture} spills: {what} {entry[what]}"
        for architecture, entries in kernels.items()
        for kernel, entry in entries.items()
        for what in SPILLS
        if entry.get(what)
    ]


def differences(recorded: Kernels, built: Kernels) -> list[str]:
    """A line for everything that the ledger records and the library contradicts."""
    lines = []
    for architecture in ARCHITECTURES:
        if architecture not in built and architecture not in REQUIRED:
            continue
        before, after = recorded.get(architecture, {}), built.get(architecture, {})
        for kernel in sorted({*before, *after}):
            old, new = before.get(kernel), after.get(kernel)
            if old is None or new is None:
                lines.append(f"{kernel} on {architecture} is {'new' if old is None else 'gone'}")
                continue
            for what in sorted({*old, *new}):
                if old.get(what, 0) != new.get(what, 0):
                    change = f"{what} {old.get(what, 0)} -> {new.get(what, 0)}"
                    lines.append(f"{kernel} on {architecture}: {change}")
    return lines


def complaints(library: Path, kernels: Kernels) -> list[str]:
    """What is wrong with a library and its entries; nothing if it is by another nvcc."""
    ledger = read_ledger()
    stale = []
    if ledger["nvcc"] == compilers(library):
        stale = differences(ledger["libraries"].get(library.name, {}), kernels)
    return spills(kernels) + stale


def read_ledger() -> dict:
    """The recorded entries, or an empty ledger."""
    return json.loads(LEDGER.read_text()) if LEDGER.exists() else {"nvcc": [], "libraries": {}}


def write_ledger(ledger: dict) -> None:
    """Write one kernel a line, so that a difference of the file is readable."""
    text = json.dumps(ledger, indent=1)
    lines = re.sub(r"\{[^{}]*\}", lambda entry: " ".join(entry[0].split()), text)
    LEDGER.write_text(lines + "\n")


def print_kernels(library: Path, kernels: Kernels) -> None:
    """Print a table of a library's kernels."""
    sys.path.insert(0, str(PACKAGE.parent))
    from keye_ops.table import print_table

    names = ["registers", "shared", "instructions", *COUNTED[:-2]]
    names += ["LDG.E.128", "STG.E.128", "LDG.other", "STG.other"]
    entries = [entry for of in kernels.values() for entry in of.values()]
    names = [name for name in names if any(name in entry for entry in entries)]
    rows = [
        [kernel, architecture, *(entry.get(name, 0) for name in names)]
        for architecture, of in kernels.items()
        for kernel, entry in of.items()
    ]
    print_table(library.name, ["kernel", "arch", *names], rows)


def main() -> None:
    """Record the libraries, or check what is recorded of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("libraries", nargs="*", type=Path, default=[LIBRARY], metavar="LIBRARY")
    parser.add_argument("--check", action="store_true", help="record nothing; fail if stale")
    arguments = parser.parse_args()
    ledger, failures = read_ledger(), []
    for library in arguments.libraries:
        required = REQUIRED if arguments.check else ARCHITECTURES
        kernels, nvcc = read_kernels(library, required), compilers(library)
        print_kernels(library, kernels)
        if arguments.check:
            failures += complaints(library, kernels)
        else:
            failures += spills(kernels)
            others = {**ledger["libraries"], library.name: kernels}
            ledger = {"nvcc": nvcc, "libraries": dict(sorted(others.items()))}
        if arguments.check and ledger["nvcc"] != nvcc:
            failures.append(f"{library.name}: recorded with nvcc {ledger['nvcc']}, built by {nvcc}")
    if failures:
        sys.exit("\n".join(failures))
    if not arguments.check:
        write_ledger(ledger)


if __name__ == "__main__":
    main()
