"""From FlexAttention's BlockMask, and to one."""

from __future__ import annotations

from typing import Any

import torch

from happyhorse_fast import ambient
from happyhorse_fast.arguments import require_whole
from happyhorse_fast.block_map.assemble import Fields, assemble
from happyhorse_fast.block_map.bits import BLOCK, pack, unpack

# Blocks of 128 x 128 that one call of a mask_mod evaluates: 256 of them are 4 M pairs, 32 MiB per int64 index.
BLOCKS_AT_A_TIME = 256


@ambient.makes_tensors
def from_flex(block_mask: Any) -> Fields:
    """See :meth:`BlockMap.from_flex`."""
    if tuple(block_mask.BLOCK_SIZE) != (BLOCK, BLOCK):
        raise ValueError(f"block_mask must have BLOCK_SIZE ({BLOCK}, {BLOCK}), got {tuple(block_mask.BLOCK_SIZE)}")
    batch, heads, rows = block_mask.kv_num_blocks.shape
    if batch != 1:
        raise ValueError(f"block_mask must have batch size 1 (clips are packed in one sequence), got {batch}")
    queries, keys = block_mask.seq_lengths
    width = -(-keys // BLOCK)
    partial = _listed(block_mask.kv_num_blocks, block_mask.kv_indices, width)
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None:
        full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, width)
    if keys % BLOCK:  # a block that lacks keys is never full here; every pair of it that exists is still allowed
        ragged = full[..., -1].clone()
        full[..., -1] = False
    else:
        ragged = full.new_zeros(heads, rows)

    where = partial.nonzero()  # [blocks, 3]: head, row, column
    # Of no blocks, split makes one empty part, which vmap does not take.
    parts = where.split(BLOCKS_AT_A_TIME) if len(where) else ()
    masks = [_evaluate(block_mask.mask_mod, part, queries, keys) for part in parts]
    extra = ragged.nonzero()
    if len(extra):
        inside = torch.arange(BLOCK, device=full.device) < keys % BLOCK
        where = torch.cat([where, torch.nn.functional.pad(extra, (0, 1), value=width - 1)])
        masks.append(pack(inside.expand(len(extra), BLOCK, BLOCK)))
    ids = torch.full(full.shape, -1, dtype=torch.int32, device=full.device)
    bits = torch.zeros(0, BLOCK, BLOCK // 32, dtype=torch.int32, device=full.device)
    if masks:
        bits, number = torch.unique(torch.cat(masks), dim=0, return_inverse=True)
        ids[where[:, 0], where[:, 1], where[:, 2]] = number.to(torch.int32)
    return assemble(full, ids, bits.contiguous(), queries, keys)


def _listed(counts: torch.Tensor, indices: torch.Tensor, width: int) -> torch.Tensor:
    """bool [H, R, S] of the blocks that the first counts[...] indices name."""
    used = torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)
    named = torch.zeros(*counts.shape, width + 1, dtype=torch.bool, device=indices.device)
    named.scatter_(-1, torch.where(used, indices, width).long(), True)
    return named[0, ..., :width]


def _evaluate(mask_mod: Any, where: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
    """int32 [blocks, 128, 4] of the blocks [blocks, 3]; pairs past the end are 0 and never asked for."""
    from torch.nn.attention.flex_attention import create_mask

    head, row, column = where.unbind(dim=1)

    def of_block(block: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        query, key = row[block] * BLOCK + q, column[block] * BLOCK + kv
        seen = mask_mod(h, head[block], query.clamp(max=queries - 1), key.clamp(max=keys - 1))
        return seen & (query < queries) & (key < keys)

    # The blocks stand in for create_mask's batch; its one head is 0, which is the batch that mask_mod gets.
    return pack(create_mask(of_block, len(where), 1, BLOCK, BLOCK, device=str(where.device))[:, 0])


def to_flex(
    full: torch.Tensor, ids: torch.Tensor, mask_bits: torch.Tensor, queries: int, keys: int, num_heads_q: int | None
) -> Any:
    """See :meth:`BlockMap.to_flex`; ``full`` and ``ids`` are of :meth:`BlockMap.to_blocks`."""
    from torch.nn.attention.flex_attention import BlockMask

    heads = len(full)
    num_heads_q = None if num_heads_q is None else require_whole("num_heads_q", num_heads_q, 1)
    if heads > 1 and (num_heads_q is None or num_heads_q % heads):
        raise ValueError(f"num_heads_q must be a multiple of the map's {heads} heads, got {num_heads_q}")
    if heads > 1 and num_heads_q is not None:
        full, ids = (x.repeat_interleave(num_heads_q // heads, dim=0) for x in (full, ids))
    bits = unpack(mask_bits)
    bits = torch.cat([bits, torch.zeros_like(full[0, :0, :0], dtype=torch.bool).new_zeros(1, BLOCK, BLOCK)])

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        head = h % len(full)
        number = ids[head, q // BLOCK, kv // BLOCK]
        seen = bits[torch.where(number >= 0, number, len(bits) - 1), q % BLOCK, kv % BLOCK]
        return full[head, q // BLOCK, kv // BLOCK] | seen

    def listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        indices = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
        return blocks.sum(dim=-1, dtype=torch.int32)[None], indices.to(torch.int32)[None]

    return BlockMask.from_kv_blocks(
        *listed(ids >= 0),
        *listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(queries, keys),
    )
