"""The choice of blocks by q and k, prepared once a clip."""

from __future__ import annotations

import copy

import torch

from happyhorse_fast import ambient
from happyhorse_fast.block_map.dynamic import Slots, candidates
from happyhorse_fast.block_map.map import BlockMap


class BlockSelector:
    """The tensors that a clip's dynamic maps share, made once: then a map is a few launches and no host work.

    Blocks that hold audio or text are kept in every row and are dense as queries; padding slots are never keys and
    weigh nothing in the means.

    Args:
        layout: Where the clip's tokens lie.
        base: The exact map to stay within, such as the frame window.
        device: Where q and k are.

    Attributes:
        base: The exact map, on the device.
        table: As `dynamic.candidates` gives it, and so are ``prefix``, ``live`` and ``inverse``.

    Raises:
        ValueError: ``base`` is of another size than the layout, or has several heads.
    """

    @ambient.makes_tensors
    def __init__(self, layout: Slots, base: BlockMap, device: torch.device | str) -> None:
        self.base = base.to(device)
        found = candidates(layout, *self.base.to_blocks(), base.queries, base.keys)
        self.table, self.prefix, self.live, self.inverse = found

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(table, prefix, live, inverse): what the choice needs besides q and k."""
        return self.table, self.prefix, self.live, self.inverse

    def to(self, device: torch.device | str) -> BlockSelector:
        """A copy on another device."""
        other = copy.copy(self)
        other.base = self.base.to(device)
        other.table, other.prefix, other.live, other.inverse = (x.to(device) for x in self.tensors())
        return other
