"""Answers to what a launcher asks of the device."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch

from happyhorse_fast.ops.runtime.checks import compute_capability

# In the interpreter: a few programs, so that each walks several tiles, and the first architecture that has e4m3.
INTERPRETED_PROGRAMS = 4
INTERPRETED_ARCHITECTURE = 89
PRETENDED_PROGRAMS = 132
"""Multiprocessors of an H100: the size of a grid, which no kernel is compiled for."""


@dataclasses.dataclass(frozen=True)
class Told:
    """What launchers are told in place of a GPU's answer, where they are.

    Attributes:
        arch: Compute capability, for tensors that are on no GPU.
        programs: Multiprocessors.
        by_pointers: Whether no TMA descriptor can be made.
    """

    arch: int | None = None
    programs: int | None = None
    by_pointers: bool = False


_told = Told()


@contextlib.contextmanager
def _telling(**answers: Any) -> Iterator[None]:
    global _told
    before = {name: getattr(_told, name) for name in answers}
    _told = dataclasses.replace(_told, **answers)
    try:
        yield
    finally:
        _told = dataclasses.replace(_told, **before)  # not what another thread has told since


def pretend(arch: int) -> contextlib.AbstractContextManager[None]:
    """Launch for tensors on the device "meta" as on a GPU of compute capability ``arch``: to compile ahead of time.

    Whoever asks how tensors on the CPU would be launched is told the same.
    """
    return _telling(arch=arch)


def by_pointers() -> contextlib.AbstractContextManager[None]:
    """Launch without TMA descriptors, as for tensors that none can be made of."""
    return _telling(by_pointers=True)


def few_programs(count: int = 3) -> contextlib.AbstractContextManager[None]:
    """Launch persistent grids as on a GPU of ``count`` multiprocessors, so that a program walks several tiles."""
    return _telling(programs=count)


def addressable(x: torch.Tensor) -> bool:
    """Whether TMA descriptors may be made where ``x`` is: on a GPU, outside of :func:`by_pointers`."""
    return not _told.by_pointers and (x.is_cuda or _told.arch is not None)


def architecture(device: torch.device) -> int:
    """Compute capability as 90 for 9.0."""
    return compute_capability(device) or _told.arch or INTERPRETED_ARCHITECTURE


def multiprocessors(device: torch.device) -> int:
    """Programs of a persistent grid that holds one program per multiprocessor; fewer inside :func:`few_programs`."""
    return _told.programs or counted_multiprocessors(device)


@functools.cache
def counted_multiprocessors(device: torch.device) -> int:
    """Multiprocessors that a device has."""
    if device.type == "meta":
        return PRETENDED_PROGRAMS
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def descriptors_work(*tensors: torch.Tensor) -> bool:
    """Whether tensors of one device can be reached through TMA descriptors in this call: 16-byte aligned rows."""
    return addressable(tensors[0]) and all(
        t.data_ptr() % 16 == 0 and t.stride(-2) * t.element_size() % 16 == 0 for t in tensors
    )
