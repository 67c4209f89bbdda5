"""Files that are complete or not there, wherever a path leads: through links, and into FIFOs and devices."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DESCRIPTORS = re.compile(r"/dev/(stdout|stderr|fd/.*)|/proc/.*/fd/.*")
"""Open files of a process, which a file of the same name cannot take the place of."""


def real_path(path: Path) -> Path:
    """Where a path leads: through every link, also one whose target is not there yet."""
    return Path(os.path.realpath(path))


def is_special(path: Path) -> bool:
    """Whether what a path leads to is to be written into as it is: a FIFO, a device, an open file as /dev/stdout.

    Nothing is lost by writing there, and a regular file in its place would be a surprise.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    descriptor = _DESCRIPTORS.fullmatch(os.path.abspath(path)) is not None
    return not stat.S_ISDIR(mode) and (not stat.S_ISREG(mode) or descriptor)


@contextmanager
def replacing(path: Path, *, end: str | None = None) -> Iterator[Path]:
    """A file to write to, which takes the place of ``path`` at the end; removed on any error, Ctrl-C included.

    It lies beside what ``path`` leads to, so a link stays, and its target is what is replaced. What cannot be replaced
    (:func:`is_special`) gets the content instead.

    Args:
        path: Where the content goes.
        end: Of the name of the file to write to; that of ``path`` by default, which some writers go by.

    Raises:
        OSError: ``path`` cannot be written. Where it is special the message says where the content was left.
    """
    if is_special(path):
        folder = Path(tempfile.mkdtemp(prefix="happyhorse-fast."))
        made = folder / f"content{path.suffix if end is None else end}"
        try:
            yield made
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        try:
            with made.open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        except OSError as error:
            raise OSError(f"{path} cannot be written: {error.strerror}; the content is left in {made}") from error
        shutil.rmtree(folder)
        return
    target_path = real_path(path)
    unique = f"{os.getpid()}.{uuid.uuid4().hex[:8]}"
    # 40 characters of 4 bytes at most: with a whole stem the name could be longer than the 255 that a disk takes.
    partial = target_path.with_name(f".{target_path.stem[:40]}.{unique}.partial{path.suffix if end is None else end}")
    try:
        yield partial
        os.replace(partial, target_path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def require_target(path: Path, force: bool) -> None:
    """Raise where a file cannot be written, before the work that makes it.

    A link counts as what it leads to, which need not be there; a FIFO or a device is written into, so it needs no
    ``force``.

    Raises:
        FileExistsError: It is there and ``force`` is not set, or it is a folder or a socket.
        FileNotFoundError: Its folder is not there.
        OSError: Nothing can be written there.
    """
    if path.is_dir():
        raise FileExistsError(f"output must be a file, {path} is a folder")
    if path.is_socket():
        raise FileExistsError(f"output must be a file, {path} is a socket")
    if is_special(path):
        if not os.access(path, os.W_OK):
            raise PermissionError(f"output must be writable, {path} is not")
        return
    target = real_path(path)
    if target.is_symlink():
        raise OSError(f"output must be a file, {path} is a link that leads to itself")
    if path.exists() and not force:
        raise FileExistsError(f"output must not exist yet, {path} does; --force replaces it")
    where = str(path) if target == path.absolute() else f"{path} (a link to {target})"
    if not target.parent.is_dir():
        raise FileNotFoundError(f"output must be in a folder that exists, that of {where} does not")
    _require_writable(target.parent)


def require_folder(path: Path) -> None:
    """Raise where a folder cannot be made or written to, before the work that fills it; nothing is made yet.

    Raises:
        FileExistsError: It is a file.
        OSError: Nothing can be written there.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"output must be a folder, {path} is a file")
    target = real_path(path)
    _require_writable(next(place for place in (target, *target.parents) if place.exists()))


def _require_writable(folder: Path) -> None:
    if not folder.is_dir():
        raise NotADirectoryError(f"output must be in a folder, {folder} is a file")
    # A file that is made tells more than os.access, which knows neither full quotas nor /proc.
    probe = folder / f".happyhorse-fast.{os.getpid()}.partial"
    try:
        probe.touch()
        probe.unlink(missing_ok=True)  # by a thread, or by a process of that number in another container
    except OSError as error:
        raise OSError(
            f"output must be in a folder that can be written to, {folder} cannot: {error.strerror}"
        ) from error
