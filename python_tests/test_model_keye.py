"""The whole model: segments, vision rows in the prompt, padding, cache, gradients, wrong input."""

import pytest
import torch
from model_helpers import (
    IMAGE,
    VIDEO,
    make_config,
    make_model,
    patches,
    relative_error,
    text_ids,
    vision_ids,
)

from keye_ops import PackedGrid
from keye_ops.model import KVCache, get_rope_index
from keye_ops.model.cache import SequenceLayout

TOLERANCE = 1e-5
IMAGES, CLIP = [(1, 4, 6), (1, 2, 4)], [(2, 4, 4)]


def prompt(version="1.5", seed=0):
    """Text, an image, text, a clip, an image, text; and the arguments of its vision input."""
    clip = vision_ids(VIDEO, CLIP if version == "preview" else [(1, 4, 4)] * 2)
    ids = text_ids(3, seed) + vision_ids(IMAGE, IMAGES[:1]) + text_ids(2, seed + 1) + clip
    ids += vision_ids(IMAGE, IMAGES[1:]) + text_ids(4, seed + 2)
    vision = {
        "pixel_values": patches(IMAGES, seed),
        "image_grid_thw": IMAGES,
        "pixel_values_videos": patches(CLIP, seed + 1),
        "video_grid_thw": CLIP,
    }
    return ids, vision


def run(model, ids, **inputs):
    with torch.no_grad():
        return model(torch.tensor([ids]), **inputs)


# ---- vision ----


def test_images_do_not_attend_to_each_other():
    model = make_model()
    pixels = patches(IMAGES)
    together = model.encode_images(pixels, IMAGES)
    first, second = pixels.split([24, 8])
    alone = [model.encode_images(first, IMAGES[:1]), model.encode_images(second, IMAGES[1:])]
    assert relative_error(together, torch.cat(alone)) <= TOLERANCE
    changed = model.encode_images(torch.cat([first, second + 1]), IMAGES)
    assert torch.equal(changed[:6], together[:6])
    assert relative_error(changed[6:], together[6:]) > 0.01


@pytest.mark.parametrize(("version", "joint"), [("preview", True), ("1.5", False)])
def test_frames_of_a_clip_attend_jointly_in_preview_alone(version, joint):
    model = make_model(version)
    pixels = patches(CLIP)
    before = model.encode_images(pixels, CLIP)
    pixels[16:] += 1  # the second frame
    after = model.encode_images(pixels, CLIP)
    assert (relative_error(after[:4], before[:4]) > 1e-4) == joint
    per_frame = model.encode_images(pixels, [(1, 4, 4)] * 2)
    assert (relative_error(after, per_frame) > 1e-4) == joint


def test_in_place_rotation_changes_nothing():
    model = make_model()
    pixels = patches(IMAGES)
    with torch.no_grad():
        rotated_in_place = model.encode_images(pixels, IMAGES)
    assert torch.equal(model.encode_images(pixels, IMAGES).detach(), rotated_in_place)
    ids = torch.tensor([text_ids(9)])
    with torch.no_grad():
        logits = model(ids)
    assert torch.equal(model(ids).detach(), logits)


def test_encode_images_takes_a_packed_grid_and_nothing():
    model = make_model()
    pixels = patches(IMAGES)
    grid = PackedGrid.from_grid_thw(IMAGES, segment=model.visual.segment)
    assert torch.equal(model.encode_images(pixels, grid), model.encode_images(pixels, IMAGES))
    assert model.encode_images(pixels[:0], []).shape == (0, model.config.text.hidden_size)


def test_uint8_pixels_are_normalised():
    model = make_model()
    pixels = torch.randint(0, 256, (32, 3, 14, 14), dtype=torch.uint8)
    want = model.encode_images((pixels.float() / 255 - 0.5) / 0.5, IMAGES)
    assert relative_error(model.encode_images(pixels, IMAGES), want) <= TOLERANCE


def test_half_precision_is_close():
    ids, vision = prompt()
    want = run(make_model(), ids, **vision)
    got = run(make_model(dtype=torch.bfloat16), ids, **vision)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, want) < 0.1


def test_autocast_of_the_tower_is_close():
    tower, pixels = make_model().visual, patches([(1, 4, 6)])
    grid = tower.pack([(1, 4, 6)])
    want = tower(pixels, grid)
    with torch.autocast("cpu", torch.bfloat16):
        got = tower(pixels, grid)
    assert relative_error(got, want) < 0.1


def test_hooks_of_the_vision_mlp_see_its_layers():
    mlp, seen = make_model().visual.vision_model.encoder.layers[0].mlp, []
    hidden = torch.randn(5, 144, generator=torch.Generator().manual_seed(0))
    mlp.register_forward_hook(lambda _, args, out: seen.append((*args, out)))
    out = mlp(hidden)
    want = mlp.fc2(torch.nn.functional.gelu(mlp.fc1(hidden), approximate="tanh"))
    torch.testing.assert_close(out, want)
    assert seen[0][0] is hidden
    assert seen[0][1] is out


# ---- prompt ----


@pytest.mark.parametrize("version", ["preview", "1.5"])
def test_rows_go_to_their_tokens_in_order(version):
    """The same as feeding the text model with embeddings put together by hand."""
    model = make_model(version)
    ids, vision = prompt(version)
    with torch.no_grad():
        embeds = model.model.embed_tokens(torch.tensor(ids))
        images = iter(model.encode_images(vision["pixel_values"], IMAGES))
        frames = iter(model.encode_images(vision["pixel_values_videos"], CLIP))
        rows = {IMAGE: images, VIDEO: frames}
        embeds = torch.stack(
            [next(rows[i]) if i in rows else e for i, e in zip(ids, embeds, strict=True)]
        )
        grids = {"image_grid_thw": IMAGES, "video_grid_thw": CLIP}
        positions, _ = get_rope_index(torch.tensor([ids]), model.config, **grids)
        layout = SequenceLayout.from_lengths([len(ids)], embeds.device)
        want = model.lm_head(model.model(embeds, positions[:, 0], layout))
    assert relative_error(run(model, ids, **vision)[0], want) <= TOLERANCE


def test_seconds_move_preview_videos():
    ids = vision_ids(VIDEO, CLIP) + text_ids(3)
    vision = {"pixel_values_videos": patches(CLIP), "video_grid_thw": CLIP}
    model = make_model("preview")
    slow = run(model, ids, **vision)
    assert relative_error(run(model, ids, **vision, second_per_grid_ts=[1.0]), slow) == 0
    assert relative_error(run(model, ids, **vision, second_per_grid_ts=[5.0]), slow) > 1e-3


@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_a_padded_batch_equals_single_prompts(side):
    model = make_model()
    (long, vision), short = prompt(), text_ids(6, seed=9)
    gap = [0] * (len(long) - len(short))
    row = {"left": gap + short, "right": short + gap, "inside": short[:2] + gap + short[2:]}[side]
    keep = {"left": [0] * len(gap) + [1] * 6, "right": [1] * 6 + [0] * len(gap)}
    keep["inside"] = [1] * 2 + [0] * len(gap) + [1] * 4
    mask = torch.tensor([[1] * len(long), keep[side]])
    with torch.no_grad():
        got = model(torch.tensor([long, row]), attention_mask=mask, **vision)
    assert relative_error(got[0], run(model, long, **vision)[0]) <= TOLERANCE
    assert relative_error(got[1][mask[1] == 1], run(model, short)[0]) <= TOLERANCE
    assert (got[1][mask[1] == 0] == 0).all()


def test_last_logits_only():
    model = make_model()
    ids = torch.tensor([text_ids(5), [0, 0, *text_ids(3, 1)], [0] * 5])
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1], [0] * 5])
    with torch.no_grad():
        full = model(ids, attention_mask=mask)
        last = model(ids, attention_mask=mask, last_logits_only=True)
    assert last.shape == (3, 1, 96)
    assert relative_error(last[:2, 0], full[:2, -1]) <= TOLERANCE
    assert (last[2] == 0).all()


def test_empty_batch_and_empty_prompt():
    model = make_model()
    assert model(torch.empty(0, 4, dtype=torch.long)).shape == (0, 4, 96)
    assert model(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 96)


def test_tied_head_uses_the_embeddings():
    model = make_model(tie_word_embeddings=True)
    assert "lm_head.weight" not in model.state_dict()
    untied = make_model()
    state = model.state_dict()
    untied.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    ids = text_ids(5)
    assert torch.equal(run(model, ids), run(untied, ids))


def test_attention_bias_is_used():
    model = make_model(attention_bias=True)
    name = "model.layers.0.self_attn.o_proj.bias"
    assert name in model.state_dict()
    ids = text_ids(5)
    before = run(model, ids)
    model.state_dict()[name].add_(1)
    assert relative_error(run(model, ids), before) > 0.01


# ---- cache ----


@pytest.mark.parametrize("capacity", [64, 3], ids=["preallocated", "growing"])
@pytest.mark.parametrize("version", ["preview", "1.5"])
def test_cached_steps_equal_one_forward(version, capacity):
    model = make_model(version)
    ids, vision = prompt(version)
    answer = text_ids(5, seed=8)
    want = run(model, ids + answer, **vision)
    cache = model.new_cache(1, capacity)
    parts = [run(model, ids, cache=cache, **vision)]
    parts += [run(model, [token], cache=cache) for token in answer]
    assert relative_error(torch.cat(parts, dim=1), want) <= TOLERANCE
    assert cache.lengths == [len(ids) + 5]
    assert cache.capacity >= len(ids) + 5


def test_prompt_in_several_pieces():
    """Text, then a piece with an image, then text: as a second turn of a conversation comes."""
    model = make_model()
    first, last = text_ids(4), text_ids(6, seed=3)
    middle = vision_ids(IMAGE, IMAGES) + text_ids(1)
    vision = {"pixel_values": patches(IMAGES), "image_grid_thw": IMAGES}
    want = run(model, first + middle + last, **vision)
    cache = model.new_cache(1, 8)
    pieces = [run(model, first, cache=cache), run(model, middle, cache=cache, **vision)]
    pieces.append(run(model, last, cache=cache))
    assert relative_error(torch.cat(pieces, dim=1), want) <= TOLERANCE


def test_cached_batch_of_different_lengths():
    model = make_model()
    (long, vision), short = prompt(), text_ids(4, seed=5)
    answers = [text_ids(3, seed=6), text_ids(3, seed=7)]
    gap = len(long) - len(short)
    ids = torch.tensor([[0] * gap + short, long])
    mask = torch.tensor([[0] * gap + [1] * 4, [1] * len(long)])
    cache = model.new_cache(2, 16)
    with torch.no_grad():
        model(ids, attention_mask=mask, cache=cache, **vision)
        steps = [
            model(torch.tensor([[answers[0][0]], [answers[1][0]]]), cache=cache),
            # The first prompt pauses for a step.
            model(
                torch.tensor([[0], [answers[1][1]]]),
                attention_mask=torch.tensor([[0], [1]]),
                cache=cache,
            ),
            model(torch.tensor([[answers[0][1]], [answers[1][2]]]), cache=cache),
        ]
    got = torch.cat(steps, dim=1)
    want = run(model, short + answers[0])[0, 4:6]
    assert relative_error(got[0, [0, 2]], want) <= TOLERANCE
    assert (got[0, 1] == 0).all()
    assert relative_error(got[1], run(model, long + answers[1], **vision)[0, -3:]) <= TOLERANCE
    assert cache.lengths == [6, len(long) + 3]


def test_cache_refuses_gradients_and_other_batches():
    model = make_model()
    ids = torch.tensor([text_ids(3)])
    with pytest.raises(ValueError, match=r"KVCache: no gradient .* torch\.no_grad\(\)"):
        model(ids, cache=model.new_cache(1, 8))
    with pytest.raises(ValueError, match="KVCache: made for 2 sequences, got a batch of 1"):
        run(model, text_ids(3), cache=model.new_cache(2, 8))
    with pytest.raises(ValueError, match="capacity >= 1, got 1 and 0"):
        KVCache(make_config().text, 1, 0, dtype=torch.float32)


# ---- gradients ----


@pytest.mark.parametrize("version", ["preview", "1.5"])
def test_gradients_match_finite_differences(version):
    """In fp64, along one random direction of each part and of the pixels."""
    model = make_model(version, dtype=torch.float64)
    ids, vision = prompt(version)
    vision = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in vision.items()}
    pixels = vision["pixel_values"].requires_grad_()
    ids = torch.tensor([ids])
    weight = torch.randn(96, dtype=torch.float64)

    def loss():
        return (model(ids, **vision).log_softmax(-1) @ weight).mean()

    loss().backward()
    groups = {"pixels": [pixels]}
    for name, parameter in model.named_parameters():
        groups.setdefault(name.split(".")[0], []).append(parameter)
    assert set(groups) == {"pixels", "visual", "mlp_AR", "model", "lm_head"}
    step = 1e-5
    for name, tensors in groups.items():
        assert all(t.grad is not None for t in tensors), name
        directions = [torch.randn_like(t) * t.detach().std() for t in tensors]
        slope = sum(float((t.grad * d).sum()) for t, d in zip(tensors, directions, strict=True))
        values = []
        with torch.no_grad():
            for sign in (1, -2):
                for t, d in zip(tensors, directions, strict=True):
                    t.add_(d, alpha=sign * step)
                values.append(float(loss()))
            for t, d in zip(tensors, directions, strict=True):
                t.add_(d, alpha=step)
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-5), name


def test_only_the_norms_can_be_trained():
    model = make_model()
    model.requires_grad_(False)
    norm = model.model.layers[0].self_attn.q_norm.weight.requires_grad_()
    model(torch.tensor([text_ids(6)])).square().sum().backward()
    assert norm.grad.abs().max() > 0


# ---- wrong input ----


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (("pixel_values", "image_grid_thw"), "has 8 image tokens, .* image input gives 0 rows"),
        (("pixel_values_videos", "video_grid_thw"), "has 8 video tokens, .* gives 0 rows"),
        (("pixel_values",), "image pixels and image_grid_thw must be given together"),
        (("video_grid_thw",), "video pixels and video_grid_thw must be given together"),
    ],
)
def test_missing_vision_input(drop, message):
    ids, vision = prompt()
    vision = {k: v for k, v in vision.items() if k not in drop}
    with pytest.raises(ValueError, match="KeyeModel: .*" + message):
        run(make_model(), ids, **vision)


def test_token_count_and_row_count_differ():
    ids, vision = prompt()
    vision["pixel_values"], vision["image_grid_thw"] = patches(IMAGES[:1]), IMAGES[:1]
    with pytest.raises(ValueError, match="has 8 image tokens, but the image input gives 6 rows"):
        run(make_model(), ids, **vision)


def test_pixels_that_do_not_fit_the_grid():
    model = make_model()
    with pytest.raises(ValueError, match=r"VisionTower: .* \[32, 3, 14, 14\] .* got \[31, 3, 14,"):
        model.encode_images(patches(IMAGES)[:-1], IMAGES)
    with pytest.raises(ValueError, match=r"must be \[32, 3, 14, 14\] .* got \[32, 588\]"):
        model.encode_images(patches(IMAGES).flatten(1), IMAGES)
    with pytest.raises(RuntimeError, match=r"multiples of 2 to merge, got \(1, 3, 2\)"):
        model.encode_images(patches([(1, 3, 2)]), [(1, 3, 2)])


def test_wrong_shapes():
    model = make_model()
    ids = torch.tensor([text_ids(4)])
    with pytest.raises(ValueError, match=r"must be int32 or int64 \[B, L\], got torch.int64 \[4\]"):
        model(ids[0])
    with pytest.raises(ValueError, match=r"must be int32 or int64 .* got torch.float32 \[1, 4\]"):
        model(ids.float())
    with pytest.raises(ValueError, match="input_ids must be below vocab_size = 96, got 96"):
        model(torch.tensor([[1, 96]]))
    with pytest.raises(ValueError, match="input_ids must be below vocab_size = 96, got -1"):
        model(torch.tensor([[1, -1]]))
    with pytest.raises(ValueError, match=r"shape of input_ids \[1, 4\], got \[1, 3\]"):
        model(ids, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"position_ids must be \[3, 1, 4\], got \[3, 4\]"):
        model(ids, position_ids=torch.zeros(3, 4))
