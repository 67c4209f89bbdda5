"""All that a run leaves, results, logs and tuned tables, in one compressed file that is always whole.

A machine may give back a few small files only, and only those that are there when its time ends.
"""

from __future__ import annotations

import contextlib
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

from happyhorse_fast.files import replacing

LOG_BYTES = 1 << 20
"""Length of a log's end, which is kept."""
EVERY_SECONDS = 15.0


def write(folder: Path, target: Path) -> None:
    """Pack a folder's files; of a long log the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target, end=".partial") as partial, tarfile.open(partial, "w:gz") as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.resolve() != target.resolve()):
            name = path.relative_to(folder)
            if path.suffix == ".partial" or "build" in name.parts:
                continue
            with contextlib.suppress(FileNotFoundError):  # a stage replaced it meanwhile
                entry, content = tarfile.TarInfo(str(name)), path.read_bytes()
                entry.mtime = int(path.stat().st_mtime)
                if path.suffix != ".json" and len(content) > LOG_BYTES:
                    content = b"(its beginning is left out)\n" + content[-LOG_BYTES:]
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


@contextlib.contextmanager
def kept(folder: Path, target: Path, every: float = EVERY_SECONDS) -> Iterator[None]:
    """Pack a folder again and again while inside, and once more at the end.

    Args:
        folder: What to pack.
        target: The archive.
        every: Seconds between two.
    """
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(every):
            write(folder, target)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        write(folder, target)
