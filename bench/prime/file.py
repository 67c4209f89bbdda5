"""A Triton cache that was filled ahead of time, where it is used: unpacked, put right, and only for the same Triton.

Triton names a cache's folders by a digest of kernel, launch and build of Triton, and writes absolute paths into
``__grp__*.json``: in a folder that was moved nothing would be found.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
from pathlib import Path
from types import FunctionType
from typing import Any

from bench.bootstrap import ROOT

FOLDER = ROOT / ".primed"
"""`make prime` leaves caches here, and `make gpu` looks for them here."""
GROUPS = "*/__grp__*.json"
"""In a cache's folders: the files of a kernel, by their names, where they lie."""


def packed_in(folder: Path, arch: int, key: str) -> Path:
    """The file of the cache for an architecture and a build of Triton, by its version and its key."""
    import triton

    digest = hashlib.sha256(key.encode()).hexdigest()
    return folder / f"sm_{arch}-triton-{triton.__version__}-{digest[:16]}.tgz"


def version_key(build: Path | None = None) -> str:
    """Return the key by which Triton's cache tells one build of Triton from another; some 5,000 characters.

    Args:
        build: Folder that holds another build of the imported version, such as the one for another Python.

    Raises:
        ValueError: It is of another version.
    """
    import triton
    from triton.runtime import cache

    if build is None:
        return str(cache.triton_key())
    found = re.search(r"__version__ = '([^']+)'", (build / "triton" / "__init__.py").read_text())
    if found is None or found[1] != triton.__version__:
        other = found[1] if found else "none"
        raise ValueError(f"build must hold Triton {triton.__version__}, which compiles here; {build} holds {other}")
    own: Any = cache.triton_key.__wrapped__
    # It hashes what lies around its own file.
    around = own.__globals__ | {"__file__": str(build / "triton" / "runtime" / "cache.py")}
    return str(FunctionType(own.__code__, around)())


def unpack(packed: Path) -> Path:
    """The cache's folder beside its file, unpacked anew where the file is newer, its paths right."""
    folder = packed.with_suffix("")
    if folder.is_dir() and folder.stat().st_mtime < packed.stat().st_mtime:
        shutil.rmtree(folder)
    if not folder.is_dir():
        with tarfile.open(packed) as archive:
            archive.extractall(folder, filter="data")
        folder.touch()
    relocate(folder)
    return folder


def relocate(folder: Path) -> None:
    """Let the groups of a cache name their files where they are."""
    for group in folder.glob(GROUPS):
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in names}}))


def kernels(folder: Path) -> int:
    """Count the kernels in a cache."""
    return sum(1 for _ in folder.glob(GROUPS))
