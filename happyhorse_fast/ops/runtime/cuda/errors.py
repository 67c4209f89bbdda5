"""The error of CUDA kernels, and the optional packages that they need."""

from __future__ import annotations

import importlib
from typing import Any

from happyhorse_fast.optional import said


class CudaError(RuntimeError):
    """A CUDA kernel cannot be compiled, loaded or launched; the message says which, and why."""


def bindings(name: str) -> Any:
    """A module of cuda-bindings, imported when it is first needed.

    Args:
        name: ``"driver"`` or ``"nvrtc"``.

    Raises:
        CudaError: It is not installed, or does not import.
    """
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except Exception as error:  # a broken one may raise anything
        missing = isinstance(error, ModuleNotFoundError)
        state = f"is not installed ({error})" if missing else f"is installed but does not import ({said(error)})"
        raise CudaError(
            f"cuda-bindings {state}: pip install 'happyhorse-fast[cuda]', or [cuda12] with a torch for CUDA 12"
        ) from error


def cuda_version(number: int) -> str:
    """A version as CUDA numbers it, in words: 13000 is 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}"
