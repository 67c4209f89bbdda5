"""The arguments and results of the choice of a dynamic block map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from happyhorse_fast.block_map.dynamic import Parts
from happyhorse_fast.ops.runtime.checks import HEAD_DIMS, require_scale
from happyhorse_fast.ops.runtime.operation import Arguments

MOST_BLOCKS = 2048
"""Blocks of keys that one program holds: 262,144 tokens; 15 s at 1080p are 1,464 blocks."""
LAUNCHES = {
    "happyhorse_fast::select_blocks": 3,
    "happyhorse_fast::select_blocks_cuda": 4,
    "happyhorse_fast::select_blocks_reference": 3,
}
"""Kernels an op stands for, where that is not one: means, choice, order; in CUDA the scores apart from the choice. The
reference, which is counted in the kernels' place on a machine without a GPU, counts as what it stands in for."""


@dataclass(frozen=True)
class SelectBlocks(Arguments):
    """Arguments of the choice's ops: `block_map.dynamic.choose` states them."""

    q: Tensor
    k: Tensor
    table: Tensor
    prefix: Tensor
    live: Tensor
    inverse: Tensor
    q_scale: Tensor | None
    k_scale: Tensor | None
    keep: int
    mass: int
    mean: bool

    def check(self) -> None:
        """Hold what `block_map.dynamic.amount` does not know against the contract."""
        q, k, fp8 = self.q, self.k, torch.float8_e4m3fn
        if q.dtype not in (torch.bfloat16, torch.int8, fp8):
            raise TypeError(f"q must be bfloat16, int8 or float8_e4m3fn, got {q.dtype}")
        if k.dtype != q.dtype:
            raise TypeError(f"k must be of q's dtype {q.dtype}, got {k.dtype}")
        if q.shape[2] not in HEAD_DIMS:
            raise ValueError(f"q must have a head dim of 32, 64 or 128; got {q.shape[2]} in {list(q.shape)}")
        blocks = len(self.prefix)
        if blocks > MOST_BLOCKS or k.shape[1] * blocks**2 >= 2**31:
            raise ValueError(
                f"selector must have at most {MOST_BLOCKS} blocks and fewer than 2**31 over k's heads, "
                f"got {blocks} blocks and {k.shape[1]} heads"
            )
        if k.device != q.device or self.table.device != q.device:
            raise ValueError(f"k and selector must be on q's device {q.device}, got {k.device} and {self.table.device}")
        by_head = q.dtype == torch.int8
        require_scale("q_scale", self.q_scale, "q", q, q.shape[:2] if by_head else (blocks,))
        require_scale("k_scale", self.k_scale, "k", k, (k.shape[1], blocks) if by_head else (blocks,))

    def empty(self) -> Parts:
        """counts, starts, columns, mask_ids, order, int32."""
        return empty_results(self.k, self.table)


def empty_results(k: Tensor, table: Tensor) -> Parts:
    """Unwritten (counts, starts, columns, mask_ids, order) of the shapes that every implementation gives, int32."""
    heads, rows, blocks = k.shape[1], *table.shape
    shapes = ((heads, rows, 2), (heads, rows), (heads * rows * blocks,), (heads * rows * blocks,), (heads * rows,))
    counts, starts, columns, mask_ids, order = (torch.empty(s, dtype=torch.int32, device=k.device) for s in shapes)
    return counts, starts, columns, mask_ids, order
