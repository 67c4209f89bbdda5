"""The choice of a dynamic block map: which blocks of keys a block of queries attends to."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from happyhorse_fast.block_map import BlockMap, BlockSelector
from happyhorse_fast.block_map.dynamic import amount
from happyhorse_fast.ops.block_selection import cuda, reference
from happyhorse_fast.ops.block_selection.contract import SelectBlocks
from happyhorse_fast.ops.runtime.checks import require_backend


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

    Blocks of audio and text are kept besides those that are chosen. By ``mass``, the fewest blocks that hold it are, of
    a softmax over the blocks that are not always kept, in integers of 2^-30 of the best block's weight and at least 1:
    1 keeps every block. Of equal scores the one of the lower block is the larger. All backends choose the same blocks,
    but for scores that differ by their rounding alone.

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
    counts = amount(q, k, selector.base.keys, keep, mass, pool)
    given = SelectBlocks(q, k, *selector.tensors(), q_scale, k_scale, *counts, pool == "mean")
    given.check()
    op = cuda.select_blocks if backend == "cuda" else reference.select_blocks
    if backend == "triton":
        from happyhorse_fast.ops.block_selection import triton

        op = triton.select_blocks
    return selector.base.within(op(*given.values()))
