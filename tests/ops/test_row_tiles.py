"""The table that says which rows are whose is trusted by the ops; a helper checks it."""

from __future__ import annotations

import pytest
import torch

from happyhorse_fast.ops import check_row_tiles


def table(*tiles: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(tiles, dtype=torch.int32)


def test_what_the_ops_take_is_allowed() -> None:
    check_row_tiles(table((0, 0, 128), (0, 128, 130), (2, 130, 256)), rows=256, experts=3)


@pytest.mark.parametrize(
    ("tiles", "says"),
    [
        ([(0, 0, 128)], "must cover all 256 rows, got tiles up to 128"),
        ([(0, 0, 256)], "tile 0 is 0 to 256"),
        ([(0, 0, 128), (0, 129, 256)], "tile 1 is 129 to 256, wanted is one from 128 on"),
        ([(0, 0, 128), (0, 128, 300)], "tile 1 is 128 to 300"),
        ([(0, 0, 128), (0, 128, 128)], "tile 1 is 128 to 128"),
        ([(1, 0, 128), (0, 128, 256)], "experts from 0 to 0, got 1 in tile 0"),
    ],
)
def test_what_they_would_misread_is_named(tiles: list[tuple[int, int, int]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_row_tiles(table(*tiles), rows=256, experts=1)


def test_another_dtype_is_refused() -> None:
    with pytest.raises((TypeError, ValueError), match="row_tiles"):
        check_row_tiles(torch.zeros(1, 3), rows=1, experts=1)
