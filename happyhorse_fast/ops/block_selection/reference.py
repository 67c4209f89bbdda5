"""The choice of blocks in plain torch, which is the block map's own."""

from __future__ import annotations

from happyhorse_fast.block_map.dynamic import Parts, choose
from happyhorse_fast.ops.block_selection.contract import SelectBlocks
from happyhorse_fast.ops.runtime.operation import reference_op


@reference_op(SelectBlocks)
def select_blocks(given: SelectBlocks) -> Parts:
    """:func:`choose` as an op."""
    return choose(*given.values())
