"""Attention over ranges of keys, one softmax over their union, without a [tokens, tokens] matrix."""

from __future__ import annotations

import itertools

import torch

from happyhorse_fast import ambient
from happyhorse_fast.eager.float32 import matmul
from happyhorse_fast.eager.sequence import Ranges

# Bytes of scores that one chunk of queries may take: 256 MiB keeps eager attention small beside the weights.
SCORE_BYTES = 256 << 20


def segments_of(ranges: Ranges, total: int) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """Disjoint runs of queries with the sorted, merged ranges of keys they attend to.

    Args:
        ranges: Rows (q_start, q_end, k_start, k_end); rows that share queries are united, an overlap counts once.
        total: Tokens N; every token is in exactly one run, with an empty list where no range names it.

    Raises:
        ValueError: A range is reversed or leaves 0..N.
    """
    for row in ranges:
        q0, q1, k0, k1 = row
        if not (0 <= q0 <= q1 <= total and 0 <= k0 <= k1 <= total):
            raise ValueError(f"ranges must satisfy 0 <= start <= end <= {total}, got (q0, q1, k0, k1) = {tuple(row)}")
    cuts = sorted({0, total, *(q for row in ranges for q in row[:2])})
    segments = []
    for start, end in itertools.pairwise(cuts):
        keys: list[tuple[int, int]] = []
        for k0, k1 in sorted((r[2], r[3]) for r in ranges if r[0] <= start and end <= r[1] and r[2] < r[3]):
            if keys and k0 <= keys[-1][1]:
                keys[-1] = (keys[-1][0], max(k1, keys[-1][1]))
            else:
                keys.append((k0, k1))
        segments.append((start, end, keys))
    return segments


@ambient.independent
def block_sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranges: Ranges, *, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of every query over the union of its key ranges.

    Scores, softmax and the weighted sum are computed in float32 (float64 for float64 inputs) in chunks of queries.

    Args:
        q: [N, Hq, D].
        k: [N, Hkv, D]; Hkv divides Hq, head h of q reads head h // (Hq / Hkv).
        v: [N, Hkv, D].
        ranges: Rows (q_start, q_end, k_start, k_end), half open.
        scale: Softmax scale, D^-0.5 where None.

    Returns:
        out [N, Hq, D] in the dtype of ``q``, and the log-sum-exp [Hq, N] of the scaled scores in the wide dtype. A
        query with no key gives 0 and -inf.
    """
    n, hq, d = q.shape
    hkv = k.shape[1]
    scale = d**-0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros_like(q)
    lse = torch.full((hq, n), -torch.inf, dtype=wide, device=q.device)
    for start, end, spans in segments_of(ranges, n):
        if not spans:
            continue
        keys = torch.cat([k[a:b] for a, b in spans]).to(wide).permute(1, 2, 0)  # [Hkv, D, K]
        values = torch.cat([v[a:b] for a, b in spans]).to(wide).transpose(0, 1)  # [Hkv, K, D]
        rows = max(1, SCORE_BYTES // (hq * keys.shape[2] * wide.itemsize))
        for first in range(start, end, rows):
            part = slice(first, min(first + rows, end))
            queries = q[part].to(wide).unflatten(1, (hkv, hq // hkv)).permute(1, 2, 0, 3).flatten(1, 2)  # [Hkv, G*M, D]
            scores = matmul(queries, keys) * scale
            lse[:, part] = scores.logsumexp(dim=-1).reshape(hq, -1)
            result = matmul(scores.softmax(dim=-1), values).unflatten(1, (hq // hkv, -1))  # [Hkv, G, M, D]
            out[part] = result.permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)
    return out, lse


@ambient.independent
def fused_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranges: Ranges) -> torch.Tensor:
    """The same attention through PyTorch's fused kernels, which take 16-bit tensors on a GPU; shapes as above."""
    out = torch.zeros_like(q)
    for start, end, spans in segments_of(ranges, q.shape[0]):
        if spans:
            parts = (q[start:end], torch.cat([k[a:b] for a, b in spans]), torch.cat([v[a:b] for a, b in spans]))
            query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in parts)
            result = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
            out[start:end] = result[0].transpose(0, 1)
    return out
