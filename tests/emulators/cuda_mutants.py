"""CUDA kernels with a planted bug, built beside the good ones: what the tests must catch."""

from __future__ import annotations

import re
from pathlib import Path

from cuda_shim import CSRC, Shim

_INCLUDE = re.compile(r'^#include "([a-z_]+\.cuh)"\n', re.MULTILINE)


def mutant(folder: Path, stem: str, *edits: str) -> Shim:
    """A runner of the kernels of ``csrc/device/<stem>.cu`` with changes in it or in a header of it.

    Args:
        folder: Where the changed source goes.
        stem: Of the translation unit.
        edits: What is replaced, and by what, in turns.

    Raises:
        AssertionError: What is to be replaced does not occur exactly once.
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
    for old, new in zip(edits[::2], edits[1::2], strict=True):
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {stem}.cu and its headers"
        source = source.replace(old, new)
    path = folder / f"{stem}.cu"
    path.write_text(source)
    return Shim([path], once=True)
