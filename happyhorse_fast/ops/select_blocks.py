"""The choice of a dynamic block map behind torch.library: checks, result shapes, and the choice of implementation."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from happyhorse_fast.block_map import BlockMap, BlockSelector
from happyhorse_fast.block_map.dynamic import Parts, choose
from happyhorse_fast.ops.checks import require, require_backend

HEAD_DIMS = (32, 64, 128)
MOST_BLOCKS = 2048
"""Blocks of keys that one program holds: 262,144 tokens; 15 s at 1080p are 1,464 blocks."""
LAUNCHES = {
    "happyhorse_fast::select_blocks": 3,
    "happyhorse_fast::select_blocks_cuda": 4,
    "happyhorse_fast::select_blocks_reference": 3,
}
"""Kernels an op stands for, where that is not one: means, choice, order; in CUDA the scores apart from the choice. The
reference, which is counted in the kernels' place on a machine without a GPU, counts as what it stands in for."""


def select_blocks(
    q: Tensor,
    k: Tensor,
    selector: BlockSelector,
    *,
    keep: int | None = None,
    mass: float | None = None,
    pool: Literal["max", "mean"] = "max",
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    backend: str = "triton",
) -> BlockMap:
    """Per key/value head and block of queries, the blocks of keys of largest pooled score; no wait for the device.

    :meth:`BlockSelector.top_k` (``keep``) and :meth:`BlockSelector.top_p` (``mass``) say what is chosen; all backends
    choose the same blocks, but for scores that differ by their rounding alone.

    Args:
        q: [N, Hq, D], D 32, 64 or 128, any strides; bf16, or codes of int8 or e4m3. Slots without a token are not read.
        k: [N, Hkv, D], any strides, of q's dtype.
        selector: Of N slots, at most 2048 blocks.
        keep: Blocks per row, at least 1.
        mass: Share of the softmax to reach, 0 < mass <= 1, in steps of 2^-20.
        pool: How the scores of a group's query heads become one.
        q_scale: float32 [N, Hq] with int8 q: value = code * q_scale[i, h]; [S] with e4m3 q: code * q_scale[i // 128].
        k_scale: float32 [Hkv, S] with int8 k: value = code * k_scale[h, i // 128]; [S] with e4m3 k.
        backend: ``"triton"``, ``"cuda"``, or ``"reference"`` for plain torch.

    Returns:
        A map of Hkv heads within the selector's base; row h * R + r starts at (h * R + r) * S.

    Raises:
        TypeError: A tensor of another dtype than listed.
        ValueError: Another shape, device or value; the message names it, what came and what is allowed.
    """
    require_backend(backend, ("triton", "cuda", "reference"))
    amount = selector.amount(q, k, keep, mass, pool)
    _check(q, k, selector, q_scale, k_scale)
    arguments = (q, k, *selector.tensors(), q_scale, k_scale, *amount, pool == "mean")
    if backend == "reference":
        return selector.block_map(_reference(*arguments))
    if backend == "cuda":
        from happyhorse_fast.ops.cuda import select_blocks as cuda

        return selector.block_map(cuda.select_blocks(*arguments))
    from happyhorse_fast.ops.triton import select_blocks as triton

    return selector.block_map(triton.select_blocks(*arguments))


def empty_results(k: Tensor, table: Tensor) -> Parts:
    """Unwritten (counts, starts, columns, mask_ids, order) of the shapes that every implementation gives, int32."""
    heads, rows, blocks = k.shape[1], *table.shape
    shapes = ((heads, rows, 2), (heads, rows), (heads * rows * blocks,), (heads * rows * blocks,), (heads * rows,))
    counts, starts, columns, mask_ids, order = (torch.empty(s, dtype=torch.int32, device=k.device) for s in shapes)
    return counts, starts, columns, mask_ids, order


@torch.library.custom_op("happyhorse_fast::select_blocks_reference", mutates_args=())
def _reference(
    q: Tensor,
    k: Tensor,
    table: Tensor,
    prefix: Tensor,
    live: Tensor,
    inverse: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    keep: int,
    mass: int,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return choose(q, k, table, prefix, live, inverse, q_scale, k_scale, keep, mass, mean)


@_reference.register_fake
def fake(q: Tensor, k: Tensor, table: Tensor, *_: Any) -> Parts:
    """Shapes and dtypes alone; arguments as the op's."""
    return empty_results(k, table)


def _check(q: Tensor, k: Tensor, selector: BlockSelector, q_scale: Tensor | None, k_scale: Tensor | None) -> None:
    fp8 = torch.float8_e4m3fn
    if q.dtype not in (torch.bfloat16, torch.int8, fp8):
        raise TypeError(f"q must be bfloat16, int8 or float8_e4m3fn, got {q.dtype}")
    if k.dtype != q.dtype:
        raise TypeError(f"k must be of q's dtype {q.dtype}, got {k.dtype}")
    if q.shape[2] not in HEAD_DIMS:
        raise ValueError(f"q must have a head dim of 32, 64 or 128; got {q.shape[2]} in {list(q.shape)}")
    blocks = len(selector.prefix)
    if blocks > MOST_BLOCKS or k.shape[1] * blocks**2 >= 2**31:
        raise ValueError(
            f"selector must have at most {MOST_BLOCKS} blocks and fewer than 2**31 over k's heads, "
            f"got {blocks} blocks and {k.shape[1]} heads"
        )
    if k.device != q.device or selector.base.device != q.device:
        raise ValueError(f"k and selector must be on q's device {q.device}, got {k.device} and {selector.base.device}")
    by_head = q.dtype == torch.int8
    scales = (
        ("q_scale", q_scale, tuple(q.shape[:2]) if by_head else (blocks,)),
        ("k_scale", k_scale, (k.shape[1], blocks) if by_head else (blocks,)),
    )
    for name, value, shape in scales:
        if (value is not None) != (q.dtype != torch.bfloat16):
            came = "none" if value is None else f"one of shape {list(value.shape)}"
            raise ValueError(f"{name} must be given exactly where q and k have 8 bits; they are {q.dtype}, got {came}")
        if value is not None:
            require(name, value, (torch.float32,), shape, device=q.device)
