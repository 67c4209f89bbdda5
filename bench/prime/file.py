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

from bench.results import ROOT, Json
from happyhorse_fast.files import replacing

FOLDER = ROOT / ".primed"
"""`make prime` leaves caches here, and `make gpu` looks for them here."""
MANIFEST = "primed.json"
"""Beside the cache's folders: {triton, arch, key, kernels}."""
SUFFIX = ".tgz"
GROUP = "__grp__"


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


def digest(key: str) -> str:
    """Hash a version key."""
    return hashlib.sha256(key.encode()).hexdigest()


def pack(folder: Path, target: Path, manifest: Json) -> None:
    """Pack a cache as one file, its manifest first."""
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target, end=".partial") as partial, tarfile.open(partial, "w:gz") as archive:
        archive.add(folder / MANIFEST, MANIFEST)
        for path in sorted(p for p in folder.glob("*/*") if p.is_file() and p.name != "lock"):
            archive.add(path, str(path.relative_to(folder)))


def read_manifest(packed: Path) -> Json:
    """Read the manifest of a packed cache."""
    with tarfile.open(packed) as archive:
        member = archive.extractfile(MANIFEST)
        assert member is not None, packed
        return dict(json.load(member))


def find(arch: int, key: str, folder: Path = FOLDER) -> Path | None:
    """The packed cache for an architecture and a build of Triton, the newest of several; None where there is none."""
    found = sorted(folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for packed in found:
        manifest = read_manifest(packed)
        if (manifest["arch"], manifest["key"]) == (arch, digest(key)):
            return packed
    return None


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


def relocate(folder: Path) -> int:
    """Let the groups of a cache name their files where they are; how many did not."""
    changed = 0
    for group in folder.glob(f"*/{GROUP}*.json"):
        paths = json.loads(group.read_text())["child_paths"]
        here = {name: str(group.parent / Path(path).name) for name, path in paths.items()}
        if here != paths:
            group.write_text(json.dumps({"child_paths": here}))
            changed += 1
    return changed


def kernels(folder: Path) -> int:
    """Count the kernels in a cache."""
    return sum(1 for _ in folder.glob(f"*/{GROUP}*.json"))
