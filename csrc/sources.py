"""The device code as files: translation units, the files that each includes, and the compiler's options.

It imports the standard library only: the build uses it before the package is installed, and NVRTC's caller at run time.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

DEVICE = Path(__file__).parent / "device"
OPTIONS = ("-std=c++17", "--fmad=false")
"""Options of nvcc and NVRTC alike. a * b + c is contracted into one rounding only where fmaf is written: the tests run
the same sources on the host with -ffp-contract=off, and the bits must be the same. This is expected to cost little,
since memory or tensor cores bound the kernels; the difference was not measured."""
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")
"""Targets of binaries. A GPU runs binaries of its own major version and an equal or lower minor one. sm_90a runs on 9.0
alone, and may use the instructions that only Hopper has."""

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([\w.]+)"', re.MULTILINE)


def stems() -> list[str]:
    """List the stems of the translation units."""
    return sorted(path.stem for path in DEVICE.glob("*.cu"))


def texts(stem: str) -> dict[str, str]:
    """Read a translation unit and all files of :data:`DEVICE` that it includes, directly or not: {file name: text}.

    Raises:
        FileNotFoundError: The unit, or a file that it includes, is not there.
    """
    found: dict[str, str] = {}
    waiting = [f"{stem}.cu"]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = (DEVICE / name).read_text(encoding="utf-8")
            waiting += _INCLUDE.findall(found[name])
    return dict(sorted(found.items()))


def digest(stem: str) -> str:
    """Return the SHA-256 of a translation unit, the files it includes, and the options: it names what was compiled."""
    whole = hashlib.sha256("\0".join(OPTIONS).encode())
    for name, text in texts(stem).items():
        whole.update(f"\0{name}\0{len(text)}\0{text}".encode())
    return whole.hexdigest()
