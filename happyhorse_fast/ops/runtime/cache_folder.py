"""The folder that keeps what was found and compiled on this machine, one a user."""

from __future__ import annotations

import os
import stat
from pathlib import Path

CACHE_VARIABLE = "HAPPYHORSE_FAST_CACHE"
"""Environment variable that names another folder than ``~/.cache/happyhorse_fast``."""


def cache_folder() -> Path:
    """The folder of this user's own (0700), made where it does not exist.

    Raises:
        OSError: It cannot be made, belongs to somebody else, or others may write to it.
    """
    folder = _cache_path()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to user {found.st_uid}, not to {os.getuid()}; set {CACHE_VARIABLE}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"{folder} may be written by others (mode {found.st_mode & 0o777:o}); set {CACHE_VARIABLE}"
        )
    return folder


def _cache_path() -> Path:
    try:
        named = os.environ.get(CACHE_VARIABLE)
        if named:
            return Path(named).expanduser()
        base = os.environ.get("XDG_CACHE_HOME")
        # A relative one is to be ignored (XDG base directory specification).
        shared = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
        return shared / "happyhorse_fast"
    except RuntimeError as error:  # no HOME, and no entry in the password file: as in many containers
        raise FileNotFoundError(f"there is no folder for the cache: {error} Set {CACHE_VARIABLE}") from error
