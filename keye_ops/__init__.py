"""keye_ops: kernels for native-resolution vision-language models."""

from keye_ops._version import __version__
from keye_ops.add_layer_norm import add_layer_norm, layer_norm
from keye_ops.add_rms_norm import add_rms_norm, rms_norm
from keye_ops.attention_plan import AttentionPlan
from keye_ops.check_errors import check_errors
from keye_ops.dispatch import Dispatch, backend, last_dispatch
from keye_ops.flash_attention import flash_attn_varlen_func
from keye_ops.grid import PackedGrid
from keye_ops.linear_gelu import linear_gelu
from keye_ops.merge_norm import merge_norm
from keye_ops.patch_embed import patch_embed
from keye_ops.patchify import patchify
from keye_ops.projector import projector
from keye_ops.rope import rope, rope_, rope_2d, rope_2d_, rope_3d, rope_3d_
from keye_ops.varlen_attention import varlen_attention

__all__ = [
    "AttentionPlan",
    "Dispatch",
    "PackedGrid",
    "__version__",
    "add_layer_norm",
    "add_rms_norm",
    "backend",
    "check_errors",
    "flash_attn_varlen_func",
    "last_dispatch",
    "layer_norm",
    "linear_gelu",
    "merge_norm",
    "patch_embed",
    "patchify",
    "projector",
    "rms_norm",
    "rope",
    "rope_",
    "rope_2d",
    "rope_2d_",
    "rope_3d",
    "rope_3d_",
    "varlen_attention",
]
