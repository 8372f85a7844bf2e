"""Loading safetensors checkpoints, tensor by tensor, with every mismatch in one error."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keye_ops.json_file import read_json
from keye_ops.model.config import KeyeConfig, VisionConfig
from keye_ops.model.keye import KeyeModel
from keye_ops.model.vision import VisionTower

# In the released files, and never used to encode or generate.
_UNUSED = re.compile(
    r"visual\.vision_model\.head\..+"
    r"|visual\.vision_model\.embeddings\.packing_position_embedding\.weight"
    r"|.+\.rotary\w*\.inv_freq"
)
_PRE_NORM = "mlp_AR.pre_norm.weight"
_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


class CheckpointError(ValueError):
    """Weights that cannot be read, or that do not fit the configuration."""


def load_checkpoint(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> KeyeModel:
    """Load a Keye-VL-8B-Preview or Keye-VL-1.5 checkpoint folder.

    Names and shapes are compared before anything is allocated. The weights are allocated once and
    filled tensor by tensor, so that memory stays below the weights plus one shard. The pooling
    head, the packing position table and rotary frequencies in the files are ignored.

    Args:
        folder: holds config.json and model.safetensors, or model.safetensors.index.json and shards.
        dtype: of all weights; by default the one config.json names, or else the files' own.
        device: where the weights go.
        progress: show a bar over the bytes read.

    Returns:
        The model in eval mode.

    Raises:
        FileNotFoundError: config.json, the weights or a shard are missing.
        CheckpointError: an unreadable file; an unknown torch_dtype in config.json, unless `dtype`
            is given; a version that the projector's shape contradicts; or keys that are missing,
            unexpected or misshapen, all of them listed.
        ImportError: safetensors (or tqdm, for the bar) is not installed.
    """
    config = KeyeConfig.from_pretrained(folder)
    index = _TensorIndex.open(Path(folder))
    _confirm_version(config, index)
    with torch.device("meta"):
        model = KeyeModel(config)
    unused = ["lm_head.weight"] if config.text.tie_word_embeddings else []
    _fill(model, index, "", unused, dtype or _named_dtype(config), device, progress)
    return model.eval()


def load_vision_tower(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> VisionTower:
    """Load the vision tower alone, from a Keye-VL or PaddleOCR-VL folder (the names are the same).

    Shards without vision weights need not be there. Arguments and errors as in `load_checkpoint`;
    the dtype is by default that of the files.
    """
    config = VisionConfig.from_pretrained(folder)
    index = _TensorIndex.open(Path(folder), prefix="visual.")
    with torch.device("meta"):
        tower = VisionTower(config)
    _fill(tower, index, "visual.", [], dtype, device, progress)
    return tower.eval()


class _TensorIndex:
    """The tensors of a folder: which file holds each, and its shape and stored dtype."""

    def __init__(self) -> None:
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    @classmethod
    def open(cls, folder: Path, prefix: str = "") -> _TensorIndex:
        """Read the headers of all files that hold tensors whose name begins with `prefix`."""
        index = cls()
        for path in _weight_files(folder, prefix):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118  safe_open is not a mapping
                    if name.startswith(prefix):
                        index.files[name] = path
                        index.shapes[name] = tuple(file.get_slice(name).get_shape())
        return index

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Read the named tensors one at a time, each file opened once."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        for path, inside in by_file.items():
            with _opened(path) as file:
                for name in inside:
                    yield name, file.get_tensor(name)


def _weight_files(folder: Path, prefix: str) -> list[Path]:
    """The safetensors files of a folder, by its index if it has one."""
    index_file, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index_file.is_file():
        if not single.is_file():
            raise FileNotFoundError(
                f"load_checkpoint: {folder} must hold {single.name} or {index_file.name}, "
                "got neither"
            )
        return [single]
    try:
        weight_map = read_json(index_file).get("weight_map")
    except ValueError as error:
        raise CheckpointError(f"load_checkpoint: {error}") from error
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"load_checkpoint: {index_file} must hold an object weight_map")
    shards = sorted({str(file) for name, file in weight_map.items() if name.startswith(prefix)})
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(
                f"load_checkpoint: shards must lie in {folder}, got {shard!r} in {index_file.name}"
            )
        if not (folder / shard).is_file():
            raise FileNotFoundError(
                f"load_checkpoint: the shard {shard} named by {index_file} is missing"
            )
    return [folder / shard for shard in shards]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            'load_checkpoint needs safetensors: pip install "keye-ops[model]"'
        ) from error
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"load_checkpoint: {path} is not a whole safetensors file: {error}"
        ) from error


def _named_dtype(config: KeyeConfig) -> torch.dtype | None:
    """The dtype that config.json names, None if it names none."""
    if config.dtype is not None and config.dtype not in _DTYPES:
        raise CheckpointError(
            f"load_checkpoint: torch_dtype in config.json must be one of {', '.join(_DTYPES)}, "
            f"got {config.dtype!r}"
        )
    return _DTYPES.get(config.dtype or "")


def _confirm_version(config: KeyeConfig, index: _TensorIndex) -> None:
    """The projector's norm has another size in each version; it must agree with config.json."""
    channels = config.vision.hidden_size
    sizes = {"preview": channels, "1.5": channels * config.vision.spatial_merge_size**2}
    got = index.shapes.get(_PRE_NORM)
    for version, size in sizes.items():
        if got == (size,) and version != config.version:
            raise CheckpointError(
                f"load_checkpoint: config.json says version {config.version}, which needs "
                f"{_PRE_NORM} of shape [{sizes[config.version]}], got [{size}] as in {version}"
            )


def _fill(
    module: nn.Module,
    index: _TensorIndex,
    prefix: str,
    unused: list[str],
    dtype: torch.dtype | None,
    device: torch.device | str,
    progress: bool,
) -> None:
    """Check all names and shapes, allocate the module's weights and copy the tensors into them."""
    want = {prefix + name: tuple(t.shape) for name, t in module.state_dict().items()}
    stored = {
        name: shape
        for name, shape in index.shapes.items()
        if not _UNUSED.fullmatch(name) and name not in unused
    }
    _compare(want, stored)
    if dtype is None:
        _, first = next(index.tensors(want))
        dtype = first.dtype
    module.to(dtype).to_empty(device=device)
    weights = module.state_dict()
    with _progress_bar(sum(w.nbytes for w in weights.values()), progress) as advance:
        for name, tensor in index.tensors(want):
            weight = weights[name.removeprefix(prefix)]
            weight.copy_(tensor)  # detached views of the parameters, the fused ones too
            advance(weight.nbytes)


@contextmanager
def _progress_bar(num_bytes: int, show: bool) -> Iterator[Callable[[int], Any]]:
    """A function to call with the bytes done."""
    if not show:
        yield lambda _: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError('load_checkpoint needs tqdm: pip install "keye-ops[model]"') from error
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="weights") as bar:
        yield bar.update


def _compare(want: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]]) -> None:
    missing = [f"  missing: {name} {list(want[name])}" for name in sorted(want.keys() - stored)]
    unexpected = [
        f"  unexpected: {name} {list(stored[name])}" for name in sorted(stored.keys() - want)
    ]
    misshapen = [
        f"  misshapen: {name} must be {list(want[name])}, got {list(stored[name])}"
        for name in sorted(want.keys() & stored)
        if want[name] != stored[name]
    ]
    if missing or unexpected or misshapen:
        counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(misshapen)} misshapen"
        lines = "\n".join(missing + unexpected + misshapen)
        raise CheckpointError(
            f"load_checkpoint: the keys do not fit config.json: {counts}\n{lines}"
        )
