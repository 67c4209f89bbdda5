"""RMSNorm, the QKV product and its epilogue, in plain torch with the published rounding points."""

from __future__ import annotations

import torch

from happyhorse_fast import ambient
from happyhorse_fast.eager.float32 import linear
from happyhorse_fast.eager.rotary import apply_rotary

EPS = 1e-6


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x / sqrt(mean(x^2) + 1e-6) * (weight + 1) over the last dimension, in the dtype of ``x`` (float32 or float64)."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPS) * (weight.to(x.dtype) + 1)


@ambient.independent
def rmsnorm_qkv(
    hidden: torch.Tensor,
    norm_weight: torch.Tensor,
    qkv_weight: torch.Tensor,
    q_norm_weight: torch.Tensor,
    k_norm_weight: torch.Tensor,
    phases: torch.Tensor,
    *,
    num_heads_q: int,
    num_heads_kv: int,
    compute_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Steps 1 and 2 of a layer up to attention, for rows of one expert.

    The normalised input and the product are rounded to ``compute_dtype``; QK-norm and rotation run in the residual
    stream's dtype; then q, k and v are rounded to ``compute_dtype``.

    Args:
        hidden: [M, hidden] residual stream, float32 (float64 for a float64 reference).
        norm_weight: [hidden].
        qkv_weight: [(Hq + 2 Hkv) * D + Hq, hidden], rows in the order q, k, v, gate.
        q_norm_weight: [D].
        k_norm_weight: [D].
        phases: [M, 6 * D/8], sines then cosines.
        num_heads_q: Hq.
        num_heads_kv: Hkv.
        compute_dtype: Dtype of the products.

    Returns:
        q [M, Hq, D], k and v [M, Hkv, D] in ``compute_dtype``; gate [M, Hq] before its sigmoid, in the stream's dtype.
    """
    stream = hidden.dtype
    d = q_norm_weight.shape[0]
    x = rms_norm(hidden, norm_weight).to(compute_dtype)
    product = linear(x, qkv_weight.to(compute_dtype)).to(stream)
    q, k, v, gate = product.split([num_heads_q * d, num_heads_kv * d, num_heads_kv * d, num_heads_q], dim=1)
    q = apply_rotary(rms_norm(q.unflatten(1, (num_heads_q, d)), q_norm_weight), phases)
    k = apply_rotary(rms_norm(k.unflatten(1, (num_heads_kv, d)), k_norm_weight), phases)
    return q.to(compute_dtype), k.to(compute_dtype), v.unflatten(1, (num_heads_kv, d)).to(compute_dtype), gate
