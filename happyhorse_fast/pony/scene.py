"""Pixels, colours and Hz that the grammar's names stand for."""

from __future__ import annotations

import torch

from happyhorse_fast.pony.codec import SIDE

RADIUS = {"large": 23.0, "medium": 15.0, "small": 9.0}
"""Pixels."""
PITCH = {"large": 312.0, "medium": 624.0, "small": 1248.0}
"""Hz; multiples of the frame rate, so that an oscillator has the same phase at every frame."""
RGB = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.75, 0.20),
    "blue": (0.15, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.75, 0.15, 0.80),
    "white": (0.97, 0.97, 0.97),
}
COLUMN = {"on the left": 36.0, "in the middle": 64.0, "on the right": 92.0}
"""Pixels from the left."""
FLOOR_ROW = 112
"""Pixels from the top."""
_WALL, _FLOOR = (0.10, 0.11, 0.14), (0.38, 0.36, 0.34)


def background() -> torch.Tensor:
    """[SIDE, SIDE, 3] float32 in 0..1: wall and floor."""
    picture = torch.tensor(_WALL).expand(SIDE, SIDE, 3).clone()
    picture[FLOOR_ROW:] = torch.tensor(_FLOOR)
    return picture
