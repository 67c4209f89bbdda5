"""Weights, norms and phases of the QKV product in the layout its kernels take.

Rotary pairs (x[i], x[3B + i]) become adjacent channels of every q and k head: scores do not change when q and k share a
permutation, and the rotation then fits the product's epilogue.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import pad

from happyhorse_fast.ops.linear.packing import pack_linear
from happyhorse_fast.ops.quantize import E4M3_MAX


def rotary_permutation(head_dim: int) -> torch.Tensor:
    """[D] int64, packed channel -> published channel: 0, 3B, 1, 3B+1, ..., 3B-1, 6B-1, 6B, ..., D-1 with B = D/8."""
    half = 3 * (head_dim // 8)
    pairs = torch.stack([torch.arange(half), torch.arange(half, 2 * half)], dim=1).flatten()
    return torch.cat([pairs, torch.arange(2 * half, head_dim)])


@torch.no_grad()
def pack_qkv_weight(
    weight: torch.Tensor, *, experts: int, num_heads_q: int, num_heads_kv: int, head_dim: int, to: str = "bf16"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Permute q and k heads, pad the gates to whole heads, and quantise.

    Args:
        weight: [E * ((Hq + 2 Hkv) * D + Hq), C] as published: q, k, v, gate of every expert.
        experts: E.
        num_heads_q: Hq.
        num_heads_kv: Hkv.
        head_dim: D.
        to: ``"bf16"``, or ``"int8"`` or ``"fp8"`` (e4m3) with one scale per output channel and expert.

    Returns:
        packed [E, F, C] and None, or packed codes and their scale [E, F].

    Raises:
        ValueError: The number of rows does not belong to these heads, or there is no such format.
    """
    rows = (num_heads_q + 2 * num_heads_kv) * head_dim
    if weight.shape[0] != experts * (rows + num_heads_q):
        raise ValueError(
            f"weight must have {experts} x {rows + num_heads_q} rows for {experts} experts of {num_heads_q} query and "
            f"{num_heads_kv} key/value heads of {head_dim}, got {list(weight.shape)}"
        )
    order = _row_order(num_heads_q, num_heads_kv, head_dim).to(weight.device)
    permuted = weight.unflatten(0, (experts, -1))[:, order].flatten(0, 1)
    return pack_linear(permuted, experts, to, pad_f_to=head_dim)


@torch.no_grad()
def pack_qk_norm(q_norm: torch.Tensor, k_norm: torch.Tensor, *, experts: int) -> torch.Tensor:
    """q and k norm weights, [E * D] each -> [E, 2, D], channels permuted like the weight's rows."""
    both = torch.stack([norm.unflatten(0, (experts, -1)) for norm in (q_norm, k_norm)], dim=1)
    return both[..., rotary_permutation(both.shape[-1]).to(both.device)].contiguous()


def pack_cos_sin(phases: torch.Tensor) -> torch.Tensor:
    """[N, 6B] sines then cosines -> [N, D = 8B] float32: a cosine per adjacent pair, then a sine per pair.

    The last B pairs are not rotated: cosine 1, sine 0.
    """
    half = phases.shape[1] // 2
    sin, cos = phases.float().split(half, dim=1)
    return torch.cat([pad(cos, (0, half // 3), value=1.0), pad(sin, (0, half // 3))], dim=1)


@torch.no_grad()
def static_qk_scale(qk_norm: torch.Tensor) -> torch.Tensor:
    """[E, 2, D] -> [E, 2]: the scale that no normalised q or k can exceed, sqrt(D) * max|1 + w| / 448.

    A row of RMS 1 has length sqrt(D), and a rotation keeps it; eps only shortens it.
    """
    return (qk_norm.float() + 1).abs().amax(dim=2) * (math.sqrt(qk_norm.shape[2]) / E4M3_MAX)


def _row_order(num_heads_q: int, num_heads_kv: int, head_dim: int) -> torch.Tensor:
    """Packed row -> published row of one expert, without the padding."""
    rotated = (num_heads_q + num_heads_kv) * head_dim
    heads = torch.arange(0, rotated, head_dim)[:, None] + rotary_permutation(head_dim)
    return torch.cat([heads.flatten(), torch.arange(rotated, rotated + num_heads_kv * head_dim + num_heads_q)])
