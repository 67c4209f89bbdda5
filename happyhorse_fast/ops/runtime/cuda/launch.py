"""Launches CUDA kernels by name: on a GPU through the driver API, in torch's own context and on its current stream."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from happyhorse_fast.ops.runtime.cuda import images
from happyhorse_fast.ops.runtime.cuda.errors import CudaError, bindings

Grid = tuple[int, int, int]

MOST_SHARED_BYTES = 101_376
"""Shared memory a block may have on every GPU that the kernels are built for; 8.6, 8.9 and 12.0 have no more (CUDA C++
programming guide, technical specifications). A kernel for Hopper alone may have 232,448."""


Runner = Callable[[str, str, ctypes.Structure, Grid, int, int], None]
"""Runs every block of a launch on CPU tensors, as the emulation in csrc/shim/ does, which tests install."""
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
    limits = (2**31 - 1, 65_535, 65_535)
    if len(grid) != 3 or not all(0 <= size <= limit for size, limit in zip(grid, limits, strict=True)):
        raise ValueError(f"grid of {kernel} is {grid}, 3 sizes from 0 to {limits} are allowed")
    if not 1 <= threads <= 1024:
        raise ValueError(f"threads of {kernel} is {threads}, 1 to 1024 are allowed")
    if not 0 <= shared_bytes <= MOST_SHARED_BYTES:
        raise ValueError(f"shared_bytes of {kernel} is {shared_bytes}, 0 to {MOST_SHARED_BYTES} are allowed")
    if 0 in grid:
        return
    device = like.device
    if device.type == "cpu" and _runner is not None:
        return _runner(stem, kernel, params, grid, threads, shared_bytes)
    if device.type != "cuda":
        why = cuda_obstacle(device)
        raise RuntimeError(f"kernel {kernel} of {stem} cannot run on {device}: {why}; or pass backend='reference'")
    cuda = bindings("driver")
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        # The thread may not have made its first call of the runtime yet, and then has no context.
        _checked("cuCtxSetCurrent", cuda.cuCtxSetCurrent(_context(index)))
        with _lock:
            function, origin = _function(index, stem, kernel)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        stream = torch.cuda.current_stream(index).cuda_stream
        _checked(
            f"kernel {kernel} ({origin}) on cuda:{index}, grid {grid}, {threads} threads, {shared_bytes} bytes of "
            "shared memory (or an earlier kernel)",
            cuda.cuLaunchKernel(function, *grid, threads, 1, 1, shared_bytes, stream, ctypes.addressof(pointers), 0),
        )


def cuda_obstacle(device: torch.device) -> str | None:
    """Why CUDA kernels cannot run for tensors on ``device``; None where they can."""
    if device.type != "cuda":
        on_runner = device.type == "cpu" and _runner is not None
        return None if on_runner else f"CUDA kernels need a GPU, the tensors are on {device}"
    try:
        fingerprint(device)
    except CudaError as error:
        return str(error)
    return None


def driver_version() -> int:
    """Version of the driver: 13000 for one that came with CUDA 13.0.

    Raises:
        CudaError: There is no driver, or cuda-bindings is not installed.
    """
    cuda = bindings("driver")
    try:
        (number,) = _checked("cuDriverGetVersion", cuda.cuDriverGetVersion())
    except Exception as error:  # cuda-bindings loads libcuda at its first call
        if isinstance(error, CudaError):
            raise
        raise CudaError(f"no NVIDIA driver is found ({error})") from error
    return int(number)


def fingerprint(device: torch.device) -> str:
    """Digest of what the results of CUDA kernels depend on beside the device: their sources and who compiled them.

    Raises:
        CudaError: They cannot run there.
    """
    driver = driver_version()
    if not torch.cuda.is_available():
        raise CudaError(f"torch {torch.__version__} sees no CUDA device")
    return images.fingerprint(torch.cuda.get_device_capability(device), driver)


_lock = threading.Lock()


@functools.cache
def _context(index: int) -> Any:
    """The primary context of a device, which is torch's; kept for the life of the process, as torch keeps it."""
    cuda = bindings("driver")
    _checked("cuInit", cuda.cuInit(0))
    (device,) = _checked(f"cuDeviceGet {index}", cuda.cuDeviceGet(index))
    (context,) = _checked(f"cuDevicePrimaryCtxRetain {index}", cuda.cuDevicePrimaryCtxRetain(device))
    return context


@functools.cache
def _function(index: int, stem: str, kernel: str) -> tuple[Any, str]:
    """A kernel in the current context, loaded once per device, and what its code is from."""
    if torch.cuda.is_current_stream_capturing():
        raise CudaError(f"kernel {kernel} of {stem} is loaded at its first launch: launch it once before the capture")
    cuda = bindings("driver")
    module, origin = _module(index, stem)
    (handle,) = _checked(f"kernel {kernel} in {origin}", cuda.cuModuleGetFunction(module, kernel.encode()))
    # Without it the driver refuses launches with more than 48 KiB. It permits, but takes nothing: launches do.
    attribute = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    told = cuda.cuFuncSetAttribute(handle, attribute, MOST_SHARED_BYTES)
    _checked(f"{MOST_SHARED_BYTES} bytes of shared memory for kernel {kernel} in {origin}", told)
    return handle, origin


@functools.cache
def _module(index: int, stem: str) -> tuple[Any, str]:
    """A translation unit in the current context, and what its code is from."""
    return images.load(stem, torch.cuda.get_device_capability(index), driver_version(), _load)


def _load(code: bytes) -> Any:
    cuda = bindings("driver")
    # PTX is a string to the driver, which needs its end.
    (module,) = _checked("cuModuleLoadData", cuda.cuModuleLoadData(code if code[:4] == b"\x7fELF" else code + b"\0"))
    return module


def _checked(what: str, result: tuple[Any, ...]) -> tuple[Any, ...]:
    """Hold a call of the driver against its status, and give what it returned besides.

    Raises:
        CudaError: It failed.
    """
    status, *values = result
    if int(status) != 0:
        _, words = bindings("driver").cuGetErrorString(status)
        raise CudaError(f"{what}: {status.name}: {words.decode() if words else 'no description'}")
    return tuple(values)
