"""FlexAttention's BlockMask, and back: masks without partial blocks, without full ones, with neither; several heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

from happyhorse_fast.block_map import BLOCK, BlockMap

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


DOCUMENT = torch.tensor([0] * 100 + [1] * 200 + [2] * 33)
MASK_MODS: dict[str, Callable[..., Any]] = {
    "causal": lambda b, h, q, k: q >= k,
    "window": lambda b, h, q, k: (q - k).abs() < 70,
    "documents": lambda b, h, q, k: DOCUMENT[q] == DOCUMENT[k],
    "heads": lambda b, h, q, k: (q >= k) | (h == 1),
}


@pytest.mark.parametrize("name", MASK_MODS)
def test_from_flex_and_back(name: str) -> None:
    mod = MASK_MODS[name]
    heads = 2 if name == "heads" else 1
    block_mask = create_block_mask(mod, B=None, H=heads, Q_LEN=333, KV_LEN=333, device="cpu", BLOCK_SIZE=BLOCK)
    index = torch.arange(333)
    wanted = torch.stack([mod(0, torch.tensor(h), index[:, None], index[None]) for h in range(heads)])
    block_map = BlockMap.from_flex(block_mask)
    block_map.validate()
    assert torch.equal(block_map.to_dense(), wanted)
    assert torch.equal(BlockMap.from_flex(block_map.to_flex(heads)).to_dense(), wanted)

    q, k, v = torch.randn(3, 1, 2, 333, 32).unbind()
    result = flex_attention(q, k, v, block_mask=block_map.to_flex(2))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=wanted[None])
    torch.testing.assert_close(result, expected)


def test_from_flex_takes_hand_made_masks_and_says_what_it_cannot() -> None:
    one = torch.ones(1, 1, 3, dtype=torch.int32)
    first = torch.zeros(1, 1, 3, 3, dtype=torch.int32)
    last = torch.full_like(first, 2)  # the ragged block, called full
    made = BlockMask.from_kv_blocks(
        one, first, one, last, BLOCK_SIZE=BLOCK, mask_mod=MASK_MODS["causal"], seq_lengths=(300, 300)
    )
    block_map = BlockMap.from_flex(made)
    block_map.validate()
    index = torch.arange(300)
    wanted = (index[:, None] >= index[None]) & (index[None] < 128) | (index[None] >= 256)
    assert torch.equal(block_map.to_dense()[0], wanted.expand(300, 300))
    wrong = create_block_mask(MASK_MODS["causal"], B=None, H=None, Q_LEN=256, KV_LEN=256, device="cpu", BLOCK_SIZE=64)
    with pytest.raises(ValueError, match=r"BLOCK_SIZE \(128, 128\), got \(64, 64\)"):
        BlockMap.from_flex(wrong)
    batch = create_block_mask(MASK_MODS["causal"], B=2, H=None, Q_LEN=256, KV_LEN=256, device="cpu")
    with pytest.raises(ValueError, match="batch size 1"):
        BlockMap.from_flex(batch)
