"""Block-sparse attention; docs/OPS.md states every tensor, layout and rounding point."""

from __future__ import annotations

import torch
from torch import Tensor

from happyhorse_fast.block_map import BlockMap
from happyhorse_fast.ops.attention import cuda, reference
from happyhorse_fast.ops.attention.contract import EIGHT_BIT, BlockSparseAttention
from happyhorse_fast.ops.attention.reference import output_scale
from happyhorse_fast.ops.attention.score_bound import score_limit, scores_fit
from happyhorse_fast.ops.runtime.checks import require, require_backend


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
    out_scale: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention of every query over the union of its row's blocks; query head h reads head h // (Hq / Hkv).

    Four formats: bf16; q and k int8 with v bf16 or e4m3; q, k and v e4m3. Rounding points: docs/OPS.md. The map is
    trusted: one that :meth:`BlockMap.validate` would refuse reads out of bounds.

    Where v is bf16 and every score is known to be small enough (`score_bound`), the softmax needs no running
    maximum, which is faster. The result is as exact either way.

    Args:
        q: [N, Hq, D], D 32, 64 or 128, any strides; bf16, int8 codes, or e4m3 codes.
        k: [M, Hkv, D], any strides, of q's dtype.
        v: bf16 [M, Hkv, D], any strides; or e4m3 [Hkv, D, S * 128], transposed, tokens in
            `ops.quantize.fragment_order`, finite past key M.
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
        out_scale: float32 [1], that scale where more heads than these share it; found of v and gate where None.
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
    scales, tensors = (q_scale, k_scale, v_scale), block_map.tensors()
    given = BlockSparseAttention(q, k, v, *tensors, scale, False, None, *scales, gate, None, return_lse)
    given.check(block_map, bound)
    bounded = v.dtype == torch.bfloat16 and bound is not None and bound <= score_limit(k.shape[0])
    flag = scores_fit(q, k, v, scale) if bound is None and q.dtype == torch.bfloat16 else None
    if out_scale is not None:
        require("out_scale", out_scale, (torch.float32,), (1,), device=q.device)
        if not fp8_out:
            raise ValueError("out_scale must be None without fp8_out: bf16 output has no scale")
    elif fp8_out:
        out_scale = output_scale(v, v_scale, gate)
    given = BlockSparseAttention(q, k, v, *tensors, scale, bounded, flag, *scales, gate, out_scale, return_lse)
    if backend == "cuda":
        if q.dtype != torch.bfloat16:
            raise ValueError(
                f"q, k and v must be bfloat16 for backend 'cuda', got q {q.dtype}, k {k.dtype}, v {v.dtype}"
            )
        out, lse = cuda.block_sparse_attention(*given.values(without=EIGHT_BIT))
    elif backend == "triton":
        from happyhorse_fast.ops.attention import triton

        out, lse = triton.block_sparse_attention(*given.values())
    else:
        out, lse = reference.block_sparse_attention(*given.values())
    return out, q.new_empty(0, dtype=torch.float32) if out_scale is None else out_scale, lse
