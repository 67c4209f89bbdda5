"""Pictures of who waits for whom: lanes, what each does over time, and arrows from one to another, as SVG."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "kernels"
LEFT, TOP, LANE, BAR, WIDTH = 120, 64, 76, 34, 1060
CELL, FOLDED = (90, 22), 18
"""Width and height of a tile of a grid; height of a line of text."""
GREY, BLUE, ORANGE, GREEN, VIOLET = "#7a869a", "#2f6fde", "#d9822b", "#3c9a5f", "#8b5fbf"


@dataclass(frozen=True)
class Bar:
    """Work of a lane from ``start`` to ``end``; ``owner`` is the lane whose colour it has."""

    lane: str
    start: float
    end: float
    label: str
    owner: str
    faint: bool = False


@dataclass(frozen=True)
class Arrow:
    """Somebody goes on because of somebody else."""

    time: float
    source: str
    target: str
    label: str


@dataclass(frozen=True)
class Picture:
    """Lanes over a stretch of time.

    Attributes:
        title: What is seen.
        lanes: Colours by name, from above.
        bars: What lanes do.
        arrows: Who goes on because of whom.
        first: Left end of what is drawn.
        last: Right end.
        tick: Between two labelled times; 0 where lengths are not to scale, and none is.
        below: Sentences below, folded.
        tiles: Column heads and rows of a grid of tiles, drawn below: which tile comes when.
    """

    title: str
    lanes: Mapping[str, str]
    bars: Sequence[Bar]
    arrows: Sequence[Arrow]
    first: float
    last: float
    tick: int = 0
    below: str = ""
    tiles: tuple[Sequence[str], Sequence[Sequence[str]]] = field(default=((), ()))

    def svg(self) -> str:
        """The whole file."""
        grid = CELL[1] * (len(self.tiles[1]) + 1) + 16 if self.tiles[1] else 0
        foot = TOP + LANE * len(self.lanes)
        height = foot + 34 + FOLDED * len(self._folded) + grid
        return document(
            LEFT + WIDTH + 20, height, [*self._frame(foot), *self._bars(), *self._arrows(), *self._below(foot)]
        )

    def _x(self, time: float) -> float:
        return LEFT + WIDTH * (time - self.first) / (self.last - self.first)

    def _y(self, lane: str) -> int:
        return TOP + LANE * list(self.lanes).index(lane)

    def _frame(self, foot: int) -> Iterator[str]:
        yield f'<text x="{LEFT}" y="24" font-size="15" fill="#222">{self.title}</text>'
        for name in self.lanes:
            y = self._y(name)
            yield f'<text x="{LEFT - 10}" y="{y + BAR / 2 + 4}" text-anchor="end" fill="#222">{name}</text>'
            yield f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y + BAR}" y2="{y + BAR}" stroke="#ddd"/>'
        for tick in range(0, int(self.last - self.first) + 1, self.tick) if self.tick else ():
            x = self._x(self.first + tick)
            yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 14}" y2="{foot - 30}" stroke="#eee"/>'
            yield f'<text x="{x:.1f}" y="{foot + 14}" text-anchor="middle" fill="#777">{tick}</text>'

    def _bars(self) -> Iterator[str]:
        for bar in self.bars:
            start, end = max(bar.start, self.first), min(bar.end, self.last)
            if end <= start:
                continue
            x, width = self._x(start), WIDTH * (end - start) / (self.last - self.first)
            color, opacity, y = self.lanes[bar.owner], 0.14 if bar.faint else 0.85, self._y(bar.lane)
            yield (
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{color}" '
                f'fill-opacity="{opacity}" stroke="#fff"/>'
            )
            if width > 7 * len(bar.label):
                yield _text(x + width / 2, y + BAR / 2 + 4, bar.label, "#333" if bar.faint else "#fff")

    def _arrows(self) -> Iterator[str]:
        for arrow in self.arrows:
            if not self.first <= arrow.time < self.last:
                continue
            x, source, target = self._x(arrow.time), self._y(arrow.source), self._y(arrow.target)
            down = target > source
            start, end = source + (BAR if down else 0), target + (0 if down else BAR)
            yield (
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{start}" y2="{end}" stroke="#333" stroke-width="1.3" '
                'marker-end="url(#tip)"/>'
            )
            y = target + (-18 if down else BAR + 24)
            yield f'<text x="{x + 5:.1f}" y="{y}" fill="#333">{arrow.label}</text>'

    @property
    def _folded(self) -> list[str]:
        return textwrap.wrap(self.below, 170)  # characters of 12 px that fit the width

    def _below(self, foot: int) -> Iterator[str]:
        for i, line in enumerate(self._folded):
            yield f'<text x="{LEFT}" y="{foot + 14 + FOLDED * i}" fill="#555">{line}</text>'
        heads, rows = self.tiles
        top, (width, height) = foot + 20 + FOLDED * len(self._folded), CELL
        for i, cells in enumerate((heads, *rows) if rows else ()):
            for j, cell in enumerate(cells):
                x, y = LEFT + width * j, top + height * i
                if i and j:
                    shade = f'fill="{BLUE}" fill-opacity="{0.12 if cell == "…" else 0.3}" stroke="#fff"'
                    yield f'<rect x="{x}" y="{y}" width="{width}" height="{height}" {shade}/>'
                yield _text(x + width / 2, y + 15, cell, "#333")


def document(width: int, height: int, parts: Iterable[str]) -> str:
    """An SVG file of these elements; ``#tip`` ends an arrow."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="12">\n'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#333"/></marker></defs>\n'
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, fill: str) -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="middle" fill="{fill}">{text}</text>'
