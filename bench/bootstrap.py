"""Makes the sources run from a checkout that is not installed; to be imported before anything that needs kernels.

A GPU machine may have torch and Triton but no network and nothing to install into. There, ``happyhorse_fast`` is found
from the checkout's root, and the folder ``kernels/``, which an installation maps to ``happyhorse_fast.kernels``
(docs/decisions/0001-kernels-package-dir.md), is put in that place here. Under ``TRITON_INTERPRET=1`` the interpreter is
made exact as well, as the tests do. Serves as a pytest plugin: ``pytest -p bench.bootstrap``.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
KERNELS = "happyhorse_fast.kernels"


def map_kernels() -> bool:
    """Make ``happyhorse_fast.kernels`` importable; returns whether it was not already."""
    import happyhorse_fast

    if KERNELS in sys.modules or importlib.util.find_spec(KERNELS) is not None:
        return False
    folder = ROOT / "kernels"
    spec = importlib.util.spec_from_file_location(
        KERNELS, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None, folder
    module = importlib.util.module_from_spec(spec)
    sys.modules[KERNELS] = module
    spec.loader.exec_module(module)
    setattr(happyhorse_fast, "kernels", module)  # noqa: B010 - what an import of a submodule does
    return True


def exact_interpreter() -> bool:
    """Make Triton's interpreter exact where kernels are interpreted; returns whether they are."""
    if os.environ.get("TRITON_INTERPRET", "0") != "1" or importlib.util.find_spec("triton") is None:
        return False
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))
    importlib.import_module("interpreter")
    return True


map_kernels()
INTERPRETED = exact_interpreter()
"""Whether kernels run in the interpreter, on CPU tensors."""
