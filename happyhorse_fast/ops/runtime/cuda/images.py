"""Code for a GPU and its driver, in order of preference: a binary of the package, else what NVRTC compiles now."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from happyhorse_fast.csrc import sources
from happyhorse_fast.ops.runtime.cuda import binaries, nvrtc
from happyhorse_fast.ops.runtime.cuda.binaries import Capability
from happyhorse_fast.ops.runtime.cuda.errors import CudaError, cuda_version

logger = logging.getLogger(__name__)

OLDEST: Capability = (8, 0)
"""The kernels use mma.sync for bf16 and cp.async."""


def load(stem: str, capability: Capability, driver: int, accept: Callable[[bytes], Any] | None) -> tuple[Any, str]:
    """Hand the code of a translation unit to ``accept``, best first, until it takes one.

    Code that should serve and does not is reported by a warning.

    Args:
        stem: The translation unit.
        capability: Compute capability.
        driver: Version of the driver, as ``cuDriverGetVersion`` has it.
        accept: Loads code; raises CudaError where it cannot. None: the first is named, a binary once it is read, and
            nothing is compiled.

    Returns:
        What ``accept`` returned, and the name of the code.

    Raises:
        CudaError: None serves; the message has each and its reason.
    """
    why_not: list[str] = []
    for name, code, is_built in _images(stem, capability, driver, why_not):
        try:
            read = code() if accept or is_built else b""
            return accept(read) if accept else None, name
        except CudaError as error:
            why_not.append(f"{name}: {error}")
            if accept:
                logger.warning("%s; the next best code is tried", why_not[-1])
    raise CudaError(f"no code for {stem}: {'; '.join(why_not)}")


def first(stem: str, capability: Capability, driver: int) -> str:
    """Name of the code that :func:`load` begins with; nothing is compiled.

    Raises:
        CudaError: None serves; the message has each and its reason.
    """
    return load(stem, capability, driver, None)[1]


def fingerprint(capability: Capability, driver: int) -> str:
    """Digest of every translation unit's sources and of what compiled them for a GPU and its driver.

    Raises:
        CudaError: The GPU is too old, or one has no code.
    """
    if capability < OLDEST:
        raise CudaError(
            f"CUDA kernels need sm_{OLDEST[0]}{OLDEST[1]} or later, this GPU is sm_{capability[0]}{capability[1]}"
        )
    whole = hashlib.sha256()
    for stem in sources.stems():
        whole.update(f"{stem} {sources.digest(stem)} {first(stem, capability, driver)}\n".encode())
    return whole.hexdigest()


def _images(
    stem: str, capability: Capability, driver: int, why_not: list[str]
) -> Iterator[tuple[str, Callable[[], bytes], bool]]:
    """Code that should serve, best first; reasons why other code does not go to ``why_not``.

    Yields:
        Its name, what reads it or compiles it, and whether it is built already.
    """
    usable, reason = binaries.usable(stem, capability, driver)
    why_not += [reason] if reason else []
    for name, sha256 in usable.items():
        yield name, functools.partial(binaries.read, name, sha256), True
    # Asked last: it loads NVRTC, which a binary makes needless.
    obstacle = nvrtc.obstacle(capability, driver)
    if obstacle is not None:
        why_not.append(obstacle)
        return
    compiled = functools.partial(nvrtc.compiled, stem, capability, driver)
    yield f"NVRTC {cuda_version(nvrtc.version())}", compiled, False
