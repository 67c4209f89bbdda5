"""Answers to what a launcher asks of the device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

# In the interpreter: a few programs, so that each walks several tiles, and the first architecture that has e4m3.
INTERPRETED_PROGRAMS = 4
INTERPRETED_ARCHITECTURE = 89
PRETENDED_PROGRAMS = 132
"""Multiprocessors of an H100: the size of a grid, which no kernel is compiled for."""


_pretended: int | None = None
"""Compute capability that launchers are told in place of a GPU's."""
_by_pointers = False
_programs: int | None = None
"""Multiprocessors that launchers are told in place of a GPU's."""


@contextlib.contextmanager
def pretend(arch: int) -> Iterator[None]:
    """Launch for tensors on the device "meta" as on a GPU of compute capability ``arch``: to compile ahead of time.

    Whoever asks how tensors on the CPU would be launched is told the same.
    """
    global _pretended
    before, _pretended = _pretended, arch
    try:
        yield
    finally:
        _pretended = before


@contextlib.contextmanager
def by_pointers() -> Iterator[None]:
    """Launch without TMA descriptors, as for tensors that none can be made of."""
    global _by_pointers
    before, _by_pointers = _by_pointers, True
    try:
        yield
    finally:
        _by_pointers = before


@contextlib.contextmanager
def few_programs(count: int = 3) -> Iterator[None]:
    """Launch persistent grids as on a GPU of ``count`` multiprocessors, so that a program walks several tiles."""
    global _programs
    before, _programs = _programs, count
    try:
        yield
    finally:
        _programs = before


def addressable(x: torch.Tensor) -> bool:
    """Whether TMA descriptors may be made where ``x`` is: on a GPU, outside of :func:`by_pointers`."""
    return not _by_pointers and (x.is_cuda or _pretended is not None)


def architecture(device: torch.device) -> int:
    """Compute capability as 90 for 9.0."""
    if device.type != "cuda" and _pretended is not None:
        return _pretended
    if device.type != "cuda":
        return INTERPRETED_ARCHITECTURE
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """Programs of a persistent grid that holds one program per multiprocessor; fewer inside :func:`few_programs`."""
    return counted_multiprocessors(device) if _programs is None else _programs


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
