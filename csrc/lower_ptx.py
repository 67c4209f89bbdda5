"""Declare PTX to be of the oldest ISA version that assembles it, so that older drivers load it.

nvcc names the newest version it knows, whatever the code needs, and a driver refuses PTX newer than itself. The
assembler checks every instruction against the version that the file names.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

DRIVERS = {
    "8.0": 12000,
    "8.1": 12010,
    "8.2": 12020,
    "8.3": 12030,
    "8.4": 12040,
    "8.5": 12050,
    "8.6": 12070,
    "8.7": 12080,
    "8.8": 12090,
    "9.0": 13000,
}
"""PTX ISA version -> first driver (as ``cuDriverGetVersion`` returns it) that loads it; PTX ISA manual, release notes.
The table starts at CUDA 12.0, the oldest driver that a supported torch runs on."""

_VERSION = re.compile(r"^\.version (\d+\.\d+)$", re.MULTILINE)


def version(text: str) -> str:
    """Return the ISA version that a PTX file names."""
    (found,) = _VERSION.findall(text)
    return str(found)


def lowered(text: str, nvcc: str) -> str:
    """Return ``text`` with the oldest ISA version of :data:`DRIVERS` that assembles, unchanged where none does.

    Args:
        text: PTX.
        nvcc: Path of the compiler whose assembler checks.
    """
    (target,) = re.findall(r"^\.target (sm_\w+)", text, re.MULTILINE)
    newest = tuple(map(int, version(text).split(".")))
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "lowered.ptx", Path(folder) / "lowered.cubin"
        # -O0, because the only question is whether it assembles.
        command = [nvcc, f"-arch={target}", "-Xptxas", "-O0", "-cubin", str(source), "-o", str(binary)]
        for candidate in DRIVERS:
            if tuple(map(int, candidate.split("."))) >= newest:
                break
            changed = _VERSION.sub(f".version {candidate}", text)
            source.write_text(changed)
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return changed
    return text


if __name__ == "__main__":
    compiler, given, output = sys.argv[1:]
    Path(output).write_text(lowered(Path(given).read_text(), compiler))
