"""Progress of a run: a record per step, and a progress bar made from it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch


@dataclass(frozen=True)
class StepInfo:
    """A finished step, as a ``callback`` gets it.

    Attributes:
        step: Number of the step, from 1.
        steps: Number of steps of the run.
        sigma: Noise level that the step started from.
        seconds: Time the step took, without the callback.
        memory_bytes: Peak so far: memory allocated on the CUDA device that the latents are on, elsewhere the process's
            resident set; None on Windows without CUDA.
        video: [1, C, T, H, W] latent after the step. What the next step starts from: clone it to change it.
        audio: [1, A, Ca] latent after the step; likewise.
    """

    step: int
    steps: int
    sigma: float
    seconds: float
    memory_bytes: int | None
    video: torch.Tensor = field(repr=False)
    audio: torch.Tensor = field(repr=False)


Callback = Callable[[StepInfo], object]
"""Called after every step; what it returns is ignored, what it raises ends the run."""


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak so far, as :attr:`StepInfo.memory_bytes`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


@contextmanager
def bar(title: str, total: float, enabled: bool) -> Iterator[Callable[..., None]]:
    """A bar on stderr, where ``enabled``; what it gives takes ``completed``, ``note`` and ``description``."""
    if not enabled:
        yield lambda **_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=Console(stderr=True)) as shown:
        yield partial(shown.update, shown.add_task(title, total=total, note=""))


@contextmanager
def step_display(title: str, steps: int, enabled: bool) -> Iterator[Callable[[StepInfo], None]]:
    """A bar with the step, seconds per step and peak memory; shows nothing where not ``enabled``."""
    with bar(f"{title}: step 0/{steps}", steps, enabled) as update:

        def show(info: StepInfo) -> None:
            note = f"{info.seconds:.2f} s/step"
            if info.memory_bytes is not None:
                note += f", peak {info.memory_bytes / 2**30:.2f} GiB"
            update(description=f"{title}: step {info.step}/{steps}", completed=info.step, note=note)

        yield show
