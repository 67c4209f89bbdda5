"""Bounds of a layer's scores and values, from its packed weights, and the softmax that they allow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from happyhorse_fast.ops.attention.score_bound import LIMIT, effective_bound, norm_scores, value_bound
from happyhorse_fast.ops.quantize import dequantize


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
        known = math.isfinite(self.scores) and math.isfinite(self.v_max)
        return effective_bound(self.scores, self.v_max) if known else math.inf

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


def packed_bound(
    attn_norm: torch.Tensor,
    qk_norm: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_scale: torch.Tensor | None,
    v_rows: slice,
) -> AttentionBound:
    """The bounds of a layer as its kernels multiply it; waits for the device.

    In e4m3 a row of x is off by at most 2^-4, and :data:`score_bound.MARGIN` covers that too, as it does half a step of
    int8 where a row's largest value is at most 17 times its RMS; the weights are taken as their codes stand for.

    Args:
        attn_norm: [E, C] float32.
        qk_norm: [E, 2, D] float32.
        qkv_weight: [E, F, C] bf16, or codes with ``qkv_scale``.
        qkv_scale: [E, F] float32, or None.
        v_rows: Of F, those that make v.
    """
    of_experts = []
    for expert in range(len(attn_norm)):  # an expert at a time: in float32 one of the 15B model's is 21 MB
        weight = qkv_weight[expert : expert + 1, v_rows]
        if qkv_scale is not None:
            weight = dequantize(weight, qkv_scale[expert : expert + 1, v_rows])
        of_experts.append(value_bound(attn_norm[expert : expert + 1], weight))
    v_max = float(torch.tensor(of_experts, dtype=torch.float64).max())  # NaN where one is; Python's max may drop it
    return AttentionBound(norm_scores(qk_norm[:, 0], qk_norm[:, 1]), v_max)
