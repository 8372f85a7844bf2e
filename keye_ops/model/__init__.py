"""Keye-VL in plain PyTorch on the ops of keye_ops: vision tower, projector, text model."""

from keye_ops.model.cache import KVCache, SequenceLayout
from keye_ops.model.checkpoint import CheckpointError, load_checkpoint, load_vision_tower
from keye_ops.model.config import KeyeConfig, TextConfig, VisionConfig
from keye_ops.model.generate import generate
from keye_ops.model.init import init_random
from keye_ops.model.keye import KeyeModel
from keye_ops.model.projector import Projector
from keye_ops.model.rope_index import get_rope_index
from keye_ops.model.text import TextModel
from keye_ops.model.tiny import make_tiny_checkpoint
from keye_ops.model.vision import VisionTower

__all__ = [
    "CheckpointError",
    "KVCache",
    "KeyeConfig",
    "KeyeModel",
    "Projector",
    "SequenceLayout",
    "TextConfig",
    "TextModel",
    "VisionConfig",
    "VisionTower",
    "generate",
    "get_rope_index",
    "init_random",
    "load_checkpoint",
    "load_vision_tower",
    "make_tiny_checkpoint",
]
