"""Planted bugs as parameters of a test: a few in `make test`, all in `make check`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def some_slow(bugs: Iterable[str], *before: str, quick: int = 1) -> list[Any]:
    """Parameters ``before`` and a bug, slow but for the first ``quick``: one takes 2 s to build or 0.3 to emulate."""
    slow = pytest.mark.slow
    return [pytest.param(*before, bug, marks=[] if i < quick else [slow]) for i, bug in enumerate(bugs)]
