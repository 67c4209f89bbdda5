"""FlexAttention's BlockMask, and back: masks without partial blocks, without full ones, with neither; several heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from happyhorse_fast.block_map import BlockMap

MASKS: dict[str, Callable[..., Any]] = {
    "all": lambda b, h, q, k: q >= 0,
    "none": lambda b, h, q, k: q < 0,
    "whole blocks": lambda b, h, q, k: q // 128 == k // 128,
    "causal": lambda b, h, q, k: q >= k,
    "per head": lambda b, h, q, k: q // 128 >= k // 128 + h,
}
SIZES = ((256, 256), (300, 200), (128, 384), (384, 128), (1, 1))


@pytest.mark.parametrize(("queries", "keys"), SIZES)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("name", MASKS)
def test_the_same_pairs_there_and_back(name: str, heads: int, queries: int, keys: int) -> None:
    mask = MASKS[name]
    expected = create_mask(mask, 1, heads, queries, keys, device="cpu")[0]
    found = BlockMap.from_flex(create_block_mask(mask, None, heads, queries, keys, device="cpu"))
    for block_map in (found, BlockMap.from_flex(found.to_flex(heads))):
        block_map.validate()
        assert block_map.to_dense().equal(expected)


@pytest.mark.parametrize("counts", [(0, 2), (0, None), (0, 0), (2, 0), (2, None)])
@pytest.mark.parametrize("narrow", [False, True])
def test_masks_of_counts_and_indices(counts: tuple[int, int | None], narrow: bool) -> None:
    """As libraries make them, which leave out what is empty: None, or indices of no width."""
    wide = torch.arange(2, dtype=torch.int32).repeat(1, 1, 2, 1)
    parts: list[torch.Tensor | None] = []
    for count in counts:
        indices = wide[..., :0] if narrow and not count else wide
        parts += [None, None] if count is None else [torch.full((1, 1, 2), count, dtype=torch.int32), indices]
    flex = BlockMask.from_kv_blocks(*parts, BLOCK_SIZE=128, mask_mod=None, seq_lengths=(256, 256))  # type: ignore[arg-type]
    found = BlockMap.from_flex(flex)
    found.validate()
    assert found.to_dense().all() if any(counts) else not found.to_dense().any()


def test_a_map_of_no_tokens() -> None:
    for queries, keys in ((0, 0), (0, 128), (128, 0)):
        found = BlockMap.from_flex(BlockMap.from_ranges([], [], queries, keys).to_flex())
        assert (found.queries, found.keys, found.blocks()) == (queries, keys, (0, 0))
