"""AttentionPlan: the order of work of varlen_attention on a GPU, made once for many layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from keye_ops import dispatch
from keye_ops.checks import check


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """What calls of :func:`varlen_attention` with the same segments may share.

    A kernel makes it on the device from the offsets, without a host sync, in about 8 µs; a call
    without a plan makes one of its own. On devices that need none it is empty and costs nothing.

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
        tiles = None
        if dispatch.plans_on(cu_seqlens_q):
            op = torch.ops.keye_ops.varlen_attention_plan.default
            tiles = dispatch.call(op, (cu_seqlens_q, cu_seqlens_k, total_q, total_k, causal))
        longest = (max_seqlen_q, max_seqlen_k)
        return cls(cu_seqlens_q, cu_seqlens_k, total_q, total_k, causal, *longest, tiles)

    def check_fits(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        causal: bool,
    ) -> None:
        """Raise unless the plan is one of such a call."""
        if torch.compiler.is_compiling():
            return  # a graph is checked where it is traced without one
        own = cu_seqlens_q is self.cu_seqlens_q and cu_seqlens_k is self.cu_seqlens_k
        check(
            own, "varlen_attention", "plan must be made of the call's cu_seqlens", "one of others"
        )
        totals, received = (self.total_q, self.total_k), (q.shape[0], k.shape[0])
        need = f"plan must be made for the rows of q and k, {received}"
        check(totals == received, "varlen_attention", need, totals)
        need = f"plan must be made with causal={causal}"
        check(self.causal == causal, "varlen_attention", need, self.causal)
