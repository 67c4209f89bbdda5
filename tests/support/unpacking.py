"""Undo the packing of weights, norms and phases: what comes back is held against what was published."""

from __future__ import annotations

import torch

from happyhorse_fast.ops.qkv.packing import _row_order, rotary_permutation
from happyhorse_fast.ops.quantize import dequantize, hadamard


def unpack_linear(
    packed: torch.Tensor, scale: torch.Tensor | None, *, features: int, inputs: int, through_hadamard: bool = False
) -> torch.Tensor:
    """The published layout again: exactly the packed bf16 values, or what the codes stand for, rounded to bf16.

    Args:
        packed: [E, F', K'] bf16, or codes with ``scale``.
        scale: [E, F'] float32, or None.
        features: F before padding.
        inputs: K before padding.
        through_hadamard: Whether the packed inputs went through the Hadamard matrix, which is its own inverse.

    Returns:
        [E * F, K] bf16.
    """
    values = packed if scale is None else dequantize(packed, scale)
    values = (hadamard(values) if through_hadamard else values).bfloat16()
    return values[:, :features, :inputs].flatten(0, 1)


def unpack_qkv_weight(
    packed: torch.Tensor, scale: torch.Tensor | None, *, num_heads_q: int, num_heads_kv: int, head_dim: int
) -> torch.Tensor:
    """The published order again, bf16: exactly the packed bf16 values, or what the codes stand for.

    Args:
        packed: [E, F, C].
        scale: [E, F] for codes, else None.
        num_heads_q: Hq.
        num_heads_kv: Hkv.
        head_dim: D.

    Returns:
        [E * ((Hq + 2 Hkv) * D + Hq), C].
    """
    values = packed if scale is None else dequantize(packed, scale).to(torch.bfloat16)
    order = _row_order(num_heads_q, num_heads_kv, head_dim).to(packed.device)
    return values[:, torch.argsort(order)].flatten(0, 1)


def unpack_qk_norm(qk_norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[E, 2, D] -> q and k norm weights as published, [E * D] each."""
    published = qk_norm[..., torch.argsort(rotary_permutation(qk_norm.shape[-1])).to(qk_norm.device)]
    return published[:, 0].flatten(), published[:, 1].flatten()


def unpack_cos_sin(cos_sin: torch.Tensor) -> torch.Tensor:
    """[N, D] -> [N, 6B] sines then cosines, as published."""
    cos, sin = cos_sin.chunk(2, dim=1)
    half = 3 * (cos_sin.shape[1] // 8)
    return torch.cat([sin[:, :half], cos[:, :half]], dim=1)
