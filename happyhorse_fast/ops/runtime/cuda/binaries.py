"""The binaries that the build left in the package: which of them a GPU and its driver run. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from happyhorse_fast.csrc import sources
from happyhorse_fast.ops.runtime.cuda.errors import CudaError, cuda_version

FOLDER = Path(__file__).parents[3] / "cubins"

Capability = tuple[int, int]


@dataclass(frozen=True)
class Binary:
    """A file of :data:`FOLDER`.

    Attributes:
        target: What it was built for: ``sm_90a`` for a cubin, ``compute_80`` for PTX.
        path: Where it is.
        sha256: What it should hold.
    """

    target: str
    path: Path
    sha256: str

    @property
    def name(self) -> str:
        return self.path.name

    def read(self) -> bytes:
        """Its content.

        Raises:
            CudaError: It cannot be read, or is not what the build wrote.
        """
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise CudaError(f"{self.name} cannot be read: {error}") from error
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise CudaError(f"{self.name} is not the file that was built ({len(content)} bytes): install it again")
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

    Binaries run on their major version from their minor one on; those with an ``a`` on their own capability alone. PTX
    runs from its own on. (CUDA C++ programming guide, binary and PTX compatibility.)
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)(a?)", target)
    if match is None:
        raise ValueError(f"target is {target!r}, such as sm_90a or compute_80 is allowed")
    built = (int(match[2]), int(match[3]))
    if match[4]:
        return capability == built
    return capability >= built and (match[1] == "compute" or capability[0] == built[0])


def usable(stem: str, capability: Capability, driver: int) -> tuple[list[Binary], list[str]]:
    """Binaries of a translation unit that a GPU and its driver run.

    Args:
        stem: The translation unit.
        capability: Compute capability.
        driver: Version of the driver, as ``cuDriverGetVersion`` has it.

    Returns:
        Them, best first: binaries before PTX, later targets before earlier ones; and why others are not among them.
    """
    try:
        entry = manifest()["stems"].get(stem)
    except CudaError as error:
        return [], [str(error)]
    if entry is None:
        return [], [f"no binary of {stem} was built"]
    if entry["sources"] != sources.digest(stem):
        return [], [f"the binaries of {stem} are older than its sources"]
    found, why_not = [], []
    for target, file in entry["binaries"].items():
        if not serves(target, capability):
            continue
        if driver < file["driver"]:
            needs = cuda_version(file["driver"])
            why_not.append(
                f"{file['file']} needs a driver for CUDA {needs}, this one is for CUDA {cuda_version(driver)}"
            )
        else:
            found.append(Binary(target, FOLDER / file["file"], file["sha256"]))
    if not found and not why_not:
        targets = ", ".join(entry["binaries"])
        why_not.append(f"binaries of {stem} are for {targets}, this GPU is sm_{capability[0]}{capability[1]}")
    found.sort(
        key=lambda one: (one.target.startswith("sm_"), int(re.findall(r"\d+", one.target)[0]), one.target), reverse=True
    )
    return found, why_not
