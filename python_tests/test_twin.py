"""The twins on the host executor give what numpy says they must; the comparer finds differences."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter

import cuda_ledger
import host_cuda
import numpy as np
import pytest

from keye_ops.bench_command import bench_module

twin = bench_module("twin")
PTX = ("approx", "barrier", "cluster", "control", "ldst", "mbarrier", "mma", "tma", "wgmma")
VOCABULARY = ["thread.cuh", "memory.cuh", *(f"ptx/{name}.cuh" for name in PTX)]
HOST_ONLY = {"host_shuffle", "host_atomic", "flushed", "rounded_bits"}
LANES = np.arange(32)


# ---- what numpy says; words in, words out ----


def words_of(values):
    return np.ascontiguousarray(values).reshape(-1).view(np.uint32)


def indices(t, words):
    z, y, x, thread = np.indices((2, 2, 3, 64))
    columns = (x * 100 + y * 10 + z, x * 0 + 3064, thread, thread // 32)
    return np.stack(columns, -1).astype(np.uint32)


def shuffles(t, words):
    value, operand = words[:32], words[32:] % 32
    half = LANES // 16 * 16
    up, down = LANES - operand.astype(int), LANES + operand.astype(int)
    sources = (
        operand,
        np.where(up < 0, LANES, up),
        np.where(down > 31, LANES, down),
        LANES ^ operand,
        half + operand % 16,
        LANES ^ (operand % 16),
    )
    return np.concatenate([value[source] for source in sources])


def halves(function, values):
    return np.repeat([function(values[:16]), function(values[16:])], 16)


def ballot(bits):
    return sum(int(bit) << lane for lane, bit in enumerate(bits))


def votes(t, words):
    odd, rare = words[:32] % 2 != 0, words[32:] % 16 == 0
    rows = [
        np.full(32, ballot(odd)),
        np.repeat([ballot(odd[:16]), ballot(odd[16:]) << 16], 16),
        np.full(32, odd.any()),
        halves(np.any, rare),
        np.zeros(32),
        np.ones(32),
        np.full(32, odd.all()),
        halves(np.all, ~rare),
    ]
    return np.concatenate(rows).astype(np.uint32)


def reductions(t, words):
    signed = words.view(np.int32)
    ops = [np.add, np.minimum, np.maximum, np.bitwise_and, np.bitwise_or, np.bitwise_xor]
    ops = [lambda x, op=op: op.reduce(x, dtype=x.dtype) for op in ops]
    calls = [(op, words) for op in ops] + [(op, signed) for op in ops[:3]]
    full = [np.full(32, op(x)).view(np.uint32) for op, x in calls]
    return np.concatenate([*full, *(halves(op, x).view(np.uint32) for op, x in calls)])


def barriers(t, words):
    swapped = np.roll(words, 32)
    return np.concatenate([np.where(np.arange(64) < 32, 0, swapped), swapped, swapped])


def approximation(function):
    def run(t, words):
        with np.errstate(all="ignore"):
            x = words.view(np.float32).astype(np.float64)
            if "ftz" in t.name:
                x = np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(0.0, x), x)
            return function(x).astype(np.float32).view(np.uint32)

    return run


def maximum(t, words):
    x = words.view(np.float32)
    return np.fmax(x, np.roll(x, -1)).view(np.uint32)


def conversion(t, words):
    x = words.view(np.float32)
    with np.errstate(over="ignore"):
        half = twin.to_bf16(x) if "bf16" in t.name else x.astype(np.float16).view(np.uint16)
    half = np.where(np.isnan(x), 0x7FFF, half).astype(np.uint32)
    return half | np.roll(half, -1) << 16


def reversed_lanes(t, words):
    return words_of(words.view(np.uint8).reshape(32, -1)[::-1])


def atomics(t, words):
    dtype = np.uint32 if t.name.endswith("32") else np.uint64
    value = words.view(dtype)
    after_add = value + value
    after_max = np.maximum(after_add, ~value)
    now = after_max | value >> dtype(1)
    cells = [value.sum(dtype=dtype), value.max(), np.bitwise_or.reduce(value), dtype(0)]
    cells += list(np.where(LANES % 2 == 0, value, now))
    old = np.concatenate([0 * value, value, after_add, after_max, now])
    return words_of(np.concatenate([np.array(cells, dtype), old] * 2))


def cp_async(t, words):
    size = int(t.name.split()[1])
    source = np.stack([LANES % (size + 1), size - LANES % (size + 1)])
    data = words.view(np.uint8).reshape(2, 32, size)
    return words_of(np.where(np.arange(size) < source[..., None], data, 0).astype(np.uint8))


def fragment(matrices, transposed):
    """Words [32, count] of matrices [count, 8, 8]: a lane has two neighbours of a row."""
    matrices = matrices.swapaxes(1, 2) if transposed else matrices
    return words_of(matrices.reshape(-1, 32, 2)).reshape(-1, 32).T


def ldmatrix(t, words):
    count = int(t.name.split()[1])
    rows = words[:128].view(np.uint16).reshape(32, 8)[words[128:] % 32]
    return fragment(rows[: count * 8].reshape(count, 8, 8), "trans" in t.name).reshape(-1)


def stmatrix(t, words):
    count = int(t.name.split()[1])
    matrices = np.ascontiguousarray(words.reshape(32, count).T).view(np.uint16).reshape(-1, 8, 8)
    matrices = matrices.swapaxes(1, 2) if "trans" in t.name else matrices
    shared = np.zeros((32, 8), np.uint16)
    shared[(LANES[: count * 8] * 5 + 3) % 32] = matrices.reshape(-1, 8)
    return words_of(shared)


def floats(t, words):
    if t.data == "bf16":
        return (words_of(words).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return words.view(np.float16)


def mma(t, words):
    k = 8 if "k8" in t.name else 16
    a, b = floats(t, words[:128]).reshape(32, 8), floats(t, words[128:192]).reshape(32, 4)
    lane, two = np.arange(32)[:, None] // 4, np.arange(32)[:, None] % 4 * 2 + np.arange(2)
    matrix_a, matrix_b = np.zeros((16, k)), np.zeros((8, k))
    for i in range(k // 4):  # rows, rows + 8, then the next 8 of k
        matrix_a[lane + i % 2 * 8, two + i // 2 * 8] = a[:, 2 * i : 2 * i + 2]
    for i in range(k // 8):
        matrix_b[lane, two + i * 8] = b[:, 2 * i : 2 * i + 2]
    d = matrix_a @ matrix_b.T
    c = words[192:].reshape(32, 4) % 16
    pieces = [d[lane, two], d[lane + 8, two]]
    return words_of((np.concatenate(pieces, 1) + c).astype(np.float32))


def swizzle_chunks(data, span):
    """Bytes with the 16-byte chunks of every 128-byte line moved by the line's index."""
    lines = -(-data.size // 128)
    padded = np.resize(data, lines * 128).reshape(lines, 8, 16)
    chunks = np.arange(8) ^ (np.arange(lines)[:, None] % (span // 16))
    return np.take_along_axis(padded, chunks[..., None], 1).reshape(-1)[: data.size]


def tensor_copy(t, words):
    size, rank = t.element_size, len(t.sizes)
    places = np.indices(t.box[::-1]).reshape(rank, -1)[::-1]  # dimension 0 first
    places = places + np.array(t.coords)[:, None]
    inside = ((places >= 0) & (places < np.array(t.sizes)[:, None])).all(0)
    offsets = (places * np.array((size, *t.strides))[:, None]).sum(0)[inside]
    data, span = words.view(np.uint8), 16 << t.swizzle
    if "load" in t.name:
        box = np.zeros((inside.size, size), np.uint8)
        box[inside] = data[offsets[:, None] + np.arange(size)]
        return words_of(swizzle_chunks(box.reshape(-1), span))
    out = np.zeros(t.out_words * 4, np.uint8)
    out[offsets[:, None] + np.arange(size)] = swizzle_chunks(data, span).reshape(-1, size)[inside]
    return words_of(out)


def bulk(t, words):
    return np.concatenate([words, np.ones(8, np.uint32)])


def cluster(t, words):
    blocks = words.reshape(4, -1)
    ranks = np.arange(4, dtype=np.uint32) * 16 + 4
    return np.concatenate([*np.roll(blocks, 1, 0), *np.roll(blocks, -1, 0), ranks])


def operand(data, lines, mn_major, swizzle):
    """The matrix [lines, 64] in raw 16-bit values of shared memory."""
    unit = 8 << swizzle
    plain = swizzle_chunks(words_of(data).view(np.uint8), 16 << swizzle).view(np.uint16)
    if mn_major:
        return plain.reshape(-1, 64, unit).swapaxes(1, 2).reshape(-1, 64)[:lines]
    return plain[: lines * 64].reshape(-1, lines, unit).swapaxes(0, 1).reshape(lines, 64)


def wgmma(t, words):
    _, _, _, n, _, a_major, b_major = t.name.split()
    n = int(n)
    warp, row, pair, high, column = np.indices((4, 8, 4, 2, 2))  # high: 8 rows further
    thread = warp * 32 + row * 4 + pair
    rows = warp * 16 + row + high * 8
    outputs = []
    for swizzle in range(4):
        if "rs" in t.function:
            fragments = floats(t, words[:2048]).reshape(4, 128, 4, 2)  # [step, thread, register]
            a = np.zeros((64, 64))
            for step, half in np.ndindex(4, 2):
                register = high + half * 2
                k = step * 16 + half * 8 + pair * 2 + column
                a[rows, k] = fragments[step][thread, register, column]
        else:
            raw = operand(words[:2048], 64, a_major == "mn", swizzle)
            a = floats(t, words_of(raw)).reshape(64, 64)
        raw = operand(words[2048:], n, b_major == "mn", swizzle)
        b = floats(t, words_of(raw)).reshape(n, 64)
        d = a.astype(np.float64) @ b.T.astype(np.float64)
        out = np.zeros((n // 2, 128))
        for i in range(n // 8):
            out[i * 4 + high * 2 + column, thread] = d[rows, i * 8 + pair * 2 + column]
        outputs.append(out.astype(np.float32))
    return words_of(np.stack(outputs))


ORACLES = {
    "indices": indices,
    "shuffles": shuffles,
    "votes": votes,
    "reductions": reductions,
    "barriers": barriers,
    "forget": lambda t, words: words,
    "ex2_approx_ftz": approximation(np.exp2),
    "rcp_approx_ftz": approximation(lambda x: 1 / x),
    "rsqrt_approx_ftz": approximation(lambda x: 1 / np.sqrt(x)),
    "rsqrt_of": approximation(lambda x: 1 / np.sqrt(x)),
    "log_of": approximation(np.log),
    "max_of": maximum,
    "popcount": lambda t, words: np.array([int(x).bit_count() for x in words], np.uint32),
    "cvt_rn_x2": conversion,
    "load_bytes": reversed_lanes,
    "atomics": atomics,
    "cp_async_ca": cp_async,
    "cp_async_cg": cp_async,
    "ldmatrix": ldmatrix,
    "ldmatrix_trans": ldmatrix,
    "mma_m16n8k8": mma,
    "mma_m16n8k16": mma,
    "mbarrier_threads": lambda t, words: np.tile(np.array([1, 0, 1, 0], np.uint32), 64),
    "elect_sync": lambda t, words: np.ones(192, np.uint32),
    "stmatrix": stmatrix,
    "stmatrix_trans": stmatrix,
    "cp_async_bulk": bulk,
    "cp_async_bulk_tensor_load": tensor_copy,
    "cp_async_bulk_tensor_store": tensor_copy,
    "st_shared_cluster": cluster,
    "setmaxnreg": lambda t, words: words + np.uint32(1),
    "griddepcontrol": lambda t, words: words ^ np.uint32(1),
    "wgmma_ss": wgmma,
    "wgmma_rs": wgmma,
}


class Numpy:
    """A machine made of the functions above, that gets one bit wrong where it is told to."""

    def __init__(self, planted=None):
        self.planted = planted

    def run(self, t, words):
        out = words_of(ORACLES[t.function](t, words).copy())
        if t.name == self.planted:
            # A high bit: the lowest are within what approximations may be off.
            out[out.size // 2] ^= 1 << 20
        return out


# ---- tests ----


@pytest.fixture(scope="module")
def folder():
    pytest.importorskip("pybind11")
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    return host_cuda.build()


@pytest.fixture(scope="module")
def host(folder):
    return twin.Machine(folder / "host_cuda_twin.so", host_cuda.SEED)


def test_the_host_executor_does_what_numpy_says(host):
    result = twin.compare(host, Numpy(), host.twins)
    assert result.mismatches == []
    assert set(result.cases) == set(ORACLES)
    assert sum(result.cases.values()) > 500


def test_every_function_of_the_vocabulary_has_a_twin():
    csrc = host_cuda.ROOT / "csrc"
    twins = "\n".join(path.read_text() for path in csrc.glob("host_executor/twin/*.cuh"))
    functions = set()
    for name in VOCABULARY:
        text = (csrc / "common" / name).read_text()
        functions |= set(re.findall(r"KEYE_DEVICE [\w:]+(?: \(&)? ?[*&]?(\w+)\(", text)) - {
            "name",
            "__attribute__",
        }
        functions |= set(re.findall(r"KEYE_(?:REDUX|ATOMIC)\((?!name)(\w+)", text))
        functions |= set(re.findall(r"constexpr uint64_t (\w+)\(", text))
    assert len(functions) > 80
    absent = [f for f in functions - HOST_ONLY if not re.search(rf"\b{f}\b", twins)]
    assert absent == []


@pytest.mark.parametrize("function", ORACLES)
def test_one_wrong_bit_is_reported(host, function):
    some = [t for t in host.twins if t.function == function][:2]
    result = twin.compare(host, Numpy(some[-1].name), some)
    assert {m.twin for m in result.mismatches} == {some[-1].name}
    assert all(m.count == 1 and m.detail.startswith("word ") for m in result.mismatches)


def test_the_comparer_reports_what_fails_to_run(host):
    class Broken:
        def run(self, t, words):
            raise RuntimeError("no such kernel")

    result = twin.compare(host, Broken(), host.twins[:1])
    assert result.cases == Counter({host.twins[0].function: 1})
    assert [m.detail for m in result.mismatches] == ["no such kernel"]


@pytest.mark.parametrize(("rule", "steps"), [("ulp1", 1), ("ulp2", 2)])
def test_approximations_may_be_off_by_so_many_ulps(host, rule, steps):
    t = next(t for t in host.twins if t.rule == rule)
    a = np.array([1.5, 3e38, 1.2e-38], np.float32).view(np.uint32)
    assert not twin.wrong(t, a, a + np.uint32(steps)).any()
    assert twin.wrong(t, a[:2], a[:2] + np.uint32(steps + 1)).all()
    nans = np.array([0x7FC00000, 0x7F800001, 0x7F800000, 0x00000001], np.uint32)
    other = np.array([0x7FFFFFFF, 0x3F800000, 0x7F7FFFFF, 0x80000000], np.uint32)
    assert twin.wrong(t, nans, other).tolist() == [False, True, True, False]


def test_nvcc_compiles_the_twins_as_recorded(folder):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    build = ["cmake", "--build", folder, "--target", "twin_cuda"]
    result = subprocess.run(build, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    if cuda_ledger.find_cuobjdump() is None:
        pytest.skip("cuobjdump is not installed")
    kernels = cuda_ledger.read_kernels(folder / "twin_cuda.so")
    assert len(kernels["sm_80"]) > 25
    assert len(kernels["sm_90a"]) > 200
    (twin_of_setmaxnreg,) = (of for name, of in kernels["sm_90a"].items() if "setmaxnreg" in name)
    assert twin_of_setmaxnreg["registers"] == 168
    gemm = kernels["sm_90a"]["selftest::gemm_wgmma_kernel"]
    assert gemm["HGMMA"] >= 4
    assert gemm["UTMALDG"] == 2
    assert gemm["UTMASTG"] == 1
    assert cuda_ledger.complaints(folder / "twin_cuda.so", kernels) == []
