"""Whether an optional package works here: found out by importing it, since one that is installed may be broken."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys

EXTRAS = {"PIL": "video", "av": "video", "diffusers": "base", "matplotlib": "plot", "transformers": "pipeline"}
"""Package -> extra of this package that brings it."""
PARTS = {"diffusers": "diffusers.schedulers.scheduling_unipc_multistep", "matplotlib": "matplotlib.figure"}
"""The module to import in a package's place, where the package itself imports what is used of it only later."""
VERSIONS = {"av": ((14, 1), None), "diffusers": ((0, 41), None), "transformers": ((5, 20), (6,))}
"""Versions that fit: from the first, and below the second where there is one. As pyproject.toml asks for them."""

_BROKEN: dict[str, str] = {}
"""Why each package that was found broken is, once it is kept from being imported again."""


def obstacle(package: str) -> str | None:
    """Why an optional package cannot be used, and what to install; None where it can.

    Args:
        package: Its import name.
    """
    extra = EXTRAS.get(package)
    advice = "" if extra is None else f' (pip install "happyhorse-fast[{extra}]")'
    if package in _BROKEN and sys.modules.get(package, _BROKEN) is None:
        return _BROKEN[package]
    if package in ("diffusers", "transformers"):  # which import torch's tracer
        hide_broken_triton()
    try:
        importlib.import_module(package)
        importlib.import_module(PARTS.get(package, package))
    except Exception as error:  # whatever a broken package raises, it is not to be used
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            return f"{package} is not installed{advice}"
        return f"{package} is installed but does not import: {said(error)}"
    unfit = _unfit_version(package)
    return None if unfit is None else f"{unfit}{advice}"


def version_of(distribution: str) -> str | None:
    """The version of a distribution that is installed, whether it imports or not; None where it is not."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unfit_version(package: str) -> str | None:
    """Which version an imported package has and which would fit; None where it fits, or any does."""
    if package not in VERSIONS:
        return None
    least, below = VERSIONS[package]
    found = str(getattr(sys.modules[package], "__version__", ""))
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    if numbers >= least and (below is None or numbers < below):
        return None
    wanted = f">= {'.'.join(map(str, least))}" + ("" if below is None else f" and < {'.'.join(map(str, below))}")
    return f"{package} is of version {found or 'unknown'}, which must be {wanted}"


def hide_broken_triton() -> None:
    """Make a Triton that raises look like one that is missing: torch expects an ImportError alone.

    Its tracer, which tensors without data need too (the device "meta"), would else raise wherever it is first used.
    """
    why_not = obstacle("triton")
    if why_not is not None and "triton" not in sys.modules and "is not installed" not in why_not:
        _BROKEN["triton"] = why_not
        sys.modules["triton"] = None  # type: ignore[assignment]  # what Python's import takes as absent


def require(package: str, purpose: str) -> None:
    """Raise where an optional package cannot be used.

    Raises:
        ImportError: Says what for, why not, and what to install.
    """
    why_not = obstacle(package)
    if why_not is not None:
        raise ImportError(f"{purpose} needs {package}: {why_not}")


def said(error: Exception) -> str:
    """An error's type and the first line of its message."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
