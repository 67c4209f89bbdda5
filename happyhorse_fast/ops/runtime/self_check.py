"""Whether kernels give right numbers on this machine: small shapes of every op against its reference, in seconds."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from happyhorse_fast import ambient
from happyhorse_fast.budgets import measure, violations
from happyhorse_fast.ops.runtime.checks import require_backend
from happyhorse_fast.ops.runtime.formats import VARIANTS, uses_e4m3
from happyhorse_fast.ops.runtime.obstacles import lost
from happyhorse_fast.ops.runtime.op_checks import CHECKS, Compared

RAISED, LOST = "raised", "lost"
"""Faults of a check, see :class:`KernelCheck`."""


@dataclass(frozen=True)
class KernelCheck:
    """Outcome of one kernel in one format.

    Attributes:
        op: The op.
        variant: The format, as in :data:`VARIANTS`.
        passed: Whether every result was within its budget.
        detail: The worst measured distance, or what went wrong.
        seconds: Time it took, compilation included.
        fault: Empty where the numbers decided. :data:`RAISED`: the check could not be made now (no memory, no compiler,
            a full disk), which says nothing of the next process. :data:`LOST`: it ended this process's use of the GPU.
    """

    op: str
    variant: str
    passed: bool
    detail: str
    seconds: float
    fault: str = ""


def run_checks(
    backend: str, device: torch.device, *, fp8: bool, only: Collection[tuple[str, str]] | None = None
) -> Iterator[KernelCheck]:
    """Check every op of a backend on a device.

    Args:
        backend: ``"triton"`` or ``"cuda"``.
        device: Where to run.
        fp8: Whether to check the e4m3 formats too.
        only: The ops and formats to check, all where None.

    Yields:
        An outcome per op and format that the backend has, those with e4m3 last. A kernel that raises has failed; the
        error is its detail. One that ends this process's use of the GPU, as an illegal address does, is the last: later
        ones would be blamed.

    Raises:
        ValueError: There is no such backend.
    """
    require_backend(backend, tuple(VARIANTS))
    every = [(op, variant) for op in CHECKS for variant in VARIANTS[backend].get(op, ())]
    for op, variant in sorted(every, key=lambda each: uses_e4m3(each[1])):
        if (uses_e4m3(variant) and not fp8) or (only is not None and (op, variant) not in only):
            continue
        start, fault = time.perf_counter(), ""
        try:
            with ambient.held():  # a caller's TF32 would fail a right kernel, and be remembered
                passed, detail = _judge(CHECKS[op](backend, device, variant))
        except Exception as error:  # whatever a compiler or driver raises, the kernel is not to be used
            passed, detail = False, f"{type(error).__name__}: {error}"
            fault = LOST if lost(device) else RAISED
        yield KernelCheck(op, variant, passed, detail, time.perf_counter() - start, fault)
        if fault == LOST:
            return


def _judge(compared: Compared) -> tuple[bool, str]:
    worst = 0.0
    for name, (result, reference, distance) in compared.items():
        error = measure(result.cpu().float(), reference.cpu().float())
        found = violations(error, distance=distance, slope=None)
        if found:
            return False, f"{name}: {'; '.join(found)}"
        worst = max(worst, error.tile_distance)
    return True, f"worst tile distance {worst:.1e}"
