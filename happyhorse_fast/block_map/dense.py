"""The map of every query and every key, by arithmetic on a device: nothing is read back, and torch can trace it."""

from __future__ import annotations

from typing import Any

import torch

from happyhorse_fast.block_map.assemble import Fields
from happyhorse_fast.block_map.bits import BLOCK, pack


def dense(queries: int, keys: int, device: torch.device | str | None = None) -> Fields:
    """See :meth:`BlockMap.dense`; what `from_ranges` makes of one range, tensor for tensor."""
    for name, size in (("queries", queries), ("keys", keys)):
        if size < 0:
            raise ValueError(f"{name} must be at least 0, got {size}")
    rows, width = -(-queries // BLOCK), -(-keys // BLOCK)
    int32: dict[str, Any] = {"dtype": torch.int32, "device": device}
    row, column, place = (torch.arange(size, **int32) for size in (rows, width, BLOCK))
    mask_ids = torch.full((rows, width), -1, **int32)
    masks = torch.ones(0, BLOCK, BLOCK, dtype=torch.bool, device=device)
    if rows and keys % BLOCK:
        visible = (place < keys % BLOCK).expand(1, BLOCK, BLOCK)
        last = visible & (place < queries - (rows - 1) * BLOCK).unsqueeze(-1)
        # The last row has queries of its own where it is not whole; no two masks are alike.
        masks = torch.cat([visible, last]) if rows > 1 and queries % BLOCK else last
        mask_id = torch.where(row == rows - 1, len(masks) - 1, 0).unsqueeze(-1)
        mask_ids = torch.where(column == width - 1, mask_id, mask_ids).to(torch.int32)
    full = width - (keys % BLOCK > 0)
    counts = torch.stack([torch.full((1, rows), full, **int32), torch.full((1, rows), width, **int32)], dim=-1)
    starts, columns = (row * width).unsqueeze(0), column.repeat(rows)
    return counts, starts, columns, mask_ids.flatten(), pack(masks), row, queries, keys
