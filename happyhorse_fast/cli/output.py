"""How commands print and write: one JSON document or tables, and files that are complete or not there."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.table import Table

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


def emit(data: Mapping[str, Any], as_json: bool, render: Callable[[Console], None]) -> None:
    """Print a command's result on standard output: ``data`` as JSON, or what ``render`` makes of it."""
    if as_json:
        print(json.dumps(plain(data), indent=2, allow_nan=False))
        return
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(console.width, 120))  # a pipe has no width; do not fold tables
    render(console)


def plain(value: Any) -> Any:
    """Data that JSON takes: dataclasses as objects, paths as text, and null for NaN and Inf, which JSON lacks."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"value must be plain data, got {type(value).__name__}")


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, folded: Sequence[int] = ()
) -> Table:
    """A table with its first ``left`` columns left-aligned and never folded, and the others right-aligned.

    ``folded`` columns hold sentences: left-aligned, and folded where the terminal is narrow. Without one rich makes
    columns that do not fit narrower, down to nothing.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        sentence = i in folded
        made.add_column(name, justify="left" if sentence or i < left else "right", no_wrap=not sentence and i < left)
    for row in rows:
        made.add_row(*row)
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


def require_target(path: Path, force: bool) -> None:
    """Raise where a file cannot be written, before the work that makes it.

    Raises:
        FileExistsError: It is there and ``force`` is not set, or it is a folder.
        FileNotFoundError: Its folder is not there.
        OSError: Nothing can be written there.
    """
    if path.is_dir():
        raise FileExistsError(f"output must be a file, {path} is a folder")
    if path.exists() and not force:
        raise FileExistsError(f"output must not exist yet, {path} does; --force replaces it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"output must be in a folder that exists, {path.parent} does not")
    _require_writable(path.parent)


def require_folder(path: Path) -> None:
    """Raise where a folder cannot be made or written to, before the work that fills it; nothing is made yet.

    Raises:
        FileExistsError: It is a file.
        OSError: Nothing can be written there.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"out must be a folder, {path} is a file")
    _require_writable(next(place for place in (path, *path.absolute().parents) if place.exists()))


def _require_writable(folder: Path) -> None:
    # A file that is made tells more than os.access, which knows neither full quotas nor /proc.
    probe = folder / f".happyhorse-fast.{os.getpid()}.partial"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"output must be in a folder that can be written to, {folder} cannot: {error.strerror}"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place at the end; removed on any error, Ctrl-C included."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file, whole or not at all; metadata values are stored as JSON unless they are text."""
    from happyhorse_fast.model.save_checkpoint import write_safetensors

    texts = {key: value if isinstance(value, str) else json.dumps(plain(value)) for key, value in metadata.items()}
    with replacing(path) as partial:
        write_safetensors({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, partial, texts)
