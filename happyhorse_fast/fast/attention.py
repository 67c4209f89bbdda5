"""What attention of a packed layer takes: the results of the QKV product, and the bounds that choose its softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from happyhorse_fast.ops.attention.score_bound import LIMIT, effective_bound

Operand = tuple[torch.Tensor, torch.Tensor | None]
"""[rows, K] in bf16 and None, or codes and their scale."""


class AttentionInputs(NamedTuple):
    """Results of the QKV product, as attention takes them.

    Attributes:
        q: [rows, Hq, D].
        k: [rows, Hkv, D].
        v: [rows, Hkv, D]; in e4m3 as docs/OPS.md lays it out.
        q_scale: Of codes; None in bf16.
        k_scale: Likewise.
        v_scale: Of e4m3 codes.
        gate: [rows, Hq] float32 after its sigmoid.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_scale: torch.Tensor | None
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    gate: torch.Tensor


@dataclass(frozen=True)
class AttentionBound:
    """Bounds of one layer's attention.

    Attributes:
        scores: |scale * q.k| * log2(e) is at most this, for every query and key.
        v_max: |v| is at most this.
    """

    scores: float
    v_max: float

    @property
    def effective(self) -> float:
        """The ``bound`` of `block_sparse_attention`: inf where a weight is not finite."""
        return effective_bound(self.scores, self.v_max)

    @property
    def softmax(self) -> str:
        """The softmax that it allows, and why, in words."""
        whole, of_v = self.effective, self.effective - self.scores
        if math.isinf(whole):
            return "running maximum: its weights are not known, or not finite"
        if whole <= LIMIT:
            return f"bounded softmax: scores at most {whole:.1f} of {LIMIT:.0f} powers of two"
        parts = []
        if of_v < whole - LIMIT:
            parts.append(f"scores reach {self.scores:.1f} by the weights of q's and k's norms")
        if of_v > 0:
            parts.append(f"v adds {of_v:.1f}, since it may reach {self.v_max:.3g}")
        return f"running maximum: {whole:.1f} > {LIMIT:.0f} powers of two; {' and '.join(parts)}"


UNKNOWN = AttentionBound(math.inf, math.inf)
