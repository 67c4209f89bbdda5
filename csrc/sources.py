"""The device code as files: translation units, what each includes, and how all of them are compiled.

Standard library only: the build imports this before the package is installed, and the runtime compiles by it.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

DEVICE = Path(__file__).parent / "device"
OPTIONS = ("-std=c++17", "--fmad=false")
"""Options of nvcc and NVRTC alike. No contraction of a * b + c into one rounding but where fmaf is written: the tests
run the same sources on the host with -ffp-contract=off, and the bits must be the same. Expected to cost little, since
memory or tensor cores bound the kernels; the difference was not measured."""
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")
"""Targets of binaries. A GPU runs those of its major version and a lower minor one; sm_90a runs on 9.0 alone,
and may use the instructions that only Hopper has."""
VIRTUAL_ARCHITECTURES = ("compute_80", "compute_89")
"""Targets of PTX: every later GPU, and drivers older than the binaries. 89 has the conversion to e4m3 in
hardware, where 80 computes it."""

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([\w.]+)"', re.MULTILINE)


def stems(folder: Path | None = None) -> list[str]:
    """Stems of the translation units in a folder; in :data:`DEVICE` where none is named, as in all of these."""
    return sorted(path.stem for path in (folder or DEVICE).glob("*.cu"))


def texts(stem: str, folder: Path | None = None) -> dict[str, str]:
    """A translation unit and all that it includes from its folder, directly or not: {file name: text}.

    Raises:
        FileNotFoundError: There is no such unit, or it includes a file that is not there.
    """
    found: dict[str, str] = {}
    waiting = [f"{stem}.cu"]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = ((folder or DEVICE) / name).read_text(encoding="utf-8")
            waiting += _INCLUDE.findall(found[name])
    return dict(sorted(found.items()))


def digest(stem: str, folder: Path | None = None) -> str:
    """SHA-256 of a translation unit, what it includes, and the options: what is compiled from other sources differs."""
    whole = hashlib.sha256("\0".join(OPTIONS).encode())
    for name, text in texts(stem, folder).items():
        whole.update(f"\0{name}\0{len(text)}\0{text}".encode())
    return whole.hexdigest()
