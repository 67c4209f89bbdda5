"""Ulysses context parallel: between attentions a rank holds rows of all heads, within attention all rows of some heads.

Jacobs et al., arXiv 2309.14509. Heads are dealt out in order, whole key/value heads with their query heads, so that
P divides the key/value heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from happyhorse_fast.parallel.group import Ranks, Transfer
from happyhorse_fast.parallel.rows import RowShare


@dataclass(frozen=True)
class Ulysses:
    """The exchange between rows and heads of one sequence.

    M = ``share.count`` rows are on each of P ranks, N = ``share.total`` in the sequence; dummy rows do not travel.

    Attributes:
        ranks: The ranks.
        share: The rows of this one.
    """

    ranks: Ranks
    share: RowShare

    def heads_of_rows(self, x: torch.Tensor, groups: int = 1, group: int = 0) -> Transfer:
        """Start: [M, H, ...] of all heads -> [N, H / P / groups, ...], one of the groups of this rank's heads.

        Args:
            x: Rows of this rank.
            groups: Parts that a rank's heads are sent in.
            group: Which.
        """
        p, held = self.ranks.size, self.share.held()
        rows, heads, dtype = held[self.share.rank], x.shape[1] // (p * groups), x.dtype
        wanted = _plain(x)[:rows].unflatten(1, (p, groups, heads))[:, :, group]  # [rows, P, h, ...]
        sent = wanted.transpose(0, 1).reshape(p * rows, heads, *x.shape[2:]).contiguous()  # else a view, of few rows
        return self.ranks.exchange(sent, [rows] * p, held, lambda arrived: arrived.view(dtype))

    def heads_of_columns(self, x: torch.Tensor, unit: int = 1) -> Transfer:
        """Start: [H, ..., M / unit] of all heads -> [H / P, ..., N / unit] of this rank's; ``unit`` rows are a column.

        Args:
            x: Columns of this rank.
            unit: 1, or 128 where a column is of a tile.
        """
        p, columns = self.ranks.size, [rows // unit for rows in self.share.held()]
        shape = (x.shape[0] // p, *x.shape[1:-1])
        sizes = [math.prod(shape) * n for n in columns]

        def finish(arrived: torch.Tensor) -> torch.Tensor:
            parts = [part.view(*shape, n) for part, n in zip(arrived.split(sizes), columns, strict=True)]
            return torch.cat(parts, dim=-1).view(dtype)

        sent, dtype = _plain(x)[..., : columns[self.share.rank]].reshape(-1).contiguous(), x.dtype
        return self.ranks.exchange(sent, [sizes[self.share.rank]] * p, sizes, finish)

    def rows_of_heads(self, x: torch.Tensor) -> Transfer:
        """Start: [N, h, ...] of this rank's heads -> [M, P, h, ...] of all ranks', e4m3 as bytes; dummy rows are 0."""
        p, share = self.ranks.size, self.share
        held = share.held()
        rows, dummies, shape = held[share.rank], share.count - held[share.rank], x.shape[1:]

        def finish(arrived: torch.Tensor) -> torch.Tensor:
            every = arrived.view(p, rows, *shape).transpose(0, 1)
            return torch.cat([every, every.new_zeros((dummies, *every.shape[1:]))]) if dummies else every

        return self.ranks.exchange(_plain(x).contiguous(), held, [rows] * p, finish)

    def tiles(self, x: torch.Tensor, unit: int) -> torch.Tensor:
        """[M / unit], the same for every head -> [N / unit]; ``unit`` rows are a tile."""
        held = [rows // unit for rows in self.share.held()]
        return self.ranks.gather(x[: held[self.share.rank]], held)


def _plain(x: torch.Tensor) -> torch.Tensor:
    """e4m3 as its bytes, which every backend and every copy of torch knows; anything else as it is."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
