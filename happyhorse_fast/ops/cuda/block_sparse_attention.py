"""Launcher of the CUDA kernel of block-sparse attention, as a torch.library op.

Shapes are those of ops/block_sparse_attention.py, which checks the arguments; the kernel takes bf16 alone.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from happyhorse_fast.block_map import BLOCK
from happyhorse_fast.ops.block_sparse_attention import empty_results, fake
from happyhorse_fast.ops.cuda.arguments import address, require_vectors
from happyhorse_fast.ops.cuda.launch import launch

STEM = "block_sparse_attention"
# Of csrc/device/block_sparse_attention.cu: 8 warps, and a block of 128 rows of bf16 each of q, k and v.
THREADS = 256
SHARED_BYTES_PER_CHANNEL = 3 * BLOCK * 2
VECTOR = 8  # bf16 of 16 bytes


class BlockSparseAttentionParams(ctypes.Structure):
    """`BlockSparseAttentionParams` of csrc/device/block_sparse_attention.cu."""

    _fields_ = [
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_scale", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("mask_ids", ctypes.c_void_p),
        ("mask_bits", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
        ("flag", ctypes.c_void_p),
        ("q_token", ctypes.c_int64),
        ("q_head", ctypes.c_int64),
        ("k_token", ctypes.c_int64),
        ("k_head", ctypes.c_int64),
        ("v_token", ctypes.c_int64),
        ("v_head", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("queries", ctypes.c_int),
        ("keys", ctypes.c_int),
        ("map_rows", ctypes.c_int),
        ("heads_q", ctypes.c_int),
        ("heads_kv", ctypes.c_int),
        ("map_heads", ctypes.c_int),
    ]


@torch.library.custom_op("happyhorse_fast::block_sparse_attention_cuda", mutates_args=())
def block_sparse_attention(
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
    gate: Tensor | None,
    out_scale: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`happyhorse_fast.ops.block_sparse_attention.block_sparse_attention`; without the scales of 8 bits.

    Raises:
        ValueError: q, k or v has channels apart, or rows that are not aligned to 16 bytes.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(2) != 1:
            raise ValueError(
                f"{name} must have contiguous channels (a last stride of 1) for backend 'cuda', "
                f"got strides {list(x.stride())}"
            )
    require_vectors(VECTOR, q=q, k=k, v=v)
    require_vectors(BLOCK // 32, mask_bits=mask_bits)
    out, lse = empty_results(q, out_scale is not None, return_lse)
    n, heads_q, d = q.shape
    m, heads_kv, _ = k.shape
    map_heads, map_rows = starts.shape
    params = BlockSparseAttentionParams(
        q=address(q),
        k=address(k),
        v=address(v),
        out=address(out),
        out_scale=address(out_scale),
        lse=address(lse),
        counts=address(counts),
        starts=address(starts),
        columns=address(columns),
        mask_ids=address(mask_ids),
        mask_bits=address(mask_bits),
        order=address(order),
        gate=address(gate),
        flag=address(flag),
        q_token=q.stride(0),
        q_head=q.stride(1),
        k_token=k.stride(0),
        k_head=k.stride(1),
        v_token=v.stride(0),
        v_head=v.stride(1),
        scale=scale * math.log2(math.e),
        queries=n,
        keys=m,
        map_rows=map_rows,
        heads_q=heads_q,
        heads_kv=heads_kv,
        map_heads=map_heads,
    )
    grid = (map_rows * heads_q, 1, 1)
    for form in (bounded,) if flag is None else (True, False):
        kernel = f"{STEM}_d{d}{'_bounded' if form else ''}"
        launch(STEM, kernel, params, grid, THREADS, SHARED_BYTES_PER_CHANNEL * d, q)
    return out, lse


block_sparse_attention.register_fake(fake)
