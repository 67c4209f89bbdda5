"""From a table of blocks to compressed rows, in tensor operations on the table's device."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Fields: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, int]
"""Those of a :class:`BlockMap`, as its sources make them: six tensors from counts to order, queries, keys."""


def compress(kind: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows of a table [H, R, S] of 0 for a full block, 1 for a partial and 2 for an absent one.

    Returns:
        counts int32 [H, R, 2] and total int64 [H, R]: a row's full blocks, all of its blocks; columns int64 [H, R, S]:
        which they are, absent ones last; order int32 [H * R]: all rows, longest first.
    """
    total = (kind < 2).sum(dim=-1)
    counts = torch.stack([(kind == 0).sum(dim=-1), total], dim=-1).to(torch.int32)
    order = total.flatten().argsort(descending=True, stable=True).to(torch.int32)
    return counts, total, kind.argsort(dim=-1, stable=True), order


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
    counts, total, columns, order = compress(torch.where(full, 0, 2 - (mask_ids >= 0).to(torch.uint8)))
    starts = (total.flatten().cumsum(dim=0) - total.flatten()).view_as(total).to(torch.int32)
    used = torch.arange(full.shape[-1], device=full.device) < total.unsqueeze(-1)
    columns, mask_ids = columns[used].to(torch.int32), mask_ids.gather(-1, columns)[used]
    return counts, starts, columns, mask_ids, mask_bits, order, queries, keys
