"""The table of row tiles: which rows are whose expert's."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from happyhorse_fast.kernels.launch import ROW_TILE
from happyhorse_fast.ops.runtime.checks import require

Span = tuple[int, int, int]
"""(expert, first row, end row)."""


def joined(tiles: Iterable[Span], most: int | None = None) -> list[Span]:
    """Neighbours of one expert joined, where ``most`` is given to at most that many rows."""
    found: list[Span] = []
    for expert, first, end in tiles:
        if found and found[-1][0] == expert and found[-1][2] == first and (most is None or end - found[-1][1] <= most):
            found[-1] = (expert, found[-1][1], end)
        else:
            found.append((expert, first, end))
    return found


def check_row_tiles(row_tiles: torch.Tensor, rows: int, experts: int) -> None:
    """Hold a table of row tiles against what the ops trust it to be; it is read back, so not to be called per step.

    A row that no tile covers stays unwritten; an expert that is not there is read out of bounds.

    Args:
        row_tiles: int32 [tiles, 3], (expert, first row, end row).
        rows: N.
        experts: E.

    Raises:
        TypeError, ValueError: It is no such table; an expert is not there; a tile is empty or of more than 128 rows; or
            the tiles do not cover every row once, in order. Names the first tile that is wrong.
    """
    require("row_tiles", row_tiles, (torch.int32,), ("tiles", 3), device=row_tiles.device)
    expected = 0
    for i, (expert, first, end) in enumerate(row_tiles.tolist()):
        if not 0 <= expert < experts:
            raise ValueError(f"row_tiles must name experts from 0 to {experts - 1}, got {expert} in tile {i}")
        if first != expected or not first < end <= min(first + ROW_TILE, rows):
            raise ValueError(
                f"row_tiles must cover rows 0 to {rows} once, in order and in tiles of at most {ROW_TILE}; tile {i} is "
                f"{first} to {end}, wanted is one from {expected} on"
            )
        expected = end
    if expected != rows:
        raise ValueError(f"row_tiles must cover all {rows} rows, got tiles up to {expected}")
