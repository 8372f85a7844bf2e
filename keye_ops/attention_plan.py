"""AttentionPlan: the order of work of varlen_attention on a GPU, made once for many layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from keye_ops import dispatch
from keye_ops.checks import check


def check_offsets_pair(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> None:
    """Require offsets of as many segments of queries as of keys."""
    op = "varlen_attention"
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        good = cu_seqlens.dtype == torch.int32 and cu_seqlens.dim() == 1 and len(cu_seqlens) > 0
        received = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        check(good, op, f"{name} must be int32 [num_segments + 1]", received)
    sizes = (cu_seqlens_q.shape[0], cu_seqlens_k.shape[0])
    check(sizes[0] == sizes[1], op, "cu_seqlens_q and cu_seqlens_k must have equal lengths", sizes)


def varlen_attention_plan_reference(
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    total_q: int,
    total_k: int,
    causal: bool = False,
) -> torch.Tensor:
    """Nothing, after the checks: only kernels for CUDA need a plan."""
    check_offsets_pair(cu_seqlens_q, cu_seqlens_k)
    good = total_q >= 0 and total_k >= 0
    check(good, "varlen_attention", "totals must not be negative", (total_q, total_k))
    return cu_seqlens_q.new_empty(0)


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """What calls of :func:`varlen_attention` with the same segments may share.

    A kernel makes it on the device from the offsets, without a host sync; a call without a plan
    makes one of its own. On devices that need none it is empty and costs nothing.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: int32 [num_segments + 1]; the very tensors of the calls.
        total_q, total_k: rows of q, and of k and v.
        causal: as in the calls.
        max_seqlen_q, max_seqlen_k: host upper bounds of the segment lengths, if known.
        tiles: opaque, int32; None where there is nothing to plan.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    total_q: int
    total_k: int
    causal: bool
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    tiles: torch.Tensor | None

    @classmethod
    def make(
        cls,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor | None = None,
        *,
        total_q: int,
        total_k: int | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        causal: bool = False,
    ) -> AttentionPlan:
        """Plan calls with these offsets; those of k, and their bounds, are by default those of q.

        Raises:
            RuntimeError: offsets or totals that do not fit.
        """
        if cu_seqlens_k is None:
            cu_seqlens_k = cu_seqlens_q
            total_k = total_q if total_k is None else total_k
            max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
        check(total_k is not None, "varlen_attention", "total_k must be given with cu_seqlens_k",
              total_k)  # fmt: skip
        args = (cu_seqlens_q, cu_seqlens_k, total_q, total_k, causal)
        tiles = None
        if dispatch.plans_on(cu_seqlens_q):
            tiles = dispatch.call(torch.ops.keye_ops.varlen_attention_plan.default, args)
        else:
            varlen_attention_plan_reference(*args)
        return cls(*args, max_seqlen_q, max_seqlen_k, tiles)

    def check_fits(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        causal: bool,
    ) -> None:
        """Raise unless the plan is one of such a call."""
        op = "varlen_attention"
        own = cu_seqlens_q is self.cu_seqlens_q and cu_seqlens_k is self.cu_seqlens_k
        check(own, op, "plan must be made of the call's cu_seqlens", "one of others")
        totals, received = (self.total_q, self.total_k), (q.shape[0], k.shape[0])
        if totals != received:  # a graph cannot put sizes that it does not know into words
            check(False, op, f"plan must be made for the rows of q and k, {received}", totals)
        check(self.causal == causal, op, f"plan must be made with causal={causal}", self.causal)
