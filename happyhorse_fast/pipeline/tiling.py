"""How the turbo decoder divides latents: windows in time, as published, and tiles in space, which are exact."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

STRIDE = 7
"""Latents that a window adds."""
TIME_SCALE = 4
"""Frames per latent."""
SPACE_SCALE = 16
"""Pixels per latent, in height and width."""
HALO = 15
"""Latents around a tile that its pixels depend on.

The 3x3 kernels reach 7 latents at the latents' resolution, 7 + 2 steps of half a latent, 5 + 2 of a quarter and 5 + 7
of an eighth: 14.75 in all.
"""


@dataclass(frozen=True)
class TimeWindow:
    """Latents that are decoded together, and the frames that are kept of them.

    Attributes:
        start: First latent.
        stop: One behind the last latent; beyond the clip, the last latent repeats.
        skip: Decoded frames before the first that is kept.
        frames: How many are kept.
    """

    start: int
    stop: int
    skip: int
    frames: int

    @property
    def first(self) -> bool:
        """Whether the clip starts here: the first latent then stands for one frame, not for four."""
        return self.start == 0


def time_windows(latents: int) -> list[TimeWindow]:
    """The published windows of a clip: 7 latents each, and one neighbour on each side where there is one.

    Args:
        latents: Of the clip, at least 1. It is padded to a multiple of 7; frames of the padding are not kept.
    """
    padded = -(-latents // STRIDE) * STRIDE
    windows = []
    for start in range(0, padded, STRIDE):
        frames = TIME_SCALE * (min(start + STRIDE, latents) - start)
        stop = min(start + STRIDE + 1, padded)
        if start == 0:
            windows.append(TimeWindow(0, stop, 0, frames - TIME_SCALE + 1))
        else:
            windows.append(TimeWindow(start - 1, stop, TIME_SCALE, frames))
    return windows


@dataclass(frozen=True)
class Span:
    """A tile's latents along one axis: the ones it is for, and these with their halo."""

    start: int
    stop: int
    outer_start: int
    outer_stop: int

    @property
    def outer(self) -> slice:
        """What is decoded."""
        return slice(self.outer_start, self.outer_stop)

    @property
    def pixels(self) -> slice:
        """Where the tile belongs in a frame."""
        return slice(SPACE_SCALE * self.start, SPACE_SCALE * self.stop)

    @property
    def inner_pixels(self) -> slice:
        """Which of the decoded pixels belong there."""
        return slice(SPACE_SCALE * (self.start - self.outer_start), SPACE_SCALE * (self.stop - self.outer_start))


def spans(size: int, count: int) -> list[Span]:
    """``size`` latents in ``count`` parts whose sizes differ by one at most."""
    edges = [size * index // count for index in range(count + 1)]
    return [
        Span(start, stop, max(start - HALO, 0), min(stop + HALO, size)) for start, stop in itertools.pairwise(edges)
    ]


Tile = tuple[Span, Span]
"""Its rows and its columns."""


def positions(tile: Tile) -> int:
    """Latents of a frame that a tile decodes."""
    rows, columns = (span.outer_stop - span.outer_start for span in tile)
    return rows * columns


def space_tiles(height: int, width: int, tiles: int) -> list[Tile]:
    """Rows and columns of each tile: of all grids with ``tiles`` tiles, the one whose largest is the smallest.

    Raises:
        ValueError: No grid of so many tiles has at least one latent in each.
    """
    grids = [
        list(itertools.product(spans(height, tiles // columns), spans(width, columns)))
        for columns in range(1, tiles + 1)
        if tiles % columns == 0 and columns <= width and tiles // columns <= height
    ]
    if not grids:
        raise ValueError(f"tiles must be rows times columns of a grid on {height} x {width} latents, got {tiles}")
    return min(grids, key=lambda grid: max(map(positions, grid)))
