"""The arguments and results of block-sparse attention; docs/OPS.md states every tensor and rounding point."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from happyhorse_fast.block_map import BLOCK, BlockMap
from happyhorse_fast.ops.quantize import ATTENTION
from happyhorse_fast.ops.runtime.checks import HEAD_DIMS, require, require_scale
from happyhorse_fast.ops.runtime.operation import Arguments

EIGHT_BIT = ("q_scale", "k_scale", "v_scale")
"""Arguments of the formats of 8 bits, which the CUDA kernel does not have."""


@dataclass(frozen=True)
class BlockSparseAttention(Arguments):
    """Arguments of attention's ops: those of :func:`ops.attention.op.block_sparse_attention`, the map as its tensors.

    Attributes:
        bounded: Whether the softmax goes without a running maximum.
        flag: int32 [1], where the device finds out: both forms are launched, 1 lets the bounded one compute, 0 the
            other. Else None.
        out_scale: float32 [1] of e4m3 output, else None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    counts: Tensor
    starts: Tensor
    columns: Tensor
    mask_ids: Tensor
    mask_bits: Tensor
    order: Tensor
    scale: float
    bounded: bool
    flag: Tensor | None
    q_scale: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    gate: Tensor | None
    out_scale: Tensor | None
    return_lse: bool

    def check(self, block_map: BlockMap, bound: float | None) -> None:
        """Hold the arguments, and those that some are made of, against the contract."""
        q, k, v, scale = self.q, self.k, self.v, self.scale
        fp8 = torch.float8_e4m3fn
        for name, x in (("q", q), ("k", k), ("v", v)):
            allowed = (torch.bfloat16, fp8) if name == "v" else (torch.bfloat16, torch.int8, fp8)
            if x.dtype not in allowed:
                raise TypeError(f"{name} must be {' or '.join(str(a)[6:] for a in allowed)}, got {x.dtype}")
            if x.dim() != 3:
                raise ValueError(f"{name} must have 3 dimensions, got {list(x.shape)}")
        if k.dtype != q.dtype:
            raise TypeError(f"k must be of q's dtype {q.dtype}, got {k.dtype}")
        if (q.dtype, v.dtype) not in ATTENTION.values():
            wanted_v = "float8_e4m3fn where q and k are (for 8-bit q and k with v in bfloat16: int8)"
            raise TypeError(
                f"v must be {wanted_v if q.dtype == fp8 else f'bfloat16 where q is {q.dtype}'}, got {v.dtype}"
            )
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
        if k.device != q.device or v.device != q.device or block_map.device != q.device:
            raise ValueError(
                f"k, v and block_map must be on q's device {q.device}, "
                f"got {k.device}, {v.device} and {block_map.device}"
            )
        by_head = q.dtype == torch.int8
        require_scale("q_scale", self.q_scale, "q", q, (n, heads_q) if by_head else (rows,))
        require_scale("k_scale", self.k_scale, "k", k, (heads_kv, key_blocks) if by_head else (key_blocks,))
        require_scale("v_scale", self.v_scale, "v", v, (heads_kv, key_blocks))
        if self.gate is not None:
            require("gate", self.gate, (torch.float32,), (n, heads_q), device=q.device)

    def empty(self) -> tuple[Tensor, Tensor]:
        """out [N, Hq, D] and LSE [Hq, N], or [0]."""
        n, heads, _ = self.q.shape
        dtype = torch.bfloat16 if self.out_scale is None else torch.float8_e4m3fn
        out = torch.empty(self.q.shape, dtype=dtype, device=self.q.device)
        shape = (heads, n) if self.return_lse else (0,)
        return out, torch.empty(shape, dtype=torch.float32, device=self.q.device)
