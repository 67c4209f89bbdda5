"""CUDA kernels with a planted bug, built beside the good ones: what the tests must catch."""

from __future__ import annotations

import re
from pathlib import Path

from cuda_shim import CSRC, Shim

_INCLUDE = re.compile(r'^#include "([a-z_]+\.cuh)"\n', re.MULTILINE)


def mutant(folder: Path, stem: str, old: str, new: str) -> Shim:
    """A runner whose kernels of ``csrc/device/<stem>.cu``, or of a header of it, have ``new`` in place of ``old``.

    Raises:
        AssertionError: ``old`` does not occur exactly once.
    """
    seen: set[str] = set()

    def inlined(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (CSRC / "device" / name).read_text().replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda match: inlined(match[1]), text)

    # One file, because the build remembers libraries by the sources' text, and takes headers from csrc/.
    source = inlined(f"{stem}.cu")
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {stem}.cu and its headers"
    path = folder / f"{stem}.cu"
    path.write_text(source.replace(old, new))
    return Shim([path], once=True)
