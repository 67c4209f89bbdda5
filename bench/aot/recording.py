"""Kernels that launchers launch, recorded without a GPU and compiled in forks of the process that recorded them.

Triton's own JIT specialises the arguments (alignment, ones, Nones, descriptors): a stand-in driver names the
architecture, and Triton's cache hook takes the specialisation out just before it would be compiled and launched. So
what is compiled is what is launched.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import triton
from triton.backends.compiler import GPUTarget

from bench.bootstrap import INTERPRETED

KERNELS_EACH = 30
"""Of one process: the compiler's memory grows."""
T = TypeVar("T")


@dataclass(frozen=True)
class Driver:
    """Answers what Triton's JIT asks of a driver before it launches: a device, which here is an architecture."""

    arch: int

    def get_current_device(self) -> int:
        """A device per architecture: the JIT caches per device."""
        return self.arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_stream(self, device: int) -> int:
        return 0

    def activate(self) -> None:
        """Stand in for the GPU of this process and its forks."""
        if INTERPRETED:
            sys.exit("TRITON_INTERPRET must not be set: nothing would be compiled")
        triton.runtime.driver.set_active(self)


@dataclass(frozen=True)
class Launch:
    """A kernel as Triton's JIT specialised it.

    Attributes:
        module: Of the jitted function.
        name: Its name there.
        specialised: Signature, constants, attributes and options, as Triton writes them for `preload`.
        source: What launched it first.
    """

    module: str
    name: str
    specialised: str
    source: Any

    @property
    def kernel(self) -> Any:
        """The jitted function."""
        return getattr(importlib.import_module(self.module), self.name)


def record(calls: Iterable[tuple[Any, int, Callable[[], object]]]) -> list[Launch]:
    """The distinct kernels that calls launch, in their order, of which none is compiled.

    Args:
        calls: (source, compute capability, call); what several launch is the first one's.
    """
    found: dict[tuple[int, str], Launch] = {}
    with triton.knobs.runtime.scope(), triton.knobs.language.scope():
        # The other default, so that a launch that does not say which it wants shows.
        triton.knobs.language.default_fp_fusion = False
        for source, arch, call in calls:
            Driver(arch).activate()
            triton.knobs.runtime.jit_cache_hook = functools.partial(_keep, found, source, arch)
            call()
    return list(found.values())


def _keep(
    found: dict[tuple[int, str], Launch], source: Any, arch: int, *, fn: Any, compile: dict[str, Any], **_: object
) -> bool:
    specialised = compile["specialization_data"]
    found.setdefault((arch, specialised), Launch(fn.module, fn.name, specialised, source))
    return True  # do not compile, do not launch


def in_forks(work: Callable[[Launch], T], launches: Sequence[Launch], jobs: int) -> tuple[list[T], list[str]]:
    """(what work made of launches, in their order, in words how others failed); each is told as it is done.

    Args:
        work: What a process does on a launch.
        launches: What to work on.
        jobs: Processes side by side.
    """
    results, failures = list[Any](), list[str]()
    fork = multiprocessing.get_context("fork")  # which has what was recorded, and imports nothing again
    for first in range(0, len(launches), jobs * KERNELS_EACH):
        with ProcessPoolExecutor(jobs, fork) as pool:
            batch = launches[first : first + jobs * KERNELS_EACH]
            for place, done in enumerate([pool.submit(_tried, work, launch) for launch in batch], first):
                lost = done.exception()  # of the process, such as one without memory
                result, error = (None, repr(lost)) if lost else done.result()
                said = f"{launches[place].name} of {launches[place].source}"
                if error:
                    failures.append(f"{said} does not compile: {error}")
                else:
                    results.append(result)
                print(f"{place + 1}/{len(launches)} {said}: {error or 'compiled'}", flush=True)
    return results, failures


def _tried(work: Callable[[Launch], T], launch: Launch) -> tuple[T | None, str]:
    try:
        return work(launch), ""
    except Exception as error:  # the compiler's own errors are of many kinds; one must not hide the others
        return None, f"{type(error).__name__}: {str(error)[-500:]}"
