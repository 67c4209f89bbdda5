"""A table as plain rows, and what it becomes: Markdown, HTML, or lines of a terminal."""

from __future__ import annotations

import html
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
        marks: Rows to draw attention to, by their place.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    marks: frozenset[int] = frozenset()

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

    def html(self) -> str:
        """A table element with its title and note; marked rows have the class ``mark``."""
        kind = ["", *(" class=text" if left else "" for left in self.at_left[1:])]  # the page has the first at the left
        head = "".join(f"<th{of}>{html.escape(column)}</th>" for of, column in zip(kind, self.columns, strict=True))
        body = "".join(
            f"<tr{' class=mark' if place in self.marks else ''}>"
            + "".join(f"<td{of}>{html.escape(cell)}</td>" for of, cell in zip(kind, row, strict=True))
            + "</tr>"
            for place, row in enumerate(self.rows)
        )
        note = f"<p class=note>{html.escape(self.note)}</p>" if self.note else ""
        title = f"<h3>{html.escape(self.title)}</h3>"
        return f"{title}<div class=scroll><table><tr>{head}</tr>{body}</table></div>{note}"

    def text(self) -> str:
        """For a terminal: the title, aligned columns, the note."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = [
            "  ".join(
                f"{cell:{'<' if left else '>'}{w}}" for cell, w, left in zip(row, widths, self.at_left, strict=True)
            )
            for row in (self.columns, *self.rows)
        ]
        return "\n".join([self.title, *map(str.rstrip, lines), *([self.note] if self.note else [])])
