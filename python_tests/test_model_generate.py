"""Generation: greedy and sampled, batches, stop tokens, streaming."""

from types import SimpleNamespace

import pytest
import torch
from model_helpers import EOS, IMAGE, make_model, patches, text_ids, vision_ids

from keye_ops.model import generate

GRIDS = [(1, 4, 6), (1, 2, 4)]


@pytest.fixture(scope="module")
def model():
    return make_model()


def image_prompt():
    ids = text_ids(3) + vision_ids(IMAGE, GRIDS) + text_ids(4, seed=1)
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": patches(GRIDS),
        "image_grid_thw": GRIDS,
    }


def greedy_by_full_forwards(model, inputs, steps):
    """What generation means: the most likely next token, without any cache."""
    ids = inputs["input_ids"]
    for _ in range(steps):
        with torch.no_grad():
            logits = model(**{**inputs, "input_ids": ids})
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, -steps:].tolist()


@pytest.mark.parametrize("version", ["preview", "1.5"])
def test_greedy_equals_full_forwards(version):
    model = make_model(version, seed=4)
    inputs = image_prompt()
    want = greedy_by_full_forwards(model, inputs, 12)
    assert generate(model, inputs, max_new_tokens=12, stop_token_ids=[]) == [want]
    assert len(set(want)) > 3


def test_batch_of_different_lengths_equals_single_prompts(model):
    image = image_prompt()
    short = text_ids(5, seed=2)
    long = image["input_ids"][0].tolist()
    gap = len(long) - len(short)
    batch = image | {
        "input_ids": torch.tensor([[0] * gap + short, long]),
        "attention_mask": torch.tensor([[0] * gap + [1] * 5, [1] * len(long)]),
    }
    got = generate(model, batch, max_new_tokens=10, stop_token_ids=[])
    alone = [{"input_ids": torch.tensor([short])}, image]
    assert got == [generate(model, x, max_new_tokens=10, stop_token_ids=[])[0] for x in alone]


def test_inputs_may_be_an_object_with_more_in_it(model):
    inputs = image_prompt()
    bag = SimpleNamespace(**inputs, timestamps=[0.5])
    want = generate(model, inputs, max_new_tokens=3)
    assert generate(model, bag, max_new_tokens=3) == want
    assert generate(model, inputs | {"timestamps": [0.5]}, max_new_tokens=3) == want


def test_stop_tokens_end_each_prompt_by_itself(model):
    batch = {"input_ids": torch.tensor([text_ids(5, seed=s) for s in range(3)])}
    free = generate(model, batch, max_new_tokens=8, stop_token_ids=[])
    stop = free[0][2]
    got = generate(model, batch, max_new_tokens=8, stop_token_ids=[stop])
    for answer, full in zip(got, free, strict=True):
        end = full.index(stop) + 1 if stop in full else 8
        assert answer == full[:end]
    assert {len(answer) for answer in got} != {8}


def test_finished_prompts_are_not_computed(model):
    batch = {"input_ids": torch.tensor([text_ids(5, seed=s) for s in range(2)])}
    free = generate(model, batch, max_new_tokens=6, stop_token_ids=[])
    stop = next(t for t in free[0][:3] if t not in free[1])
    rows = []
    hook = model.model.norm.register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
    try:
        generate(model, batch, max_new_tokens=6, stop_token_ids=[stop])
    finally:
        hook.remove()
    shared = free[0].index(stop)
    assert rows == [10] + [2] * shared + [1] * (5 - shared)


def test_stop_tokens_come_from_the_configuration(model):
    inputs = {"input_ids": torch.tensor([text_ids(5)])}
    with torch.no_grad():
        saved = model.lm_head.weight.clone()
        # Make the eos row win: a multiple of the row that wins now.
        first = generate(model, inputs, max_new_tokens=1)[0][0]
        model.lm_head.weight[EOS] = 3 * saved[first]
        try:
            assert generate(model, inputs, max_new_tokens=9)[0] == [EOS]
        finally:
            model.lm_head.weight.copy_(saved)


def test_callback_streams_every_step(model):
    batch = {"input_ids": torch.tensor([text_ids(5, seed=s) for s in range(2)])}
    free = generate(model, batch, max_new_tokens=6, stop_token_ids=[])
    stop = next(t for t in free[0][1:4] if t not in free[1])
    steps = []
    options = {"max_new_tokens": 6, "stop_token_ids": [stop], "callback": steps.append}
    got = generate(model, batch, **options)
    assert len(got[0]) < 6 == len(got[1]) == len(steps)
    for b, answer in enumerate(got):
        column = [step[b] for step in steps]
        assert column == answer + [None] * (6 - len(answer))


def test_sampling_is_reproducible(model):
    inputs = {"input_ids": torch.tensor([text_ids(5)] * 2)}
    options = {"max_new_tokens": 12, "temperature": 1.5, "stop_token_ids": []}
    first = generate(model, inputs, seed=1, **options)
    assert generate(model, inputs, seed=1, **options) == first
    assert generate(model, inputs, generator=torch.Generator().manual_seed(1), **options) == first
    assert generate(model, inputs, seed=2, **options) != first
    assert first[0] != first[1]  # every prompt draws for itself


def test_narrow_top_p_and_cold_temperature_are_greedy(model):
    inputs = {"input_ids": torch.tensor([text_ids(5)])}
    options = {"max_new_tokens": 8, "stop_token_ids": []}
    greedy = generate(model, inputs, **options)
    assert generate(model, inputs, temperature=1.0, top_p=1e-6, seed=0, **options) == greedy
    assert generate(model, inputs, temperature=1e-5, seed=0, **options) == greedy
    assert generate(model, inputs, temperature=5.0, seed=0, **options) != greedy


def test_samples_follow_the_distribution(model):
    """4000 draws of the next token, all and by top-p, against the model's own probabilities."""
    draws, top_p = 4000, 0.6
    ids = torch.tensor([text_ids(5)])
    with torch.no_grad():
        chances = torch.softmax(model(ids)[0, -1] / 0.7, dim=-1)
    batch = {"input_ids": ids.expand(draws, -1)}
    options = {"max_new_tokens": 1, "temperature": 0.7, "seed": 3}

    def frequencies(**more):
        tokens = torch.tensor(generate(model, batch, **options, **more))[:, 0]
        return torch.bincount(tokens, minlength=96) / draws

    noise = 5 * (chances / draws).sqrt() + 2 / draws
    assert ((frequencies() - chances).abs() <= noise).all()
    ordered, order = chances.sort(descending=True)
    count = int((ordered.cumsum(0) < top_p).sum()) + 1  # the fewest that reach top_p
    kept = torch.zeros_like(chances)
    kept[order[:count]] = ordered[:count] / ordered[:count].sum()
    got = frequencies(top_p=top_p)
    assert (got[kept == 0] == 0).all()
    assert ((got - kept).abs() <= 5 * (kept / draws).sqrt() + 2 / draws).all()


def test_nothing_to_do(model):
    inputs = {"input_ids": torch.tensor([text_ids(5)])}
    assert generate(model, inputs, max_new_tokens=0) == [[]]
    assert generate(model, {"input_ids": inputs["input_ids"][:0]}, max_new_tokens=3) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be >= 0, got -1"),
        ({"temperature": -0.1}, r"temperature must be >= 0, got -0\.1"),
        ({"temperature": float("nan")}, "temperature must be >= 0, got nan"),
        ({"top_p": 0.0}, r"top_p must be above 0 and at most 1, got 0\.0"),
        ({"top_p": 1.5}, r"top_p must be above 0 and at most 1, got 1\.5"),
        ({"seed": 1, "generator": torch.Generator()}, r"a generator, got both \(seed 1\)"),
    ],
)
def test_options_out_of_range(model, options, message):
    inputs = {"input_ids": torch.tensor([[1]])}
    with pytest.raises(ValueError, match="generate: .*" + message):
        generate(model, inputs, **({"max_new_tokens": 1} | options))


def test_unusable_inputs(model):
    with pytest.raises(ValueError, match="generate: inputs must hold input_ids"):
        generate(model, {}, max_new_tokens=1)
    with pytest.raises(ValueError, match="every prompt must have at least one token"):
        generate(model, {"input_ids": torch.empty(1, 0, dtype=torch.long)}, max_new_tokens=1)
    inputs = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    with pytest.raises(ValueError, match="every prompt must have at least one token"):
        generate(model, inputs | {"attention_mask": mask}, max_new_tokens=1)
