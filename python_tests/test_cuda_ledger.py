"""The ledger's check, on text that cuobjdump might print and with faults planted in it."""

import copy
import json
import sys

import cuda_ledger
import pytest

LIBRARY = "_C_cuda.abi3.so"
KERNEL = "rope_kernel<float>"
MANGLED = "_ZN8keye_ops11rope_kernelIfEEvPT_"


def usage(architecture, stack=0):
    return (
        f"arch = {architecture}\n Function {MANGLED}:\n"
        f"  REG:77 STACK:{stack} SHARED:1024 LOCAL:0 CONSTANT[0]:632 TEXTURE:0\n"
    )


def code(architecture, *more):
    instructions = ("@!P0 LDG.E.128 R4, [R2.64]", "LDG.E R4, [R2.64]", "HFMA2.MMA R5, -RZ", *more)
    lines = [f"        /*{i:04x}*/    {text} ;   /* 0x0 */" for i, text in enumerate(instructions)]
    return "\n".join([f"arch = {architecture}", f"    Function : {MANGLED}", *lines, ""])


@pytest.fixture
def check(monkeypatch, tmp_path, capsys):
    """Runs the program on made-up dumps; its exit status and what it said."""
    texts = {}
    monkeypatch.setattr(cuda_ledger, "LEDGER", tmp_path / "ledger.json")
    monkeypatch.setattr(cuda_ledger, "dump", lambda library, option: texts[option])

    def run(*arguments, stack=0, more=(), nvcc="13.0.88", architectures=None):
        built = architectures or cuda_ledger.ARCHITECTURES
        texts["-elf"] = f"Tool Version: Cuda compilation tools, release 13.0, V{nvcc}\n"
        texts["-res-usage"] = "".join(usage(name, stack) for name in built)
        texts["-sass"] = "".join(code(name, *more) for name in built)
        monkeypatch.setattr(sys, "argv", ["cuda_ledger.py", LIBRARY, *arguments])
        try:
            cuda_ledger.main()
        except SystemExit as exit:
            return exit.code
        return ""

    return run


def test_it_records_and_then_agrees(check):
    assert check() == ""
    assert check("--check") == ""
    ledger = json.loads(cuda_ledger.LEDGER.read_text())
    assert ledger["nvcc"] == ["13.0.88"]
    assert ledger["libraries"][LIBRARY]["sm_90a"][KERNEL] == {
        "registers": 77,
        "shared": 1024,
        "instructions": 3,
        "LDG.E.128": 1,
        "LDG.other": 1,
    }


def test_one_kernel_is_one_line(check):
    check()
    lines = cuda_ledger.LEDGER.read_text().splitlines()
    assert len([line for line in lines if KERNEL in line and '"registers": 77' in line]) == 6


@pytest.mark.parametrize(
    ("library", "message"),
    [
        ({"more": ["HGMMA.64x64x16.F32 R24, gdesc[UR4]"]}, f"{KERNEL} on sm_80: HGMMA 0 -> 1"),
        ({"nvcc": "13.1.5"}, "recorded with nvcc ['13.0.88'], built by ['13.1.5']"),
        ({"stack": 8}, f"{KERNEL} on sm_120a spills: stack 8"),
        ({"more": ["STL [R1], R4"]}, f"{KERNEL} on sm_89 spills: STL 1"),
    ],
)
def test_what_the_compiler_changed_is_reported(check, library, message):
    check()
    assert message in check("--check", **library)


def test_a_spill_is_not_recorded(check):
    assert "spills" in check(stack=8)
    assert not cuda_ledger.LEDGER.exists()


def test_every_architecture_must_be_there_to_be_recorded(check):
    message = "must be built for sm_80, sm_90a, sm_100a, sm_86, sm_89, sm_120a, got sm_80"
    with pytest.raises(ValueError, match=message):
        check(architectures=["sm_80"])


def test_two_must_be_there_to_be_checked(check):
    check()
    assert check("--check", architectures=cuda_ledger.REQUIRED) == ""
    with pytest.raises(ValueError, match="must be built for sm_80, sm_90a, got sm_80"):
        check("--check", architectures=["sm_80"])


def test_an_architecture_that_need_not_be_there_is_checked_if_it_is(check):
    check()
    message = check("--check", more=["LDG.E R4, [R2.64]"])
    assert f"{KERNEL} on sm_86: LDG.other 1 -> 2" in message


def test_a_doctored_ledger_is_stale(check):
    check()
    ledger = cuda_ledger.read_ledger()
    faults = {
        "registers 76 -> 77": lambda entries: entries[KERNEL].update(registers=76),
        f"{KERNEL} on sm_80 is new": lambda entries: entries.pop(KERNEL),
        "other<float> on sm_80 is gone": lambda entries: entries.update({"other<float>": {}}),
    }
    for message, plant in faults.items():
        doctored = copy.deepcopy(ledger)
        plant(doctored["libraries"][LIBRARY]["sm_80"])
        cuda_ledger.write_ledger(doctored)
        assert message in check("--check")


def test_kernels_of_cutlass_have_short_names():
    gelu = "_ZN7cutlass13device_kernelINS_20MainloopSm90TmaGmmaXIN8keye_ops7GeluErfEEEEvNT_6ParamsE"
    patch = "_ZN7cutlass7Kernel2IN8keye_ops20PatchEmbedSm80ValuesIiEEEEvNT_6ParamsE"
    names = {gelu: "gemm_sm90<GeluErf>", patch: "gemm_sm80<PatchEmbedSm80Values>"}
    assert cuda_ledger.demangle([*names, MANGLED]) == {**names, MANGLED: KERNEL}
