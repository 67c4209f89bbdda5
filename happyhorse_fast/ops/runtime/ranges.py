"""Ranges of NVTX around the ops, for profilers such as Nsight Systems; none unless an environment variable asks."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from torch.cuda import nvtx

logger = logging.getLogger(__name__)

VARIABLE = "HAPPYHORSE_FAST_NVTX"
"""1: a range for every call of an op. Read when an op is imported: without it an op costs nothing more."""


def ranged(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """An op's implementation with a range of its name and its first tensor's shape, where :data:`VARIABLE` is 1.

    The range is of the host, while launches are queued; a profiler shows what ran on the device for it.

    Raises:
        ValueError: :data:`VARIABLE` is neither 0 nor 1.
    """
    asked = os.environ.get(VARIABLE) or "0"  # an empty one is none
    if asked not in ("0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {asked!r}")
    if asked == "0" or not _has_nvtx():
        return implementation

    @functools.wraps(implementation)
    def run(first: Any, *rest: Any, **named: Any) -> Any:
        with nvtx.range(f"happyhorse_fast::{implementation.__name__} {list(first.shape)}"):
            return implementation(first, *rest, **named)

    return run


@functools.cache
def _has_nvtx() -> bool:
    """Whether this build of torch has it; one line says where it is missing."""
    try:
        nvtx.range_push("happyhorse_fast")
        nvtx.range_pop()
    except RuntimeError as error:
        logger.warning("%s is set, and there are no ranges: %s", VARIABLE, error)
        return False
    return True
