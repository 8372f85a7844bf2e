"""The model against implementations nobody here wrote (transformers), in fp32.

Each `*_error` function gives one relative error, so that other tools can print them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from model_helpers import (
    IMAGE,
    TEXT,
    VISION,
    make_config,
    make_model,
    patches,
    randomise,
    relative_error,
    text_ids,
    vision_ids,
)

from keye_ops import PackedGrid
from keye_ops.model import Projector, VisionTower, generate, get_rope_index
from keye_ops.model.cache import SequenceLayout

pytest.importorskip("transformers")

TOLERANCE = 1e-5
IMAGES = [(1, 4, 6), (1, 2, 2), (1, 10, 8)]
CLIPS = [(2, 4, 4), (1, 6, 2), (3, 2, 4)]


def paddleocr_config():
    from transformers.models.paddleocr_vl.configuration_paddleocr_vl import (
        PaddleOCRVisionConfig,
        PaddleOCRVLConfig,
    )

    vision = PaddleOCRVisionConfig(
        hidden_size=VISION.hidden_size,
        intermediate_size=VISION.intermediate_size,
        num_hidden_layers=VISION.num_hidden_layers,
        num_attention_heads=VISION.num_heads,
        image_size=VISION.image_size,
    )
    text = {"hidden_size": TEXT.hidden_size, "num_attention_heads": 4, "num_key_value_heads": 2}
    return PaddleOCRVLConfig(vision_config=vision.to_dict(), text_config=text)


def qwen3_config(**changes):
    from transformers import Qwen3Config

    fields = {
        "vocab_size": TEXT.vocab_size,
        "hidden_size": TEXT.hidden_size,
        "intermediate_size": TEXT.intermediate_size,
        "num_hidden_layers": TEXT.num_hidden_layers,
        "num_attention_heads": TEXT.num_heads,
        "num_key_value_heads": TEXT.num_kv_heads,
        "head_dim": TEXT.head_dim,
        "rms_norm_eps": TEXT.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": TEXT.rope_theta},
        "tie_word_embeddings": False,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return Qwen3Config(**(fields | changes))


def qwen3_twin(model):
    """Qwen3ForCausalLM with the text weights of a KeyeModel; loading is strict."""
    from transformers import Qwen3ForCausalLM

    twin = Qwen3ForCausalLM(qwen3_config()).eval()
    state = {k: v for k, v in model.state_dict().items() if k.startswith(("model.", "lm_head."))}
    twin.load_state_dict(state)
    return twin


@torch.no_grad()
def vision_tower_error(grids, segment, num_hidden_layers=2):
    """VisionTower against PaddleOCRVisionModel: frame segments, or clips by explicit cu_seqlens."""
    from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRVisionModel

    config = replace(VISION, segment=segment, num_hidden_layers=num_hidden_layers)
    tower = randomise(VisionTower(config))
    hf_config = paddleocr_config().vision_config
    hf_config.num_hidden_layers = num_hidden_layers
    oracle = PaddleOCRVisionModel(hf_config).eval()
    oracle.load_state_dict(tower.state_dict())  # strict: the names are the checkpoint's
    pixels = patches(grids)
    grid = tower.pack(grids)
    extra = {"cu_seqlens": grid.cu_seqlens} if segment == "clip" else {}
    want = oracle(pixels[None], grid_thw=torch.tensor(grids), **extra).last_hidden_state
    return relative_error(tower(pixels, grid), want.view(grid.total, -1))


@torch.no_grad()
def projector_preview_error(grids):
    """Projector (Preview) against PaddleOCRProjector."""
    from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRProjector

    projector = randomise(Projector(make_config("preview")))
    oracle = PaddleOCRProjector(paddleocr_config())
    oracle.load_state_dict(projector.state_dict())
    x = torch.randn(sum(t * h * w for t, h, w in grids), VISION.hidden_size)
    got = projector(x, PackedGrid.from_grid_thw(grids))
    return relative_error(got, oracle(x, torch.tensor(grids)))


@torch.no_grad()
def projector_1_5_error(grids):
    """Projector (1.5) against Qwen3-VL's merger, which takes its tokens in 2x2 block order."""
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

    projector = randomise(Projector(make_config("1.5")))
    oracle = Qwen3VLVisionPatchMerger(
        Qwen3VLVisionConfig(hidden_size=VISION.hidden_size, out_hidden_size=TEXT.hidden_size),
        use_postshuffle_norm=True,
    )
    oracle.norm.eps = 1e-5
    names = {"pre_norm": "norm", "linear_1": "linear_fc1", "linear_2": "linear_fc2"}
    state = {
        f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in projector.state_dict().items()
    }
    oracle.load_state_dict(state)
    blocks, rows = [], []
    for t, h, w in grids:
        x = torch.randn(t, h // 2, 2, w // 2, 2, VISION.hidden_size)
        rows.append(x.reshape(-1, VISION.hidden_size))
        blocks.append(x.transpose(2, 3).reshape(-1, VISION.hidden_size))
    got = projector(torch.cat(rows), PackedGrid.from_grid_thw(grids))
    return relative_error(got, oracle(torch.cat(blocks)))


@torch.no_grad()
def text_attention_error(length=9):
    """TextAttention against Qwen3Attention, equal positions on the three axes."""
    from transformers.models.qwen3 import modeling_qwen3

    attention = randomise(make_model().model.layers[0].self_attn, seed=3)
    config = qwen3_config()
    config._attn_implementation = "sdpa"
    oracle = modeling_qwen3.Qwen3Attention(config, layer_idx=0).eval()
    oracle.load_state_dict(attention.state_dict())
    x = torch.randn(1, length, TEXT.hidden_size)
    position_ids = torch.arange(length)[None]
    angles = modeling_qwen3.Qwen3RotaryEmbedding(config)(x, position_ids)
    want, _ = oracle(x, position_embeddings=angles, attention_mask=None)
    layout = SequenceLayout.from_lengths([length], x.device)
    got = attention(x[0], position_ids.expand(3, -1), layout, None)
    return relative_error(got, want[0])


@torch.no_grad()
def text_model_error(length=17):
    """Logits of the text model against Qwen3ForCausalLM."""
    model = make_model()
    ids = torch.tensor([text_ids(length), text_ids(length, seed=1)])
    return relative_error(model(ids), qwen3_twin(model)(ids).logits)


@torch.no_grad()
def text_mrope_error(length=17):
    """The same with different t, h, w positions: Qwen3 whose angles come from Qwen2-VL's rotary."""
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

    model = make_model()
    twin = qwen3_twin(model)
    rope = {"rope_type": "default", "rope_theta": TEXT.rope_theta}
    rope["mrope_section"] = list(TEXT.mrope_section)
    # Its config has no head_dim field, so the size comes from hidden_size / heads.
    rotary_config = Qwen2VLTextConfig(
        hidden_size=TEXT.head_dim * TEXT.num_heads,
        num_attention_heads=TEXT.num_heads,
        rope_parameters=rope,
    )
    positions = torch.stack([torch.randint(0, 50, (2, length)) for _ in range(3)])
    rotary = Qwen2VLRotaryEmbedding(rotary_config)
    twin.model.rotary_emb.forward = lambda x, position_ids: rotary(x, positions)
    ids = torch.tensor([text_ids(length), text_ids(length, seed=1)])
    return relative_error(model(ids, position_ids=positions), twin(ids).logits)


@pytest.mark.parametrize("grids", [IMAGES, CLIPS, [(1, 2, 2)]], ids=["images", "clips", "smallest"])
def test_vision_tower_with_frame_segments(grids):
    assert vision_tower_error(grids, "frame") <= TOLERANCE


@pytest.mark.parametrize("grids", [IMAGES, CLIPS], ids=["images", "clips"])
def test_vision_tower_with_clip_segments(grids):
    assert vision_tower_error(grids, "clip") <= TOLERANCE


def test_vision_tower_of_six_layers():
    assert vision_tower_error(CLIPS, "frame", num_hidden_layers=6) <= TOLERANCE


@pytest.mark.parametrize("grids", [IMAGES, CLIPS], ids=["images", "clips"])
def test_projector_preview(grids):
    assert projector_preview_error(grids) <= TOLERANCE


@pytest.mark.parametrize("grids", [IMAGES, CLIPS], ids=["images", "clips"])
def test_projector_1_5(grids):
    assert projector_1_5_error(grids) <= TOLERANCE


def test_text_attention():
    assert text_attention_error() <= TOLERANCE


def test_text_model_logits():
    assert text_model_error() <= TOLERANCE


def test_text_model_with_distinct_positions():
    assert text_mrope_error() <= TOLERANCE


def test_greedy_generation_equals_transformers():
    model = make_model()
    ids = torch.tensor([text_ids(7)])
    want = qwen3_twin(model).generate(ids, max_new_tokens=20, do_sample=False)[0, 7:].tolist()
    got = generate(model, {"input_ids": ids}, max_new_tokens=20, stop_token_ids=[])
    assert got == [want]
    assert len(set(want)) > 5  # not one token repeated


def test_image_positions_equal_paddleocr():
    from types import SimpleNamespace

    from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRVLModel

    grids = [(1, 4, 6), (1, 8, 2)]
    ids = torch.tensor([text_ids(3) + vision_ids(IMAGE, grids) + text_ids(7)])
    oracle = PaddleOCRVLModel.__new__(PaddleOCRVLModel)  # the method needs the merge size alone
    torch.nn.Module.__init__(oracle)
    oracle.config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    want, want_delta = oracle.get_rope_index(
        ids, mm_token_type_ids=(ids == IMAGE).int(), image_grid_thw=torch.tensor(grids)
    )
    for version in ("preview", "1.5"):
        got, delta = get_rope_index(ids, make_config(version), image_grid_thw=grids)
        assert torch.equal(got, want)
        assert torch.equal(delta, want_delta)
