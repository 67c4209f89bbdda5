"""The choice of blocks by q and k, prepared once a clip."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch

from happyhorse_fast import ambient
from happyhorse_fast.block_map.dynamic import Parts, Slots, amount, candidates, choose
from happyhorse_fast.block_map.layout import Layout
from happyhorse_fast.block_map.map import BlockMap


class BlockSelector:
    """The tensors that a clip's dynamic maps share, made once: then a map is a few launches and no host work.

    Blocks that hold audio or text are kept in every row and are dense as queries; padding slots are never keys and
    weigh nothing in the means.

    Args:
        layout: Where the clip's tokens lie.
        base: The exact map to stay within, such as the frame window; every token of a :class:`Layout` where None.
        device: Where q and k are.

    Attributes:
        base: The exact map, on the device.
        table: As `dynamic.candidates` gives it, and so are ``prefix``, ``live`` and ``inverse``.

    Raises:
        ValueError: ``base`` is of another size than the layout, has several heads, or is missing.
    """

    @ambient.makes_tensors
    def __init__(self, layout: Slots, base: BlockMap | None, device: torch.device | str) -> None:
        if base is None:
            if not isinstance(layout, Layout):
                raise ValueError(f"base must be given for a layout of type {type(layout).__name__}")
            base = BlockMap.frame_window(layout, None)
        self.base = base.to(device)
        found = candidates(layout, *self.base.to_blocks(), base.queries, base.keys)
        self.table, self.prefix, self.live, self.inverse = found

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(table, prefix, live, inverse): what the choice needs besides q and k."""
        return self.table, self.prefix, self.live, self.inverse

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> BlockSelector:
        """A copy with every tensor replaced by what ``change`` makes of it."""
        other = copy.copy(self)
        other.base = self.base.changed(change)
        other.table, other.prefix, other.live, other.inverse = map(change, self.tensors())
        return other

    def top_k(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        keep: int,
        *,
        pool: Literal["max", "mean"] = "max",
        q_scale: torch.Tensor | None = None,
        k_scale: torch.Tensor | None = None,
    ) -> BlockMap:
        """Per key/value head and row, the ``keep`` blocks of largest score, besides those that are always kept.

        Of equal scores the one of the lower block is the larger.

        Args:
            q: [N, Hq, D], bf16, float32, or codes.
            k: [N, Hkv, D].
            keep: Blocks of 128 keys per row, at least 1.
            pool: How the scores of a group's query heads become one.
            q_scale: float32 of codes: int8 [N, Hq], e4m3 [R].
            k_scale: float32 of codes: int8 [Hkv, S], e4m3 [S].

        Raises:
            ValueError: An argument is out of range or of the wrong shape.
        """
        counts = self.amount(q, k, keep, None, pool)
        return self.block_map(choose(q, k, *self.tensors(), q_scale, k_scale, *counts, pool == "mean"))

    def top_p(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        mass: float,
        *,
        pool: Literal["max", "mean"] = "max",
        q_scale: torch.Tensor | None = None,
        k_scale: torch.Tensor | None = None,
    ) -> BlockMap:
        """Per key/value head and row, the fewest blocks that hold ``mass`` of the softmax of the pooled scores.

        The softmax is over the blocks that are not always kept, in integers of 2^-30 of the best block's weight and at
        least 1, so that ``mass`` = 1 keeps every block; arguments as for :meth:`top_k`, 0 < mass <= 1.

        Raises:
            ValueError: An argument is out of range or of the wrong shape.
        """
        counts = self.amount(q, k, None, mass, pool)
        return self.block_map(choose(q, k, *self.tensors(), q_scale, k_scale, *counts, pool == "mean"))

    def block_map(self, parts: Parts) -> BlockMap:
        """The map of chosen blocks, within ``base`` and with its masks."""
        return self.base.within(parts)

    def amount(
        self, q: torch.Tensor, k: torch.Tensor, keep: int | None, mass: float | None, pool: str
    ) -> tuple[int, int]:
        """:func:`dynamic.amount` of a choice within ``base``."""
        return amount(q, k, self.base.keys, keep, mass, pool)
