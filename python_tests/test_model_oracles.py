"""The model against transformers, where `keye-ops parity` has no row."""

from __future__ import annotations

import pytest
import torch

from keye_ops.model import generate
from keye_ops.parity import Comparison, compare
from keye_ops.parity_oracles import CLIPS, qwen3_twin, small_model, text_ids, vision_tower_error

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "arguments", [(CLIPS, "frame", 6), ([(1, 2, 2)], "clip", 2)], ids=["six layers", "smallest"]
)
def test_vision_tower(arguments):
    result = compare(
        Comparison("tower", "PaddleOCRVisionModel", 1e-5, vision_tower_error, arguments)
    )
    assert result.passed, result


def test_greedy_generation_equals_transformers():
    torch.manual_seed(0)
    model, ids = small_model(), text_ids(1, 7)
    want = qwen3_twin(model).generate(ids, max_new_tokens=20, do_sample=False)[0, 7:].tolist()
    got = generate(model, {"input_ids": ids}, max_new_tokens=20, stop_token_ids=[])
    assert got == [want]
    assert len(set(want)) > 5  # not one token repeated
