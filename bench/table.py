"""A table as plain rows, and what it becomes: Markdown, or lines of a terminal."""

from __future__ import annotations

from dataclasses import dataclass

MOST_AT_RIGHT = 24
"""Characters of a column's longest cell past which it is text and stands at the left."""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: What it holds, units included.
        columns: Headers.
        rows: Cells, as text.
        note: What a reader must know to read it right.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    @property
    def at_left(self) -> tuple[bool, ...]:
        """Columns that are read as text: the first, and those with a long cell."""
        cells = zip(*self.rows, strict=True) if self.rows else [()] * len(self.columns)
        long = [max(map(len, column), default=0) > MOST_AT_RIGHT for column in cells]
        return (True, *long[1:])

    def markdown(self) -> str:
        """GitHub's dialect; text at the left, numbers at the right."""
        lines = [f"**{self.title}**", "", f"| {' | '.join(self.columns)} |"]
        lines.append("|" + "".join("---|" if left else "---:|" for left in self.at_left))
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])])

    def text(self) -> str:
        """For a terminal: the title, aligned columns, the note."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = [self.title]
        for row in (self.columns, *self.rows):
            cells = zip(row, widths, self.at_left, strict=True)
            lines.append("  ".join(cell.ljust(w) if left else cell.rjust(w) for cell, w, left in cells).rstrip())
        return "\n".join([*lines, *([self.note] if self.note else [])])
