"""Loads and launches CUDA kernels through the driver API, in torch's own context and on its current stream."""

from __future__ import annotations

import ctypes
import functools
import threading
from dataclasses import dataclass
from typing import Any

import torch

from happyhorse_fast.ops.runtime.cuda import images
from happyhorse_fast.ops.runtime.cuda.errors import CudaError, bindings


@dataclass
class Function:
    """A kernel on a device.

    Attributes:
        handle: The driver's.
        origin: What code it is from.
        shared_bytes: Dynamic shared memory that it may be launched with, raised when more is asked for.
    """

    handle: Any
    origin: str
    shared_bytes: int = 48 * 1024


_lock = threading.Lock()


def version() -> int:
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


def obstacle(device: torch.device) -> str | None:
    """Why CUDA kernels cannot run on a CUDA device; None where they can."""
    try:
        fingerprint(device)
    except CudaError as error:
        return str(error)
    return None


def fingerprint(device: torch.device) -> str:
    """Digest of what the results of CUDA kernels depend on beside the device: their sources and who compiled them.

    Raises:
        CudaError: They cannot run there.
    """
    driver = version()
    if not torch.cuda.is_available():
        raise CudaError(f"torch {torch.__version__} sees no CUDA device")
    return images.fingerprint(torch.cuda.get_device_capability(device), driver)


def launch(
    stem: str,
    kernel: str,
    params: ctypes.Structure,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    device: torch.device,
) -> None:
    """Launch a kernel on a device; :func:`happyhorse_fast.ops.runtime.cuda.launch.launch` has the arguments.

    Raises:
        CudaError: It cannot be loaded or launched, or an earlier kernel failed.
    """
    cuda = bindings("driver")
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        # The thread may not have made its first call of the runtime yet, and then has no context.
        _checked("cuCtxSetCurrent", cuda.cuCtxSetCurrent(_context(index)))
        with _lock:
            function = _function(index, stem, kernel)
            where = f"kernel {kernel} ({function.origin}) on cuda:{index}"
            if shared_bytes > function.shared_bytes:  # beyond 48 KiB a kernel must be told before it is launched
                attribute = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                told = cuda.cuFuncSetAttribute(function.handle, attribute, shared_bytes)
                _checked(f"{shared_bytes} bytes of shared memory for {where}", told)
                function.shared_bytes = shared_bytes
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        stream = torch.cuda.current_stream(index).cuda_stream
        _checked(
            f"{where}, grid {grid}, {threads} threads, {shared_bytes} bytes of shared memory (or an earlier kernel)",
            cuda.cuLaunchKernel(
                function.handle, *grid, threads, 1, 1, shared_bytes, stream, ctypes.addressof(pointers), 0
            ),
        )


@functools.cache
def _context(index: int) -> Any:
    """The primary context of a device, which is torch's; kept for the life of the process, as torch keeps it."""
    cuda = bindings("driver")
    _checked("cuInit", cuda.cuInit(0))
    (device,) = _checked(f"cuDeviceGet {index}", cuda.cuDeviceGet(index))
    (context,) = _checked(f"cuDevicePrimaryCtxRetain {index}", cuda.cuDevicePrimaryCtxRetain(device))
    return context


@functools.cache
def _function(index: int, stem: str, kernel: str) -> Function:
    """A kernel in the current context, loaded once per device."""
    if torch.cuda.is_current_stream_capturing():
        raise CudaError(f"kernel {kernel} of {stem} is loaded at its first launch: launch it once before the capture")
    cuda = bindings("driver")
    module, origin = _module(index, stem)
    (handle,) = _checked(f"kernel {kernel} in {origin}", cuda.cuModuleGetFunction(module, kernel.encode()))
    return Function(handle, origin)


@functools.cache
def _module(index: int, stem: str) -> tuple[Any, str]:
    """A translation unit in the current context, and what its code is from."""
    return images.load(stem, torch.cuda.get_device_capability(index), version(), _load)


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
