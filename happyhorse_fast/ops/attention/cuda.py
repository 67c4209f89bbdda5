"""Launcher of the CUDA kernel of block-sparse attention, which takes bf16 alone; its arguments were checked."""

from __future__ import annotations

import math

from torch import Tensor

from happyhorse_fast.block_map import BLOCK
from happyhorse_fast.ops.attention.contract import EIGHT_BIT, BlockSparseAttention
from happyhorse_fast.ops.runtime.cuda.launch import launch
from happyhorse_fast.ops.runtime.cuda.parameters import require_vectors, struct
from happyhorse_fast.ops.runtime.operation import custom_op

STEM = "block_sparse_attention"
# Of csrc/device/block_sparse_attention.cu: 8 warps, and a block of 128 rows of bf16 each of q, k and v.
THREADS = 256
SHARED_BYTES_PER_CHANNEL = 3 * BLOCK * 2
VECTOR = 8  # bf16 of 16 bytes
BlockSparseAttentionParams = struct("BlockSparseAttentionParams", "block_sparse_attention.cu")


@custom_op("block_sparse_attention_cuda", BlockSparseAttention, without=EIGHT_BIT)
def block_sparse_attention(given: BlockSparseAttention) -> tuple[Tensor, Tensor]:
    """Launch the kernel, in both forms of the softmax where there is a flag.

    Raises:
        ValueError: q, k or v has channels apart, or rows that are not aligned to 16 bytes.
    """
    q, k, v = given.q, given.k, given.v
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(2) != 1:
            raise ValueError(
                f"{name} must have contiguous channels (a last stride of 1) for backend 'cuda', "
                f"got strides {list(x.stride())}"
            )
    require_vectors(VECTOR, q=q, k=k, v=v)
    require_vectors(BLOCK // 32, mask_bits=given.mask_bits)
    out, lse = given.empty()
    n, heads_q, d = q.shape
    m, heads_kv, _ = k.shape
    map_heads, map_rows = given.starts.shape
    params = BlockSparseAttentionParams.of(
        given,
        out=out,
        lse=lse,
        q_token=q.stride(0),
        q_head=q.stride(1),
        k_token=k.stride(0),
        k_head=k.stride(1),
        v_token=v.stride(0),
        v_head=v.stride(1),
        scale=given.scale * math.log2(math.e),
        queries=n,
        keys=m,
        map_rows=map_rows,
        heads_q=heads_q,
        heads_kv=heads_kv,
        map_heads=map_heads,
    )
    grid = (map_rows * heads_q, 1, 1)
    for form in (given.bounded,) if given.flag is None else (True, False):
        kernel = f"{STEM}_d{d}{'_bounded' if form else ''}"
        launch(STEM, kernel, params, grid, THREADS, SHARED_BYTES_PER_CHANNEL * d, q)
    return out, lse
