"""The binaries that the build left in the package: which of them a GPU and its driver run. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from happyhorse_fast.csrc import sources
from happyhorse_fast.ops.runtime.cuda.errors import CudaError, cuda_version

FOLDER = Path(__file__).parents[3] / "cubins"

Capability = tuple[int, int]


def read(name: str, sha256: str) -> bytes:
    """The content of a file of :data:`FOLDER`.

    Raises:
        CudaError: It cannot be read, or is not what the build wrote.
    """
    try:
        content = (FOLDER / name).read_bytes()
    except OSError as error:
        raise CudaError(f"{name} cannot be read: {error}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CudaError(f"{name} is not the file that was built ({len(content)} bytes): install it again")
    return content


def manifest() -> dict[str, Any]:
    """Read the build's record of the binaries in :data:`FOLDER`.

    Raises:
        CudaError: There are none, or the manifest cannot be read.
    """
    path = FOLDER / "manifest.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CudaError("no binaries are installed (there is no cubins/manifest.json)") from error
    except (OSError, ValueError) as error:
        raise CudaError(f"{path} cannot be read: {error}; install it again") from error
    if found["nvcc"] is None:
        raise CudaError("no binaries were built: there was no nvcc")
    return found


def serves(target: str, capability: Capability) -> bool:
    """Whether a GPU of that compute capability runs what was built for ``target``.

    Binaries run on their major version from their minor one on; those with an ``a`` on their own capability alone.
    (CUDA C++ programming guide, binary compatibility.)
    """
    match = re.fullmatch(r"sm_(\d+)(\d)(a?)", target)
    if match is None:
        raise ValueError(f"target is {target!r}, such as sm_90a is allowed")
    built = (int(match[1]), int(match[2]))
    return capability == built if match[3] else capability[0] == built[0] and capability >= built


def usable(stem: str, capability: Capability, driver: int) -> tuple[dict[str, str], str]:
    """Binaries of a translation unit that a GPU and its driver run.

    Args:
        stem: The translation unit.
        capability: Compute capability.
        driver: Version of the driver, as ``cuDriverGetVersion`` has it.

    Returns:
        File name and SHA-256 of each, later targets first; and why there is none, or an empty string.
    """
    try:
        built = manifest()
    except CudaError as error:
        return {}, str(error)
    entry, needed = built["stems"].get(stem), 1000 * int(built["nvcc"].split(".")[0])
    if entry is None:
        return {}, f"no binary of {stem} was built"
    if entry["sources"] != sources.digest(stem):
        return {}, f"the binaries of {stem} are older than its sources"
    if driver < needed:  # a binary runs on every driver of its major version
        wanted, came = cuda_version(needed), cuda_version(driver)
        return {}, f"the binaries of {stem} need a driver for CUDA {wanted}, this one is for CUDA {came}"
    found = {
        f"{stem}.{target}.cubin": sha256 for target, sha256 in entry["binaries"].items() if serves(target, capability)
    }
    if not found:
        targets = ", ".join(entry["binaries"])
        return {}, f"binaries of {stem} are for {targets}, this GPU is sm_{capability[0]}{capability[1]}"
    return dict(reversed(found.items())), ""
