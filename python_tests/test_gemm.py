"""What the fused GEMMs do with their products, on the host executor: the parts that are ours."""

import numpy as np
import patch_embed_epilogue_probe as probe
import pytest
from host_cuda import build, executor, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@pytest.fixture(scope="module", autouse=True)
def library():
    path = build() / "host_cuda_patch_embed_epilogue.so"
    if not path.exists():
        pytest.skip("it needs the headers of CUTLASS and CUDA")
    executor().load_library(str(path))


def schedules():
    order, completion = executor().Order, executor().Completion
    return [
        executor().Schedule(0, order.in_order, 0, completion.early),
        executor().Schedule(1, order.reversed, 1, completion.late),
        executor().Schedule(2, order.random, 16, completion.random),
        executor().Schedule(3, order.random, 4, completion.early),
    ]


def run(case, seed=0):
    """The tokens, which do not depend on the order of threads."""
    results = []
    for schedule in schedules():
        epilogue = probe.Epilogue(executor(), case, seed)
        report, right = epilogue.launch().run(executor(), schedule)
        assert not report.findings, f"{case}\n{report.text()}"
        assert right, case
        results.append(epilogue.out)
    assert all(np.array_equal(results[0], other) for other in results[1:]), case
    return results[0]


@pytest.mark.parametrize("case", probe.CASES, ids=str)
def test_positions_and_bias(case):
    run(case)


@pytest.mark.parametrize("case", probe.CASES[:4], ids=str)
def test_both_epilogues_have_the_same_bits(case):
    """But for the order in which bias, product and position are added, which rounds to bf16."""
    options = {name: value for name, value in vars(case).items() if name != "kind"}
    tokens = [probe.from_bf16(run(probe.Case(kind=kind, **options))) for kind in ("sm80", "sm90")]
    np.testing.assert_allclose(*tokens, rtol=2.0**-7)
    assert np.mean(tokens[0] == tokens[1]) > 0.99


@pytest.mark.parametrize("kind", ["sm80", "sm90"])
def test_random_configurations(kind):
    """150 of each, under 4 schedules."""
    rng = np.random.default_rng(3)
    for seed in range(150):
        most = int(rng.choice([3, 6, 14]))
        sizes = tuple(
            (int(rng.integers(1, most)), int(rng.integers(1, most)))
            for _ in range(rng.integers(1, 4))
        )
        case = probe.Case(
            kind=kind,
            sizes=sizes,
            hidden=8 * int(rng.integers(1, 6) if most > 6 else rng.integers(1, 40)),
            side=int(rng.integers(1, 30)),
            has_bias=bool(rng.integers(4)),
            align_corners=bool(rng.integers(2)),
        )
        run(case, seed)
