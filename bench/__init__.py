"""Measurements of the kernels; not part of the installed package."""

from __future__ import annotations

import time
from collections.abc import Sequence

LOST = 3
"""Exit code of a command that stopped because the GPU is lost to its process; it may be started again for the rest."""
STARTED = time.monotonic()
"""When this process began, torch's seconds of importing included."""


def began(argv: Sequence[str] | None) -> float:
    """When the work that ``argv`` asks for began: with the process, where it is the process's own command line."""
    return STARTED if argv is None else time.monotonic()
