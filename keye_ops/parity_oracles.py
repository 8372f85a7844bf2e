"""The package against code of other authors: one fp32 error a comparison.

Sizes are small; the heads of the ops and of the tower are those of Keye-VL.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import keye_ops
from keye_ops import model, processing
from keye_ops.model import KeyeConfig, KeyeModel, TextConfig, VisionConfig
from keye_ops.model.cache import SequenceLayout
from keye_ops.parity import Comparison, relative_error, transformers_module

Grids = Sequence[tuple[int, int, int]]

IMAGES: Grids = [(1, 4, 6), (1, 2, 2), (1, 10, 8)]
CLIPS: Grids = [(2, 4, 4), (1, 6, 2), (3, 2, 4)]
BOTH: Grids = [*IMAGES, *CLIPS]
VISION = VisionConfig(
    hidden_size=144,
    intermediate_size=96,
    num_hidden_layers=2,
    num_heads=2,  # of 72 channels
    image_size=112,
    segment="frame",
)
TEXT = TextConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    mrope_section=(4, 6, 6),
)
IMAGE_TOKEN, VIDEO_TOKEN, START_TOKEN, END_TOKEN = 90, 91, 92, 93  # text tokens are below


# ---- what the comparisons share ----


def small_config(version: str = "1.5") -> KeyeConfig:
    """A Keye-VL of the sizes above."""
    return KeyeConfig(
        version=version,
        vision=replace(VISION, segment="clip" if version == "preview" else "frame"),
        text=TEXT,
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=START_TOKEN,
        vision_end_token_id=END_TOKEN,
        eos_token_ids=(),
    )


def small_model() -> KeyeModel:
    """A Keye-VL-1.5 of those sizes with random weights."""
    return _randomise(KeyeModel(small_config()).eval())


def qwen3_twin(keye: KeyeModel) -> nn.Module:
    """A Qwen3ForCausalLM with the text weights of a Keye-VL; the names are the same."""
    twin = transformers_module("qwen3.modeling_qwen3").Qwen3ForCausalLM(_qwen3_config()).eval()
    state = keye.state_dict()
    twin.load_state_dict({k: v for k, v in state.items() if k.startswith(("model.", "lm_head."))})
    return twin


def text_ids(*shape: int) -> torch.Tensor:
    """Random tokens of text."""
    return torch.randint(0, IMAGE_TOKEN, shape)


def _randomise(module: nn.Module) -> nn.Module:
    """Random weights; those of norms differ from one, so that a missing one is seen."""
    model.init_random(module)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def _paddleocr_config(num_hidden_layers: int = 2) -> Any:
    names = ("hidden_size", "intermediate_size", "image_size")
    module = transformers_module("paddleocr_vl.configuration_paddleocr_vl")
    vision = module.PaddleOCRVisionConfig(
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=VISION.num_heads,
        **{name: getattr(VISION, name) for name in names},
    )
    text = {"hidden_size": TEXT.hidden_size}
    return module.PaddleOCRVLConfig(vision_config=vision.to_dict(), text_config=text)


def _qwen3_config() -> Any:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    config = transformers_module("qwen3.configuration_qwen3").Qwen3Config(
        num_attention_heads=TEXT.num_heads,
        num_key_value_heads=TEXT.num_kv_heads,
        rms_norm_eps=TEXT.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": TEXT.rope_theta},
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=None,
        **{name: getattr(TEXT, name) for name in names},
    )
    config._attn_implementation = "sdpa"
    return config


def _qwen2_vl_rotary(head_dim: int, section: Sequence[int]) -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(section)}
    # The configuration has no head_dim, so the size comes from hidden_size / heads.
    config = transformers_module("qwen2_vl.configuration_qwen2_vl").Qwen2VLTextConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, rope_parameters=rope
    )
    return transformers_module("qwen2_vl.modeling_qwen2_vl").Qwen2VLRotaryEmbedding(config)


# ---- vision ----


def patch_embed_error() -> float:
    """Patch embedding with interpolated positions, against PaddleOCR-VL's."""
    module = transformers_module("paddleocr_vl.modeling_paddleocr_vl")
    oracle = module.PaddleOCRVisionEmbeddings(_paddleocr_config().vision_config)
    conv, table = oracle.patch_embedding, oracle.position_embedding.weight
    grid = keye_ops.PackedGrid.from_grid_thw(BOTH)
    pixel_values = torch.randn(grid.total, 3, 14, 14)
    got = keye_ops.patch_embed(pixel_values, conv.weight, conv.bias, table, grid)
    return relative_error(got, oracle(pixel_values[None], grid_thw=torch.tensor(BOTH)))


def patch_embed_convolution_error() -> float:
    """The same against a convolution of whole images and an interpolated table."""
    weight, bias = torch.randn(144, 3, 14, 14) / 24, torch.randn(144)
    table = torch.randn(27 * 27, 144)
    patches, wanted = [], []
    for t, h, w in BOTH:
        frames = torch.randn(t, 3, 14 * h, 14 * w)
        rows = F.unfold(frames, 14, stride=14).transpose(1, 2)  # [t, h * w, 588]
        patches.append(rows.reshape(-1, 3, 14, 14))
        positions = F.interpolate(table.T.view(1, -1, 27, 27), size=(h, w), mode="bilinear")
        embedded = F.conv2d(frames, weight, bias, stride=14) + positions
        wanted.append(embedded.flatten(2).transpose(1, 2).flatten(0, 1))
    got = keye_ops.patch_embed(torch.cat(patches), weight, bias, table, BOTH)
    return relative_error(got, torch.cat(wanted))


def rope_2d_error() -> float:
    """Axial rotation against PaddleOCR-VL's, angles included."""
    module = transformers_module("paddleocr_vl.modeling_paddleocr_vl")
    q, k = torch.randn(2, 50, 16, 72).unbind()
    position_ids = torch.randint(0, 300, (50, 2))
    rotary = module.PaddleOCRVisionRotaryEmbedding(_paddleocr_config().vision_config)
    want = module.apply_rotary_pos_emb_vision(q, k, *rotary(q, position_ids))
    return relative_error(keye_ops.rope_2d(q, k, position_ids), want)


def vision_tower_error(grids: Grids, segment: str, num_hidden_layers: int = 2) -> float:
    """The tower against PaddleOCR-VL's, which attends per frame unless told the segments."""
    config = replace(VISION, segment=segment, num_hidden_layers=num_hidden_layers)
    tower = _randomise(model.VisionTower(config))
    module = transformers_module("paddleocr_vl.modeling_paddleocr_vl")
    oracle = module.PaddleOCRVisionModel(_paddleocr_config(num_hidden_layers).vision_config).eval()
    oracle.load_state_dict(tower.state_dict())  # strict: the names are the checkpoint's
    grid = tower.pack(grids)
    pixel_values = torch.randn(grid.total, 3, 14, 14)
    joint = {"cu_seqlens": grid.cu_seqlens} if segment == "clip" else {}
    want = oracle(pixel_values[None], grid_thw=torch.tensor(grids), **joint).last_hidden_state
    return relative_error(tower(pixel_values, grid), want.view(grid.total, -1))


def projector_preview_error() -> float:
    """The projector of Keye-VL-8B-Preview against PaddleOCR-VL's."""
    module = transformers_module("paddleocr_vl.modeling_paddleocr_vl")
    projector = _randomise(model.Projector(small_config("preview")))
    oracle = module.PaddleOCRProjector(_paddleocr_config())
    oracle.load_state_dict(projector.state_dict())
    grid = keye_ops.PackedGrid.from_grid_thw(BOTH)
    x = torch.randn(grid.total, VISION.hidden_size)
    return relative_error(projector(x, grid), oracle(x, torch.tensor(BOTH)))


def projector_1_5_error() -> float:
    """The projector of Keye-VL-1.5 against Qwen3-VL's, which takes tokens in 2x2 block order."""
    config = transformers_module("qwen3_vl.configuration_qwen3_vl").Qwen3VLVisionConfig(
        hidden_size=VISION.hidden_size, out_hidden_size=TEXT.hidden_size
    )
    module = transformers_module("qwen3_vl.modeling_qwen3_vl")
    oracle = module.Qwen3VLVisionPatchMerger(config, use_postshuffle_norm=True)
    oracle.norm.eps = 1e-5
    projector = _randomise(model.Projector(small_config("1.5")))
    oracle.norm.load_state_dict(projector.pre_norm.state_dict())
    oracle.linear_fc1.load_state_dict(projector.linear_1.state_dict())
    oracle.linear_fc2.load_state_dict(projector.linear_2.state_dict())
    rows, blocks = [], []
    for t, h, w in BOTH:
        x = torch.randn(t, h // 2, 2, w // 2, 2, VISION.hidden_size)
        rows.append(x.reshape(-1, VISION.hidden_size))
        blocks.append(x.transpose(2, 3).reshape(-1, VISION.hidden_size))
    got = projector(torch.cat(rows), keye_ops.PackedGrid.from_grid_thw(BOTH))
    return relative_error(got, oracle(torch.cat(blocks)))


# ---- attention and text ----


def attention_error(causal: bool) -> float:
    """Packed attention against one attention with a block-diagonal mask.

    Full: vision heads. Causal: grouped text heads, and more keys than queries in a segment.
    """
    heads, kv_heads, head_dim = (8, 2, 128) if causal else (4, 4, 72)
    offsets_q = [0, 24, 25, 25, 67]
    offsets_k = [0, 30, 31, 36, 80] if causal else offsets_q
    q = torch.randn(67, heads, head_dim)
    k, v = torch.randn(2, offsets_k[-1], kv_heads, head_dim).unbind()
    mask = torch.zeros(67, offsets_k[-1], dtype=torch.bool)
    for (q0, q1), (k0, k1) in zip(pairwise(offsets_q), pairwise(offsets_k), strict=True):
        block = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        mask[q0:q1, k0:k1] = block.tril((k1 - k0) - (q1 - q0)) if causal else block
    heads_first = [x.repeat_interleave(heads // x.shape[1], 1).transpose(0, 1) for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(0, 1)
    cu_seqlens = [torch.tensor(x, dtype=torch.int32) for x in (offsets_q, offsets_k)]
    return relative_error(keye_ops.varlen_attention(q, k, v, *cu_seqlens, causal=causal), want)


def rope_3d_error(interleaved: bool, norm: bool) -> float:
    """Multimodal rotation against Qwen2-VL's, or Qwen3-VL's interleaved; Qwen3's norm before it."""
    section = (24, 20, 20) if interleaved else (16, 24, 24)
    if interleaved:
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_interleaved": True}
        config = transformers_module("qwen3_vl.configuration_qwen3_vl").Qwen3VLTextConfig(
            head_dim=128, rope_parameters=rope | {"mrope_section": list(section)}
        )
        module = transformers_module("qwen3_vl.modeling_qwen3_vl")
        rotary = module.Qwen3VLTextRotaryEmbedding(config)
    else:
        module = transformers_module("qwen2_vl.modeling_qwen2_vl")
        rotary = _qwen2_vl_rotary(128, section)
    q, k = torch.randn(40, 32, 128), torch.randn(40, 8, 128)
    position_ids = torch.randint(0, 5000, (3, 40))
    weights, wanted = {}, [q, k]
    if norm:
        norm_class = transformers_module("qwen3.modeling_qwen3").Qwen3RMSNorm
        norms = [_randomise(norm_class(128, eps=1e-6)) for _ in range(2)]
        weights = {f"{n}_norm_weight": m.weight for n, m in zip("qk", norms, strict=True)}
        wanted = [one(x) for one, x in zip(norms, wanted, strict=True)]
    cos, sin = rotary(q, position_ids[:, None])
    wanted = module.apply_rotary_pos_emb(*(x.transpose(0, 1)[None] for x in wanted), cos, sin)
    got = keye_ops.rope_3d(
        q, k, position_ids, mrope_section=section, mrope_interleaved=interleaved, **weights
    )
    return relative_error(got, [x[0].transpose(0, 1) for x in wanted])


def text_attention_error() -> float:
    """A text attention layer against Qwen3's, with equal positions on the three axes."""
    module = transformers_module("qwen3.modeling_qwen3")
    attention = small_model().model.layers[0].self_attn
    config = _qwen3_config()
    oracle = module.Qwen3Attention(config, layer_idx=0).eval()
    oracle.load_state_dict(attention.state_dict())
    x, position_ids = torch.randn(1, 9, TEXT.hidden_size), torch.arange(9)[None]
    angles = module.Qwen3RotaryEmbedding(config)(x, position_ids)
    want, _ = oracle(x, position_embeddings=angles, attention_mask=None)
    layout = SequenceLayout.from_lengths([9], x.device)
    return relative_error(attention(x[0], position_ids.expand(3, -1), layout, None), want[0])


def text_model_error(mrope: bool) -> float:
    """Logits of two prompts against Qwen3's; its angles come from Qwen2-VL for (t, h, w)."""
    keye, ids = small_model(), text_ids(2, 17)
    twin, position_ids = qwen3_twin(keye), None
    if mrope:
        position_ids = torch.randint(0, 50, (3, 2, 17))
        rotary = _qwen2_vl_rotary(TEXT.head_dim, TEXT.mrope_section)
        twin.model.rotary_emb.forward = lambda x, _: rotary(x, position_ids)
    return relative_error(keye(ids, position_ids=position_ids), twin(ids).logits)


# ---- processing and positions ----


def image_processor_error(version: str) -> float:
    """Patches of images against PaddleOCR-VL's processor; 1092 x 1932 is beyond its limit."""
    name = "paddleocr_vl.image_processing_pil_paddleocr_vl"
    config = processing.ProcessingConfig(version=version)
    settings = {n: getattr(config, n) for n in ("min_pixels", "max_pixels", "resample")}
    oracle = transformers_module(name).PaddleOCRVLImageProcessorPil(
        image_mean=[0.5] * 3, image_std=[0.5] * 3, **settings
    )
    got, want = [], []
    for height, width in ((56, 84), (1092, 1932)):  # sizes that reading an image leaves alone
        image = torch.randint(0, 256, (height, width, 3)).to(torch.uint8).numpy()
        ours = processing.process_image(image, config)
        theirs = oracle(image, input_data_format="channels_last", return_tensors="pt")
        got += [ours.pixel_values, torch.tensor([ours.grid_thw])]
        want += [theirs["pixel_values"], theirs["image_grid_thw"]]
    return relative_error(got, want)


def rope_index_error(version: str) -> float:
    """Positions of a prompt against PaddleOCR-VL's: images; for Preview also a clip.

    The rules agree while a clip has no more frames than merged rows or columns.
    """
    module = transformers_module("paddleocr_vl.modeling_paddleocr_vl")
    oracle = module.PaddleOCRVLModel.__new__(module.PaddleOCRVLModel)
    nn.Module.__init__(oracle)  # no weights: the method needs the merge size alone
    oracle.config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    images, videos = [(1, 4, 6), (1, 8, 2)], [(3, 4, 6)] if version == "preview" else []
    grids = {"image_grid_thw": torch.tensor(images)}
    grids |= {"video_grid_thw": torch.tensor(videos)} if videos else {}
    ids = text_ids(3).tolist()
    for token, grid in [(IMAGE_TOKEN, g) for g in images] + [(VIDEO_TOKEN, g) for g in videos]:
        ids += [START_TOKEN, *[token] * (math.prod(grid) // 4), END_TOKEN, *text_ids(5).tolist()]
    input_ids = torch.tensor([ids])
    kinds = (input_ids == IMAGE_TOKEN).int() + 2 * (input_ids == VIDEO_TOKEN).int()
    want = oracle.get_rope_index(input_ids, mm_token_type_ids=kinds, **grids)
    # Half a second a frame at two positions a second: one position a frame, as there.
    seconds = {"second_per_grid_ts": [0.5]} if videos else {}
    got = model.get_rope_index(input_ids, small_config(version), **grids, **seconds)
    return relative_error(got, want)


# op, oracle, tolerance, error, its arguments
_ROWS = (
    ("patch_embed", "PaddleOCRVisionEmbeddings", 5e-6, patch_embed_error),
    ("patch_embed", "conv2d + interpolate", 5e-6, patch_embed_convolution_error),
    ("rope_2d", "PaddleOCRVisionRotaryEmbedding", 1e-6, rope_2d_error),
    ("rope_3d, chunked", "Qwen2VLRotaryEmbedding", 1e-6, rope_3d_error, False, False),
    ("rope_3d, interleaved", "Qwen3VLTextRotaryEmbedding", 1e-6, rope_3d_error, True, False),
    ("rope_3d, norm", "Qwen3RMSNorm + Qwen2VLRotaryEmbedding", 1e-6, rope_3d_error, False, True),
    ("varlen_attention", "scaled_dot_product_attention", 2e-6, attention_error, False),
    ("varlen_attention, causal", "scaled_dot_product_attention", 2e-6, attention_error, True),
    ("projector, Preview", "PaddleOCRProjector", 2e-6, projector_preview_error),
    ("projector, 1.5", "Qwen3VLVisionPatchMerger", 2e-6, projector_1_5_error),
    ("tower, images", "PaddleOCRVisionModel", 5e-6, vision_tower_error, IMAGES, "frame"),
    ("tower, clips by frame", "PaddleOCRVisionModel", 5e-6, vision_tower_error, CLIPS, "frame"),
    ("tower, joint clips", "PaddleOCRVisionModel", 5e-6, vision_tower_error, CLIPS, "clip"),
    ("text attention", "Qwen3Attention", 5e-6, text_attention_error),
    ("text logits", "Qwen3ForCausalLM", 5e-6, text_model_error, False),
    ("text logits, mrope", "Qwen3 + Qwen2VLRotaryEmbedding", 5e-6, text_model_error, True),
    ("patches, Preview", "PaddleOCRVLImageProcessorPil", 0.0, image_processor_error, "preview"),
    ("patches, 1.5", "PaddleOCRVLImageProcessorPil", 0.0, image_processor_error, "1.5"),
    ("rope index, Preview", "PaddleOCRVLModel.get_rope_index", 0.0, rope_index_error, "preview"),
    ("rope index, 1.5", "PaddleOCRVLModel.get_rope_index", 0.0, rope_index_error, "1.5"),
)
COMPARISONS = tuple(Comparison(*row[:4], arguments=row[4:]) for row in _ROWS)
