"""Print a command's result as one JSON document or as tables, and write safetensors files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from happyhorse_fast.files import replacing
from happyhorse_fast.json_data import plain

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from rich.text import Text

Shown: TypeAlias = Iterable["str | Text | Table"]
"""What a command prints besides JSON, a paragraph or table each; made while it is printed."""
SENTENCE = 24
"""Width below which a column of sentences is not folded."""
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


def emit(data: Mapping[str, Any], as_json: bool, shown: Shown) -> None:
    """Print a command's result on standard output: ``data`` as JSON, or what is ``shown`` of it."""
    if as_json:
        print(json.dumps(plain(data), indent=2, allow_nan=False))
        return
    from rich.console import Console

    # What is printed holds paths and messages, whose brackets and colons are no markup: styles come from `literal`.
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a pipe has no width; do not fold tables
    for part in shown:
        console.print(part, crop=False)  # a line longer than the console is wide keeps its end


def literal(*parts: str | tuple[str, str] | Text) -> Text:
    """Words to print as they are, whatever brackets they hold; a pair is (words, style)."""
    from rich.text import Text

    return Text.assemble(*parts)


def verdict(passed: bool, yes: str = "pass", no: str = "FAIL", no_style: str = "bold red") -> Text:
    """A cell that says how a check went."""
    return literal((yes, "green") if passed else (no, no_style))


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    *,
    left: int = 1,
    folded: Sequence[int] = (),
) -> Table:
    """A table of words as they are, or of what :func:`literal` made.

    Its first ``left`` columns are left-aligned, the others right-aligned. ``folded`` columns hold sentences:
    left-aligned, and folded where the terminal is narrow. Of the others only the head folds: a table that does not fit
    is wider than the terminal, where rich would cut names and numbers short, down to nothing.
    """
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.table import Table

    made = Table(title=literal(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        sentence = i in folded
        longest = max((cell_len(str(part)) for part in (*name.split(), *(row[i] for row in rows))), default=0)
        made.add_column(
            literal(name),
            justify="left" if sentence or i < left else "right",
            no_wrap=not sentence and i < left,
            min_width=min(longest, SENTENCE) if sentence else longest,
        )
    for row in rows:
        made.add_row(*(literal(cell) if isinstance(cell, str) else cell for cell in row))
    return made


def number(value: float, unit: str = "") -> str:
    """Three significant digits with an SI prefix: 1.40 P, 27.3 G."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            scaled = value / factor
            return f"{scaled:.{max(0, 2 - int(math.log10(abs(scaled))))}f} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def gib(size: float) -> str:
    """Bytes as GiB, as MiB below a tenth of one."""
    return f"{size / 2**30:.2f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file, whole or not at all; metadata values are stored as JSON unless they are text."""
    from happyhorse_fast.checkpoint.save import write_safetensors

    texts = {key: value if isinstance(value, str) else json.dumps(plain(value)) for key, value in metadata.items()}
    with replacing(path) as partial:
        there = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        write_safetensors(there, partial, texts, named=path)
