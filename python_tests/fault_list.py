"""Every planted fault, and the sources that they are planted in."""

from __future__ import annotations

from faults_of_norms import ADD_LAYER_NORM, ADD_RMS_NORM, MERGE_NORM
from faults_of_ops import LINEAR_GELU, PATCH_EMBED, PATCH_EMBED_EPILOGUE, PATCHIFY, ROPE
from faults_of_selftests import CLUSTER_SUM, GEMM_MMA, GEMM_WGMMA, ROW_SUMS

SELFTEST = "host_executor/selftest/"
SOURCES = {
    "gemm_mma": SELFTEST + "gemm_mma.cuh",
    "gemm_wgmma": SELFTEST + "gemm_wgmma.cuh",
    "cluster_sum": SELFTEST + "cluster_sum.cuh",
    "row_sums": SELFTEST + "row_sums.cuh",
    "linear_gelu": "linear_gelu/linear_gelu.cuh",
    "rope": "rope/rope.cuh",
    "patch_embed": "patch_embed/patch_embed.cuh",
    "patch_embed_epilogue": "patch_embed/patch_embed_epilogue.cuh",
    "patchify": "patchify/patchify.cuh",
    "add_layer_norm": "common/norm_row.cuh",
    "add_rms_norm": "common/added_rows.cuh",
    "merge_norm": "merge_norm/merge_norm.cuh",
}

FAULTS = [
    *GEMM_MMA,
    *GEMM_WGMMA,
    *CLUSTER_SUM,
    *ROW_SUMS,
    *ROPE,
    *PATCH_EMBED,
    *PATCHIFY,
    *ADD_LAYER_NORM,
    *ADD_RMS_NORM,
    *MERGE_NORM,
    *LINEAR_GELU,
    *PATCH_EMBED_EPILOGUE,
]
