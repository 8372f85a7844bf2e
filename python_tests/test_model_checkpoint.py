"""Checkpoint files: what is written is what is loaded, and every defect is named."""

import json
import shutil
import sys

import pytest
import torch
from model_helpers import make_model, patches, relative_error

from keye_ops.model import (
    CheckpointError,
    KeyeConfig,
    KeyeModel,
    init_random,
    load_checkpoint,
    load_vision_tower,
    make_tiny_checkpoint,
)

safetensors_torch = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="session", params=["preview", "1.5"])
def tiny(request, tmp_path_factory):
    return make_tiny_checkpoint(
        tmp_path_factory.mktemp("tiny") / request.param, version=request.param
    )


@pytest.fixture
def broken(tiny, tmp_path):
    """A copy of the tiny checkpoint to damage."""
    return shutil.copytree(tiny, tmp_path / "broken")


def stored_tensors(folder):
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors_torch.load_file(shard)
    return tensors


def rewrite(folder, change):
    """Apply `change` to the tensors of every shard, keeping the index up to date."""
    weight_map = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = safetensors_torch.load_file(shard)
        change(tensors)
        safetensors_torch.save_file(tensors, shard)
        weight_map |= dict.fromkeys(tensors, shard.name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_tiny_files(tiny):
    assert sum(file.stat().st_size for file in tiny.iterdir()) < 5e6
    shards = list(tiny.glob("model-0000?-of-00002.safetensors"))
    assert len(shards) == 2
    assert min(s.stat().st_size for s in shards) > 0.3 * max(s.stat().st_size for s in shards)
    weight_map = json.loads((tiny / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == stored_tensors(tiny).keys()


def test_tiny_tokenizer(tiny):
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    config = KeyeConfig.from_pretrained(tiny)
    text = "Où est le chat ? 猫🐈\n"
    ids = tokenizer.encode(f"<|im_start|>{text}<|image_pad|><|video_pad|><|im_end|>").ids
    assert ids[-3:-1] == [config.image_token_id, config.video_token_id]
    assert ids[-1] == config.eos_token_ids[0]
    assert tokenizer.decode(ids[1:-3]) == text
    assert max(tokenizer.get_vocab().values()) < config.text.vocab_size
    has_frames = tokenizer.token_to_id("<|frame|>") is not None
    assert has_frames == (config.version == "1.5")


def test_tiny_chat_template(tiny):
    jinja2 = pytest.importorskip("jinja2")
    source = json.loads((tiny / "tokenizer_config.json").read_text())["chat_template"]
    parts = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "Why?"}]
    messages = [{"role": "system", "content": "Hi"}, {"role": "user", "content": parts}]
    got = jinja2.Template(source).render(messages=messages, add_generation_prompt=True)
    assert got == (
        "<|im_start|>system\nHi<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|video_pad|><|vision_end|>"
        "Why?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tiny_is_reproducible(tiny, tmp_path):
    version = KeyeConfig.from_pretrained(tiny).version
    again = stored_tensors(make_tiny_checkpoint(tmp_path / "again", version=version))
    other = stored_tensors(make_tiny_checkpoint(tmp_path / "other", version=version, seed=1))
    name = "model.embed_tokens.weight"
    assert all(torch.equal(tensor, again[k]) for k, tensor in stored_tensors(tiny).items())
    assert not torch.equal(again[name], other[name])


def test_round_trip(tiny):
    model = load_checkpoint(tiny, progress=False)
    stored = stored_tensors(tiny)
    loaded = model.state_dict()
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(loaded[name], stored[name]) for name in loaded)
    ignored = {name.removeprefix("visual.vision_model.") for name in stored.keys() - loaded}
    assert ignored == {
        "head.probe",
        "head.layernorm.weight",
        "embeddings.packing_position_embedding.weight",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtype_is_cast(tiny, dtype):
    model = load_checkpoint(tiny, dtype=dtype, progress=False)
    assert {p.dtype for p in model.parameters()} == {dtype}
    stored = stored_tensors(tiny)["lm_head.weight"]
    assert torch.equal(model.lm_head.weight, stored.to(dtype))


def test_dtype_of_the_files_where_the_config_is_silent(broken):
    edit_config(broken, torch_dtype=None)
    rewrite(broken, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    assert load_checkpoint(broken, progress=False).dtype == torch.float16


@pytest.mark.parametrize("name", ["auto", "bf16", "int8"])
def test_an_unknown_dtype_in_the_config(broken, name):
    edit_config(broken, torch_dtype=name)
    message = (
        "load_checkpoint: torch_dtype in config.json must be one of bfloat16, float16, float32, "
        f"float64, got '{name}'"
    )
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(broken, progress=False)
    assert load_checkpoint(broken, dtype=torch.float32, progress=False).dtype == torch.float32


def test_single_file_with_rotary_frequencies(tiny, tmp_path):
    shutil.copy(tiny / "config.json", tmp_path)
    tensors = stored_tensors(tiny)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(64)
    tensors["visual.vision_model.encoder.rotary_pos_emb.inv_freq"] = torch.ones(18)
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    want = load_checkpoint(tiny, progress=False).state_dict()
    got = load_checkpoint(tmp_path, progress=False).state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_tied_head_needs_no_tensor(broken):
    edit_config(broken, tie_word_embeddings=True)
    with_copy = load_checkpoint(broken, progress=False)
    rewrite(broken, lambda tensors: tensors.pop("lm_head.weight", None))
    without = load_checkpoint(broken, progress=False)
    ids = torch.tensor([[1, 2, 3]])
    assert without.lm_head is None
    assert torch.equal(with_copy(ids), without(ids))


def test_progress_bar(tiny, capfd):
    load_checkpoint(tiny)
    assert "weights: 100%" in capfd.readouterr().err
    load_checkpoint(tiny, progress=False)
    assert capfd.readouterr().err == ""


def test_vision_tower_alone(tiny):
    tower = load_vision_tower(tiny, dtype=torch.float32, progress=False)
    model = load_checkpoint(tiny, dtype=torch.float32, progress=False)
    grids = [(2, 4, 4)]
    pixels, grid = patches(grids), tower.pack(grids)
    assert tower.segment == model.visual.segment
    assert torch.equal(tower(pixels, grid), model.visual(pixels, grid))


def test_vision_tower_of_a_paddleocr_folder(tiny, tmp_path):
    vision = json.loads((tiny / "config.json").read_text())["vision_config"]
    fields = {"architectures": ["PaddleOCRVLForConditionalGeneration"], "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    tensors = {k: v for k, v in stored_tensors(tiny).items() if k.startswith("visual.")}
    tensors["model.embed_tokens.weight"] = torch.ones(2, 2)  # another text model
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    tower = load_vision_tower(tmp_path, progress=False)
    assert tower.segment == "frame"
    assert tower.dtype == torch.bfloat16
    name = "vision_model.encoder.layers.1.self_attn.k_proj.weight"
    assert torch.equal(tower.state_dict()[name], tensors["visual." + name])


def test_vision_tower_needs_only_its_shards(broken):
    weight_map = json.loads((broken / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in weight_map.items() if name.startswith("visual.")}
    for file in set(weight_map.values()) - needed:
        (broken / file).unlink()
    assert len(list(broken.glob("*.safetensors"))) == 1
    load_vision_tower(broken, progress=False)


def test_every_wrong_key_is_listed(broken):
    def damage(tensors):
        tensors.pop("model.norm.weight", None)
        tensors.pop("visual.vision_model.encoder.layers.0.self_attn.q_proj.bias", None)
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"] = torch.ones(3, 128)
            tensors["model.layers.7.mlp.up_proj.weight"] = torch.ones(2)

    rewrite(broken, damage)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(broken, progress=False)
    assert str(error.value).splitlines() == [
        "load_checkpoint: the keys do not fit config.json: 2 missing, 1 unexpected, 1 misshapen",
        "  missing: model.norm.weight [128]",
        "  missing: visual.vision_model.encoder.layers.0.self_attn.q_proj.bias [144]",
        "  unexpected: model.layers.7.mlp.up_proj.weight [2]",
        "  misshapen: lm_head.weight must be [320, 128], got [3, 128]",
    ]


def test_version_is_confirmed_by_the_projector(broken):
    names = {
        "preview": ("KeyeVL1_5ForConditionalGeneration", "KeyeVL1_5"),
        "1.5": ("KeyeForConditionalGeneration", "Keye"),
    }
    architecture, model_type = names[KeyeConfig.from_pretrained(broken).version]
    edit_config(broken, architectures=[architecture], model_type=model_type)
    with pytest.raises(CheckpointError, match=r"says version .* needs mlp_AR\.pre_norm\.weight"):
        load_checkpoint(broken, progress=False)


def test_missing_files(tmp_path, broken):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_checkpoint(tmp_path / "nowhere")
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"shard {shard.name} named by .* is missing"):
        load_checkpoint(broken)
    (broken / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold model\.safetensors or .* got neither"):
        load_checkpoint(broken)


@pytest.mark.parametrize("size", [0, 5, 300, -100])
def test_truncated_shard(broken, size):
    shard = sorted(broken.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=f"{shard.name} is not a whole safetensors file"):
        load_checkpoint(broken, progress=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": {', r"index\.json is not valid JSON"),
        ("[]", r"index\.json must hold a JSON object, got list"),
        ('{"weight_map": 3}', r"index\.json must hold an object weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', r"got '\.\./x\.safetensors'"),
    ],
)
def test_broken_index(broken, text, message):
    (broken / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(broken, progress=False)


def test_optional_packages_are_named(tiny, tmp_path, monkeypatch):
    message = r'pip install "keye-ops\[model\]"'
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="needs tqdm: " + message):
        load_checkpoint(tiny)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="needs safetensors: " + message):
        load_checkpoint(tiny)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="needs tokenizers: " + message):
        make_tiny_checkpoint(tmp_path)


def test_tiny_version_is_checked(tmp_path):
    with pytest.raises(ValueError, match=r"version must be 'preview' or '1\.5', got '2\.0'"):
        make_tiny_checkpoint(tmp_path, version="2.0")


def test_state_dict_shows_the_fused_projection_as_views():
    model = make_model()
    attention = model.visual.vision_model.encoder.layers[0].self_attn
    state = attention.state_dict()
    assert set(state) == {
        f"{n}_proj.{k}" for n in ("q", "k", "v", "out") for k in ("weight", "bias")
    }
    state["k_proj.weight"].fill_(7)
    state["v_proj.bias"].fill_(8)
    size = model.config.vision.hidden_size
    assert (attention.qkv_proj.weight[size : 2 * size] == 7).all()
    assert (attention.qkv_proj.bias[2 * size :] == 8).all()
    assert not (attention.qkv_proj.weight[2 * size :] == 7).any()


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_fuses(assign):
    source, target = make_model(seed=1), make_model(seed=2)
    state = source.state_dict()
    names = list(state)
    target.load_state_dict(state, assign=assign)
    assert list(state) == names  # the caller's dictionary is left alone
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_load_state_dict_names_wrong_parts():
    attention = make_model().visual.vision_model.encoder.layers[0].self_attn
    state = attention.state_dict()
    state["k_proj.weight"] = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match=r"size mismatch for k_proj\.weight: \[2, 3\]"):
        attention.load_state_dict(state)
    del state["k_proj.weight"]
    with pytest.raises(RuntimeError, match=r"Missing .*qkv_proj\.weight"):
        attention.load_state_dict(state)


def test_random_weights_keep_a_deep_bf16_tower_finite():
    from dataclasses import replace

    from model_helpers import VISION

    from keye_ops.model import VisionTower

    config = replace(VISION, num_hidden_layers=27)
    tower = init_random(VisionTower(config).bfloat16(), seed=0)
    grids = [(1, 6, 8)]
    with torch.no_grad():
        hidden = tower.vision_model.embeddings(patches(grids).bfloat16(), tower.pack(grids))
        out = tower.vision_model.encoder(hidden, tower.pack(grids))
    assert out.isfinite().all()
    assert 0.3 < float(out.float().std()) < 10
    again = init_random(VisionTower(config), seed=0)
    name = "vision_model.encoder.layers.26.mlp.fc2.weight"
    same = again.state_dict()[name].bfloat16()
    assert torch.equal(tower.state_dict()[name], same)
    assert relative_error(init_random(again, seed=1).state_dict()[name], same) > 0.1


def test_random_weights_fill_a_whole_model():
    model = KeyeModel(make_model().config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    init_random(model, seed=0)
    assert all(p.isfinite().all() and p.abs().sum() > 0 for p in model.parameters())
