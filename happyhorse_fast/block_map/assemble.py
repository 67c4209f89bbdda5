"""From a table of blocks to compressed rows, in tensor operations on the table's device."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Fields: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, int]
"""Those of a :class:`BlockMap`, as its sources make them: six tensors from counts to order, queries, keys."""


def assemble(
    full: Tensor,
    mask_ids: Tensor,
    mask_bits: Tensor,
    queries: int,
    keys: int,
) -> Fields:
    """Lay the rows out one after another, full blocks first, longest rows first in ``order``.

    Args:
        full: bool [Hm, R, S].
        mask_ids: int32 [Hm, R, S]: the mask of a partial block, -1 where there is none; never both full and partial.
        mask_bits: int32 [masks, 128, 4].
        queries: Query tokens.
        keys: Key tokens.
    """
    heads, rows, width = full.shape
    partial = mask_ids >= 0
    full_rank = full.cumsum(dim=-1, dtype=torch.int32)
    partial_rank = partial.cumsum(dim=-1, dtype=torch.int32)
    if width:
        n_full, n_partial = full_rank[..., -1], partial_rank[..., -1]
    else:
        n_full = n_partial = full.new_zeros(heads, rows, dtype=torch.int32)
    total = n_full + n_partial
    ends = total.flatten().cumsum(dim=0)
    size = int(ends[-1]) if len(ends) else 0
    starts = (ends - total.flatten()).view(heads, rows)
    rank = torch.where(full, full_rank, n_full.unsqueeze(-1) + partial_rank) - 1
    place = torch.where(full | partial, starts.unsqueeze(-1) + rank, size).flatten()  # absent blocks go past the end
    columns = torch.zeros(size + 1, dtype=torch.int32, device=full.device)
    ids = torch.full_like(columns, -1)
    column = torch.arange(width, dtype=torch.int32, device=full.device).expand(heads, rows, width)
    columns.scatter_(0, place, column.flatten())
    ids.scatter_(0, place, mask_ids.flatten())
    counts = torch.stack([n_full, total], dim=-1)
    order = torch.argsort(total.flatten(), descending=True, stable=True).to(torch.int32)
    return counts, starts.to(torch.int32), columns[:size], ids[:size], mask_bits, order, queries, keys
