"""Kernels that pass over memory once do so: bytes that they ask for, counted by the executor."""

from __future__ import annotations

import queue

import host_cuda
import planted_faults
import pytest
import torch
from mutation.build import Project, Workspace
from planted_fault import Fault

import keye_ops

pytestmark = pytest.mark.skipif(
    host_cuda.unavailable() is not None, reason=str(host_cuda.unavailable())
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# In the names of what is small: parameters and their gradients' partial sums, tables, the rest.
SMALL = ("weight", "bias", "position", "inv_freq", "axis", "grid", "offset", "error")


def report_of(function, **schedule):
    """Of the one launch of a call."""
    with host_cuda.host_cuda(**schedule):
        function()
        (report,) = host_cuda.take_reports()
    assert not report.findings, report.text()
    return report


def traffic_of(function):
    """Bytes loaded and stored by the one launch of a call, by the name of the memory."""
    report = report_of(function)
    assert (
        sum(loaded for loaded, _ in report.traffic.values())
        == (report.counters["global_bytes_loaded"])
    )
    assert (
        sum(stored for _, stored in report.traffic.values())
        == (report.counters["global_bytes_stored"])
    )
    return report.traffic


def parted(traffic):
    """That of the tensors, and that of what is small."""
    small = {name for name in traffic if any(word in name for word in SMALL)}
    return (
        {name: x for name, x in traffic.items() if name not in small},
        {name: traffic[name] for name in small},
    )


def randoms(*shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


# ---- rope ----

# Heads of q and k, head_dim, position axes: the vision tower's and the text model's.
ROPE = {"vision": (16, 16, 72, 2), "text": (32, 8, 128, 3)}


class RopeCase:
    """Arguments of a call on a few tokens."""

    def __init__(self, shape, dtype):
        heads, kv_heads, head_dim, axes = ROPE[shape]
        sizes = [(5, heads, head_dim), (5, kv_heads, head_dim), (head_dim,), (head_dim,)]
        self.q, self.k, *weights = randoms(*sizes, dtype=dtype)
        pairs = head_dim // 2
        axis = (torch.arange(pairs) % axes).int()
        positions = torch.arange(5 * axes).view(axes, 5)
        self.table = positions, 10000.0 ** -torch.linspace(0, 0.95, pairs), axis
        self.weights = dict(zip(("q_norm_weight", "k_norm_weight"), weights, strict=True))

    def traffic(self, op=keye_ops.rope, **options):
        return traffic_of(lambda: op(self.q, self.k, *self.table, **options))

    @property
    def num_bytes(self):
        return self.q.nbytes, self.k.nbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROPE)
def test_rope_reads_and_writes_q_and_k_once(shape, dtype):
    case = RopeCase(shape, dtype)
    q, k = case.num_bytes
    tensors, tables = parted(case.traffic())
    assert tensors == {"q": (q, 0), "k": (k, 0), "q's output": (0, q), "k's output": (0, k)}
    # A warp reads the tables once for all of its rows; so few tokens are the worst case.
    assert set(tables) == {"position_ids", "inv_freq", "axis"}
    assert sum(loaded for loaded, _ in tables.values()) < q + k
    assert not any(stored for _, stored in tables.values())

    tensors, tables_in_place = parted(case.traffic(keye_ops.rope_))
    assert tensors == {"q": (q, q), "k": (k, k)}
    assert tables_in_place == tables


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROPE)
def test_the_norm_before_rope_adds_nothing_but_its_weights(shape, dtype):
    case = RopeCase(shape, dtype)
    plain, normed = case.traffic(), case.traffic(**case.weights)
    weights = {name: normed.pop(name) for name in case.weights}
    assert normed == plain
    for (loaded, stored), num_bytes in zip(weights.values(), case.num_bytes, strict=True):
        assert 0 < loaded <= num_bytes  # at most once a row
        assert stored == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROPE)
def test_the_backward_of_rope_reads_and_writes_once(shape, dtype):
    case = RopeCase(shape, dtype)
    q, k = case.num_bytes
    args = (case.q.flip(0), case.k.flip(0), case.q, case.k, *case.table, *case.weights.values())
    op = torch.ops.keye_ops.rope_backward
    tensors, small = parted(traffic_of(lambda: op(*args, False, 1e-6)))
    reads = {"q": (q, 0), "k": (k, 0), "dq": (q, 0), "dk": (k, 0)}
    assert tensors == reads | {"q's output": (0, q), "k's output": (0, k)}
    for name in ("dq_norm_weight", "dk_norm_weight"):  # fp32, a row a warp
        loaded, stored = small[name]
        assert loaded == 0
        assert 0 < stored <= 8 * case.q.shape[-1] * 4


# ---- norms ----

ROWS = {"vision": (8, 1152), "text": (8, 4096)}


def added_norm(op, added):
    """Forward and backward of add_layer_norm or add_rms_norm; tensors read, tensors written."""

    def calls(shape, dtype):
        width = shape[1]
        x, other, dsum, dnormed, weight, bias = randoms(*[shape] * 4, width, width, dtype=dtype)
        parameters = (weight, bias) if op == "add_layer_norm" else (weight,)
        names = torch.ops.keye_ops
        forward, backward = getattr(names, op), getattr(names, f"{op}_backward")
        residual, dsum = (other, dsum) if added else (None, None)
        yield (lambda: forward(x, residual, *parameters)), 1 + added, 1 + added
        yield (lambda: backward(dsum, dnormed, x, weight, 1e-6)), 2 + added, 1

    return op, calls


def merged_norm(after):
    """Forward and backward of merge_norm."""

    def calls(shape, dtype):
        rows, width = shape
        length = 4 * width if after else width
        sizes = (shape, length, length, (rows // 4, 4 * width))
        x, weight, bias, dout = randoms(*sizes, dtype=dtype)
        grid = keye_ops.PackedGrid.from_grid_thw([(1, 2, rows // 2)])
        where, options = (grid.grid, grid.image_offsets), (2, False, 1e-5)
        names = torch.ops.keye_ops
        yield (lambda: names.merge_norm(x, weight, bias, *where, *options)), 1, 1
        yield (lambda: names.merge_norm_backward(dout, x, weight, *where, *options)), 2, 1

    return "merge_norm", calls


NORMS = {
    "add_layer_norm": added_norm("add_layer_norm", True),
    "layer_norm": added_norm("add_layer_norm", False),
    "add_rms_norm": added_norm("add_rms_norm", True),
    "rms_norm": added_norm("add_rms_norm", False),
    "merge_norm before": merged_norm(False),
    "merge_norm after": merged_norm(True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("name", NORMS)
def test_norms_read_and_write_once(name, shape, dtype):
    op, calls = NORMS[name]
    if op not in host_cuda.OPS:
        pytest.skip(f"{op} has no CUDA kernel")
    if shape == "text" and op == "merge_norm":
        pytest.skip("it is the vision tower's")
    rows, width = ROWS[shape]
    whole = rows * width * torch.empty((), dtype=dtype).element_size()
    for call, num_read, num_written in calls(ROWS[shape], dtype):
        # Sectors: lanes that have no share of a row may ask for what others of their warp ask for.
        report = report_of(call, counters=True)
        tensors, small = parted(report.sectors)
        written = [stored for loaded, stored in tensors.values() if loaded == 0]
        read = [loaded for loaded, stored in tensors.values() if stored == 0]
        assert written == [whole / 32] * num_written, tensors
        assert len(read) == num_read == len(tensors) - num_written, tensors
        assert all(whole / 32 <= sectors <= 1.02 * whole / 32 for sectors in read), tensors

        # A row reads the parameters from the caches, in a backward in each of two passes; partial
        # sums in fp32 are one row a row at most, and nobody reads them.
        passes = 2 if any("partial" in name for name in small) else 1
        for name, (loaded, stored) in small.items():
            assert loaded <= 1.02 * passes * whole / 32, small
            assert 0 in (loaded, stored), small
            assert report.traffic[name][1] <= rows * width * 4, report.traffic
        stores = [stored for _, stored in parted(report.traffic)[0].values() if stored]
        assert stores == [whole] * num_written


# ---- an extra read shows, though numbers are right and nothing is reported ----

LOAD = "if (head + r * lane.num_groups < last) chunks[r] = load_bytes<Chunk>(x_row);"
EXTRA_READS = {
    "rope": (Fault("row read twice", "rope", LOAD, f"{LOAD}\n{LOAD}", ()), {"q", "k"}),
    "row_sums": (
        Fault(
            "row read twice",
            "row_sums",
            "    for (const float value : chunk.values) sum += value;",
            "    for (const float value : load_bytes<RowSumsChunk>(row + i).values) sum += value;",
            (),
        ),
        {"x"},
    ),
}


@pytest.mark.parametrize("kernel", EXTRA_READS)
def test_an_extra_read_shows(kernel, tmp_path):
    fault, twice = EXTRA_READS[kernel]
    build = host_cuda.build()
    workspaces = queue.Queue()
    project = Project.read(build, planted_faults.CSRC)
    workspaces.put(Workspace(project, tmp_path))
    clean = planted_faults.observe(fault, build)
    faulty = planted_faults.try_fault(fault, project, workspaces)
    for outcome in (clean, faulty):
        assert outcome.is_clean(), outcome
    assert len(clean.traffic) == len(faulty.traffic) > 0
    for before, after in zip(clean.traffic, faulty.traffic, strict=True):
        doubled = {name: [2 * before[name][0], before[name][1]] for name in twice & before.keys()}
        assert doubled
        assert after == before | doubled
