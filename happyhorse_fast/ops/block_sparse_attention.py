"""Block-sparse attention behind torch.library: checks, result shapes, and the choice of the implementation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from happyhorse_fast.block_map import BLOCK, BlockMap
from happyhorse_fast.ops.checks import require, require_backend
from happyhorse_fast.reference.score_bound import score_limit, scores_fit
from happyhorse_fast.reference.sparse_attention import output_scale, sparse_attention

HEAD_DIMS = (32, 64, 128)
Results = tuple[Tensor, Tensor, Tensor]


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    *,
    scale: float,
    bound: float | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    gate: Tensor | None = None,
    fp8_out: bool = False,
    return_lse: bool = False,
    backend: str = "triton",
) -> Results:
    """Softmax attention of every query over the union of its row's blocks; query head h reads head h // (Hq / Hkv).

    Three formats: bf16; q and k int8 with v bf16; q, k and v e4m3. Rounding points: docs/OPS.md. The map is trusted:
    one that :meth:`BlockMap.validate` would refuse reads out of bounds.

    Where v is bf16 and every score is known to be small enough (`reference.score_bound`), the softmax needs no running
    maximum, which is faster. The result is as exact either way.

    Args:
        q: [N, Hq, D], D 32, 64 or 128, any strides; bf16, int8 codes, or e4m3 codes.
        k: [M, Hkv, D], any strides, of q's dtype.
        v: bf16 [M, Hkv, D], any strides; or e4m3 [Hkv, D, S * 128], transposed, tokens in
            `reference.quantize.fragment_order`, finite past key M.
        block_map: N queries and M keys, for one head or Hkv heads; S = ceil(M / 128), R = ceil(N / 128).
        scale: Softmax scale, positive.
        bound: Promise that |scale * q.k| * log2(e), plus log2(max|v| / 256) where that is positive, is at most this for
            every query and key (`score_bound.norm_bound` has it from weights); a wrong one can overflow, and a max|v|
            below 2^-17 lose bits. inf: nothing
            is known, a running maximum is kept. None: in bf16 it is found on the device, without waiting for it; in
            int8 as inf. Without meaning where v is e4m3, whose P needs the maximum.
        q_scale: float32 [N, Hq] with int8 q: value = code * q_scale[i, h]; [R] with e4m3 q: code * q_scale[i // 128].
        k_scale: float32 [Hkv, S] with int8 k: value = code * k_scale[h, j // 128]; [S] with e4m3 k.
        v_scale: float32 [Hkv, S], with e4m3 v.
        gate: float32 [N, Hq], multiplies the normalised output.
        fp8_out: e4m3 output with one scale, rather than bf16.
        return_lse: Whether the log-sum-exp is wanted.
        backend: ``"triton"``; ``"cuda"``, which takes bf16 alone, with contiguous channels (last stride 1) and every
            head's rows aligned to 16 bytes; or ``"reference"`` for plain torch with the same rounding points.

    Returns:
        out [N, Hq, D]; out_scale float32 [1], max|v| * max|gate| / 448, size [0] without ``fp8_out``; LSE float32
        [Hq, N], natural log of the scaled scores, size [0] without ``return_lse``. A row without a key: 0 and -inf.

    Raises:
        TypeError: A tensor of another dtype than listed, or no BlockMap.
        ValueError: Another shape, device, layout or value; the message names it, what came and what is allowed.
    """
    require_backend(backend, ("triton", "cuda", "reference"))
    if not isinstance(block_map, BlockMap):
        raise TypeError(f"block_map must be a BlockMap, such as BlockMap.dense(N, M); got {type(block_map).__name__}")
    _check(q, k, v, block_map, scale, bound, q_scale, k_scale, v_scale, gate)
    tensors = block_map.tensors()
    bounded = v.dtype == torch.bfloat16 and bound is not None and bound <= score_limit(k.shape[0])
    flag = scores_fit(q, k, v, scale) if bound is None and q.dtype == torch.bfloat16 else None
    out_scale = output_scale(v, v_scale, gate) if fp8_out else None
    if backend == "cuda":
        if q.dtype != torch.bfloat16:
            raise ValueError(
                f"q, k and v must be bfloat16 for backend 'cuda', got q {q.dtype}, k {k.dtype}, v {v.dtype}"
            )
        from happyhorse_fast.ops.cuda import block_sparse_attention as cuda

        out, lse = cuda.block_sparse_attention(q, k, v, *tensors, scale, bounded, flag, gate, out_scale, return_lse)
    else:
        op: Any = _reference
        if backend == "triton":
            from happyhorse_fast.ops.triton import block_sparse_attention as triton

            op = triton.block_sparse_attention
        options = (scale, bounded, flag, q_scale, k_scale, v_scale, gate, out_scale, return_lse)
        out, lse = op(q, k, v, *tensors, *options)
    return out, q.new_empty(0, dtype=torch.float32) if out_scale is None else out_scale, lse


def empty_results(q: Tensor, fp8_out: bool, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Unwritten (out, lse) of the shapes and dtypes that every implementation gives."""
    n, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=torch.float8_e4m3fn if fp8_out else torch.bfloat16, device=q.device)
    return out, torch.empty((heads, n) if return_lse else (0,), dtype=torch.float32, device=q.device)


@torch.library.custom_op("happyhorse_fast::block_sparse_attention_reference", mutates_args=())
def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    starts: Tensor,
    columns: Tensor,
    mask_ids: Tensor,
    mask_bits: Tensor,
    order: Tensor,
    scale: float,
    bounded: bool,
    flag: Tensor | None,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    gate: Tensor | None,
    out_scale: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    block_map = BlockMap(counts, starts, columns, mask_ids, mask_bits, order, queries=q.shape[0], keys=k.shape[0])
    return sparse_attention(
        q,
        k,
        v,
        block_map,
        scale=scale,
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
        gate=gate,
        bounded=bounded if flag is None else bool(flag),
        out_scale=out_scale,
        return_lse=return_lse,
    )


@_reference.register_fake
def fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes alone; arguments as the op's, the last two out_scale and return_lse."""
    return empty_results(q, rest[-2] is not None, rest[-1])


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    scale: float,
    bound: float | None,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    gate: Tensor | None,
) -> None:
    fp8 = torch.float8_e4m3fn
    for name, x in (("q", q), ("k", k), ("v", v)):
        allowed = (torch.bfloat16, fp8) if name == "v" else (torch.bfloat16, torch.int8, fp8)
        if x.dtype not in allowed:
            raise TypeError(f"{name} must be {' or '.join(str(a)[6:] for a in allowed)}, got {x.dtype}")
        if x.dim() != 3:
            raise ValueError(f"{name} must have 3 dimensions, got {list(x.shape)}")
    if k.dtype != q.dtype:
        raise TypeError(f"k must be of q's dtype {q.dtype}, got {k.dtype}")
    if (v.dtype == fp8) != (q.dtype == fp8):
        wanted_v = "float8_e4m3fn where q and k are (for 8-bit q and k with v in bfloat16: int8)"
        raise TypeError(f"v must be {wanted_v if q.dtype == fp8 else f'bfloat16 where q is {q.dtype}'}, got {v.dtype}")
    n, heads_q, d = q.shape
    m, heads_kv, _ = k.shape
    if d not in HEAD_DIMS:
        raise ValueError(f"q must have a head dim of {', '.join(map(str, HEAD_DIMS))}; got {d} in {list(q.shape)}")
    if k.shape[2] != d or heads_kv < 1 or heads_q < 1 or heads_q % heads_kv:
        raise ValueError(
            f"k must be [M, Hkv, {d}] with Hkv a divisor of q's {heads_q} heads, got {list(k.shape)} "
            f"with q {list(q.shape)}"
        )
    key_blocks, rows = -(-m // BLOCK), -(-n // BLOCK)
    wanted = (heads_kv, d, key_blocks * BLOCK) if v.dtype == fp8 else (m, heads_kv, d)
    if tuple(v.shape) != wanted:
        raise ValueError(f"v must be {list(wanted)} in {v.dtype} with k {list(k.shape)}, got {list(v.shape)}")
    if (block_map.queries, block_map.keys) != (n, m):
        raise ValueError(
            f"block_map must be of q's {n} queries and k's {m} keys, got {block_map.queries} and {block_map.keys}"
        )
    if block_map.heads not in (1, heads_kv):
        raise ValueError(f"block_map must have 1 or k's {heads_kv} heads, got {block_map.heads}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    if bound is not None and not bound >= 0:
        raise ValueError(f"bound must be None or at least 0, in powers of two, got {bound}")
    by_head = q.dtype == torch.int8
    scales: tuple[tuple[str, Tensor | None, tuple[int, ...], str, Tensor], ...] = (
        ("q_scale", q_scale, (n, heads_q) if by_head else (rows,), "q", q),
        ("k_scale", k_scale, (heads_kv, key_blocks) if by_head else (key_blocks,), "k", k),
        ("v_scale", v_scale, (heads_kv, key_blocks), "v", v),
    )
    for name, value, _, of, tensor in scales:
        if (value is not None) != (tensor.dtype != torch.bfloat16):
            came = "none" if value is None else f"one of shape {list(value.shape)}"
            raise ValueError(f"{name} must be given exactly where {of} has 8 bits; {of} is {tensor.dtype}, got {came}")
    if k.device != q.device or v.device != q.device or block_map.device != q.device:
        raise ValueError(
            f"k, v and block_map must be on q's device {q.device}, got {k.device}, {v.device} and {block_map.device}"
        )
    for name, value, shape in (*((s[0], s[1], s[2]) for s in scales), ("gate", gate, (n, heads_q))):
        if value is not None:
            require(name, value, (torch.float32,), shape, device=q.device)
