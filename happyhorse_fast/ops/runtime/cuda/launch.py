"""Launches of CUDA kernels by name: through the driver on a GPU, through a runner that tests install on the CPU."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Protocol

import torch

from happyhorse_fast.ops.runtime.cuda import driver

Grid = tuple[int, int, int]

MOST_SHARED_BYTES = 101_376
"""Shared memory a block may have on every GPU that the kernels are built for; 8.6, 8.9 and 12.0 have no more (CUDA C++
programming guide, technical specifications). A kernel for Hopper alone may have 232,448."""


class Runner(Protocol):
    """Executes kernels on CPU tensors: the emulation in csrc/shim/, which tests install."""

    def run(
        self, stem: str, kernel: str, params: ctypes.Structure, grid: Grid, threads: int, shared_bytes: int
    ) -> None:
        """Run every block of a launch; the arguments are those of :func:`launch`."""


_runner: Runner | None = None


@contextlib.contextmanager
def use_runner(runner: Runner | None) -> Iterator[None]:
    """Within it, launches on CPU tensors go to ``runner``; for every thread, since it stands for a device."""
    global _runner
    before, _runner = _runner, runner
    try:
        yield
    finally:
        _runner = before


def launch(
    stem: str,
    kernel: str,
    params: ctypes.Structure,
    grid: Grid,
    threads: int,
    shared_bytes: int,
    like: torch.Tensor,
) -> None:
    """Launch a kernel of csrc/device/ on the current stream of ``like``'s device.

    The launch is asynchronous, so whoever calls keeps the tensors behind the pointers alive as for any op on a stream.
    The first launch of a kernel on a device loads its module and may compile it: not to happen in a graph capture.

    Args:
        stem: Translation unit, as in ``csrc/device/<stem>.cu``.
        kernel: Its ``extern "C" __global__`` function.
        params: The one parameter, by value; laid out as the kernel's struct.
        grid: Blocks in x, y, z; where one is 0 there is nothing to do.
        threads: Threads of a block, along x.
        shared_bytes: Dynamic shared memory of a block, in bytes.
        like: A tensor on the device to run on.

    Raises:
        ValueError: The grid or the block is none that every device takes.
        CudaError: The kernel cannot be loaded or launched; the message says why.
        RuntimeError: ``like`` is on the CPU and no runner is installed, or on a device that is neither.
    """
    _check_shape(kernel, grid, threads, shared_bytes)
    if 0 in grid:
        return
    device = like.device
    if device.type == "cuda":
        driver.launch(stem, kernel, params, grid, threads, shared_bytes, device)
    elif device.type == "cpu" and _runner is not None:
        _runner.run(stem, kernel, params, grid, threads, shared_bytes)
    else:
        why = cuda_obstacle(device)
        raise RuntimeError(f"kernel {kernel} of {stem} cannot run on {device}: {why}; or pass backend='reference'")


def cuda_obstacle(device: torch.device) -> str | None:
    """Why CUDA kernels cannot run for tensors on ``device``; None where they can."""
    if device.type == "cuda":
        return driver.obstacle(device)
    if device.type == "cpu" and _runner is not None:
        return None
    return f"CUDA kernels need a GPU, the tensors are on {device}"


def _check_shape(kernel: str, grid: Grid, threads: int, shared_bytes: int) -> None:
    limits = (2**31 - 1, 65_535, 65_535)
    if len(grid) != 3 or not all(0 <= size <= limit for size, limit in zip(grid, limits, strict=True)):
        raise ValueError(f"grid of {kernel} is {grid}, 3 sizes from 0 to {limits} are allowed")
    if not 1 <= threads <= 1024:
        raise ValueError(f"threads of {kernel} is {threads}, 1 to 1024 are allowed")
    if not 0 <= shared_bytes <= MOST_SHARED_BYTES:
        raise ValueError(f"shared_bytes of {kernel} is {shared_bytes}, 0 to {MOST_SHARED_BYTES} are allowed")
