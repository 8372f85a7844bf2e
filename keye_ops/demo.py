"""``keye-ops demo``: a photograph and a clip through the full-size vision tower and projector."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import keye_ops
from keye_ops import dispatch
from keye_ops.device import resolve_device
from keye_ops.generate_command import TokenPrinter, conversation

HELP = "Run a real photograph and clip through the full-size vision tower; times, parity, picture."
DATA = Path(__file__).parent / "data"

# Keye-VL-8B as released; what the demo builds without a checkpoint.
_RELEASED: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
_RELEASED_VISION = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "spatial_merge_size": 2,
}
_MODEL_TYPE = {"preview": "Keye", "1.5": "KeyeVL1_5"}
_SMALL_LAYERS = 3
_SMALL_PIXELS = 64 * 28 * 28


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--small", action="store_true", help=f"{_SMALL_LAYERS} layers, few pixels")
    parser.add_argument("--checkpoint", metavar="DIR", type=Path, help="real weights; also answers")
    parser.add_argument("--version", choices=("preview", "1.5"), default="1.5")
    parser.add_argument("--image", metavar="FILE", type=Path, default=DATA / "astronaut.jpg")
    parser.add_argument("--video", metavar="FILE", type=Path, help="default: a clip made here")
    parser.add_argument("--prompt", default="What do the picture and the clip show?")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path("demo_output"))
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Pass:
    """One pass of the batch: seconds a stage, and the outputs."""

    label: str
    seconds: dict[str, float]
    features: torch.Tensor
    tokens: torch.Tensor


@torch.inference_mode()
def run(arguments: argparse.Namespace) -> int:
    """Run the demo; returns 0."""
    from keye_ops.model import KeyeConfig, Projector, VisionTower, init_random, load_checkpoint
    from keye_ops.processing import ProcessingConfig, VideoOptions, process_image, process_video
    from keye_ops.table import print_table

    output, small = arguments.output, arguments.small
    device = resolve_device(arguments.device)
    output.mkdir(parents=True, exist_ok=True)
    for path in (arguments.image, arguments.video):
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")

    # Read and cut.
    video = arguments.video or make_clip(output / "clip.mp4")
    version = arguments.version
    if arguments.checkpoint:
        version = KeyeConfig.from_pretrained(arguments.checkpoint).version
    settings = ProcessingConfig(version=version)
    if arguments.checkpoint:
        settings = ProcessingConfig.from_pretrained(arguments.checkpoint, version)
    begin = time.perf_counter()
    image = process_image(arguments.image, settings, max_pixels=_SMALL_PIXELS if small else None)
    image_seconds = time.perf_counter() - begin
    options = VideoOptions(max_pixels=_SMALL_PIXELS if small else None)
    begin = time.perf_counter()
    clip = process_video(video, settings, options, progress=True)
    video_seconds = time.perf_counter() - begin

    # Build.
    print(f"{'loading' if arguments.checkpoint else 'drawing'} the weights ...", flush=True)
    if arguments.checkpoint:
        model = load_checkpoint(arguments.checkpoint, device=device)  # in the dtype of the file
        tower, projector = (copy.deepcopy(m).float() for m in (model.visual, model.mlp_AR))
    else:
        layers = {"num_hidden_layers": _SMALL_LAYERS} if small else {}
        config = KeyeConfig.from_dict(
            _RELEASED
            | {"model_type": _MODEL_TYPE[version], "vision_config": _RELEASED_VISION | layers}
        )
        tower = init_random(VisionTower(config.vision), arguments.seed).to(device)
        projector = init_random(Projector(config), arguments.seed).to(device)
    parameters = sum(p.numel() for module in (tower, projector) for p in module.parameters())
    pixels = torch.cat([image.pixel_values, clip.pixel_values]).to(device)
    grid = tower.pack([image.grid_thw, *clip.grid_thw])
    print(
        f"{len(tower.vision_model.encoder.layers)} layers, {parameters / 1e6:.0f} M parameters, "
        f"{grid.total} patches in {grid.num_segments} segments, {grid.total_merged} tokens"
    )

    # Run three times: the truth, plain PyTorch, and the kernels.
    half = [copy.deepcopy(module).bfloat16() for module in (tower, projector)]
    warm = tower.pack([(1, 2, 2)])
    passes = []
    for label, mode, modules in (
        ("plain PyTorch, fp32", "reference", (tower, projector)),
        ("plain PyTorch, bf16", "reference", half),
        ("keye_ops, bf16", "auto", half),
    ):
        with dispatch.backend(mode):
            modules[1](modules[0](pixels[:4], warm), warm)
            passes.append(timed_pass(label, *modules, pixels, grid))
    exact, plain, ours = passes

    # Tell.
    stages = [[name, *(f"{p.seconds[name]:.3f}" for p in passes)] for name in ours.seconds]
    stages.append(["total", *(f"{sum(p.seconds.values()):.3f}" for p in passes)])
    before = [["read and cut the image", f"{image_seconds:.3f}"]]
    before += [["read and cut the clip", f"{video_seconds:.3f}"]]
    print_table("Before the model (seconds)", ["", ""], before)
    print_table("Seconds a stage", ["stage", *(p.label for p in passes)], stages)
    print_table("Tokens", ["input", "patches", "tokens"], token_rows(image, clip))
    print_table(
        "Error of bf16 against fp32, relative to the largest fp32 value",
        ["output", "keye_ops max", "plain max", "keye_ops mean", "plain mean"],
        [
            ["vision tower", *_errors(ours.features, plain.features, exact.features)],
            ["projector", *_errors(ours.tokens, plain.tokens, exact.tokens)],
        ],
    )
    paths = [[d.op, d.implementation, d.device, d.reason] for d in dispatch.dispatches()]
    print_table("Which path each op took", ["op", "ran", "on", "because"], paths)
    from keye_ops.demo_picture import draw

    picture = draw(output / "demo.png", arguments.image, image, clip, [plain, ours])
    print(f"picture: {picture}")
    if arguments.checkpoint:
        answer(arguments, model, video)
    return 0


def timed_pass(
    label: str, tower: torch.nn.Module, projector: torch.nn.Module, pixels: torch.Tensor, grid: Any
) -> Pass:
    """Run tower and projector with the time that each kind of module takes."""
    from tqdm import tqdm

    transformer = tower.vision_model
    layers = transformer.encoder.layers
    seconds: dict[str, float] = {}
    with tqdm(total=len(layers), desc=label, unit="layer", leave=False) as bar:
        kinds = {
            "patch embedding": [transformer.embeddings],
            "q, k, v and output": [layer.self_attn for layer in layers],
            "MLP": [layer.mlp for layer in layers],
        }
        handles = [
            layer.register_forward_hook(lambda *_: bar.update() and None) for layer in layers
        ]
        for kind, modules in kinds.items():
            handles += [h for module in modules for h in _time(module, kind, seconds)]
        try:
            with (
                _timed_op("rope_2d_", "rope", seconds),
                _timed_op("varlen_attention", "attention", seconds),
                _timed_op("layer_norm", "residuals and norms", seconds),
                _timed_op("add_layer_norm", "residuals and norms", seconds),
            ):
                begin = time.perf_counter()
                features = tower(pixels, grid)
                _wait(pixels)
                tower_seconds = time.perf_counter() - begin
        finally:
            for handle in handles:
                handle.remove()
    seconds["q, k, v and output"] -= seconds["rope"] + seconds["attention"]
    seconds["rest of the tower"] = tower_seconds - sum(seconds.values())
    begin = time.perf_counter()
    tokens = projector(features, grid)
    _wait(pixels)
    seconds["projector"] = time.perf_counter() - begin
    return Pass(label, seconds, features.float(), tokens.float())


def _time(module: torch.nn.Module, kind: str, seconds: dict[str, float]) -> list[Any]:
    """Add the time of every call of a module to ``seconds[kind]``."""
    seconds.setdefault(kind, 0.0)
    begin = 0.0

    def before(_module: Any, inputs: tuple[Any, ...]) -> None:
        nonlocal begin
        _wait(inputs[0])
        begin = time.perf_counter()

    def after(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        _wait(output)
        seconds[kind] += time.perf_counter() - begin

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


@contextmanager
def _timed_op(name: str, kind: str, seconds: dict[str, float]) -> Iterator[None]:
    """Add the time of every call of a public op to ``seconds[kind]``."""
    op = getattr(keye_ops, name)
    seconds.setdefault(kind, 0.0)

    def timed(*args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        result = op(*args, **options)
        _wait(args[0])
        seconds[kind] += time.perf_counter() - begin
        return result

    setattr(keye_ops, name, timed)
    try:
        yield
    finally:
        setattr(keye_ops, name, op)


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _errors(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> list[str]:
    """Max of ours and plain, mean of ours and plain."""
    scale = exact.abs().max()
    differences = [(x - exact).abs() / scale for x in (ours, plain)]
    return [f"{d.max().item():.2e}" for d in differences] + [
        f"{d.mean().item():.2e}" for d in differences
    ]


def token_rows(image: Any, clip: Any) -> list[list[object]]:
    """Rows (input, patches, tokens) of the image and of every frame."""
    _, h, w = image.grid_thw
    rows: list[list[object]] = [["image", f"{h} x {w}", h * w // 4]]
    for t, h, w in clip.grid_thw:
        frames = f"{t} x " if t > 1 else ""
        index = len(rows) - 1
        fast = len(clip.grid_thw) > 1 and clip.is_fast[index]
        when = f" at {clip.timestamps[index]:.1f} s" if len(clip.grid_thw) > 1 else ""
        name = f"{'fast' if fast else 'slow'} frame{when}" if len(clip.grid_thw) > 1 else "clip"
        rows.append([name, f"{frames}{h} x {w}", t * h * w // 4])
    return rows


def make_clip(path: Path, *, size: tuple[int, int] = (320, 240), fps: int = 8) -> Path:
    """Encode four seconds of real pictures: a pan over one, a cut, a zoom into another."""
    try:
        import av
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            f'making a clip needs {error.name}: pip install "keye-ops[video]"'
        ) from error

    def crop(picture: Any, left: float, top: float, width: float) -> Any:
        height = width * size[1] / size[0]
        return picture.resize(size, box=(left, top, left + width, top + height))

    pictures = [Image.open(DATA / name).convert("RGB") for name in ("astronaut.jpg", "rocket.jpg")]
    steps = [i / (2 * fps - 1) for i in range(2 * fps)]
    frames = [crop(pictures[0], 20 + 24 * s, 10 + 8 * s, 440) for s in steps]
    frames += [crop(pictures[1], 12 * s, 8 * s, 560 - 24 * s) for s in steps]
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return path


def answer(arguments: argparse.Namespace, model: Any, video: Path) -> None:
    """Ask the model about the picture and the clip, and print the answer as it comes."""
    from keye_ops.model import generate
    from keye_ops.processing import KeyeProcessor

    processor = KeyeProcessor.from_pretrained(arguments.checkpoint)
    inputs = processor(conversation([arguments.image], [video], arguments.prompt))
    print(f"> {arguments.prompt}")
    generate(
        model,
        inputs,
        max_new_tokens=arguments.max_new_tokens,
        stop_token_ids=processor.stop_token_ids,
        callback=TokenPrinter(processor),
    )
    print()
