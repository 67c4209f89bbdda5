"""Makes the sources run from a checkout that is not installed; to be imported before anything that needs kernels.

A GPU machine may have torch and Triton but no network and nothing to install into. There, ``happyhorse_fast`` is found
from the checkout's root, and so are the folders ``kernels/`` and ``csrc/`` beside it, which an installation maps into
the package (docs/decisions/0001-kernels-package-dir.md). Serves as a pytest plugin: ``pytest -p bench.bootstrap``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
from pathlib import Path

import happyhorse_fast

ROOT = Path(__file__).parents[1]
PRIMED_VARIABLE = "HAPPYHORSE_FAST_PRIMED"
"""Set where Triton's cache was filled ahead, or is."""
if importlib.util.find_spec("happyhorse_fast.kernels") is None:
    happyhorse_fast.__path__.append(str(ROOT))


def settle_keys() -> None:
    """Give every kernel the key in Triton's cache that it has whatever ran before.

    Triton merges a called function's global constants into a kernel's key only if that function's own key was asked for
    before (`DependenciesFinder._update_hash`, 3.6.0 and 3.7.1), so that a kernel's key depends on which kernels its
    process launched first. Here all are asked for in one order.
    """
    from triton.runtime.jit import JITCallable

    from happyhorse_fast import kernels

    for module in sorted(found.name for found in pkgutil.iter_modules(kernels.__path__)):
        for _, member in sorted(vars(importlib.import_module(f"happyhorse_fast.kernels.{module}")).items()):
            if isinstance(member, JITCallable):
                _ = member.cache_key  # to ask for it is to settle it


INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1" and importlib.util.find_spec("triton") is not None
"""Whether kernels run in the interpreter, on CPU tensors."""
if os.environ.get(PRIMED_VARIABLE):
    settle_keys()
