"""Compiles the packaged device code at first use, for the GPU that is there, and keeps the result per user.

NVRTC needs neither a toolkit nor a GPU nor headers. Its results lie in the folder of :mod:`cache_folder`, one file per
translation unit, options, NVRTC and driver, with a digest before the code.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from pathlib import Path
from typing import Any

from happyhorse_fast.csrc import sources
from happyhorse_fast.files import replacing
from happyhorse_fast.ops.runtime.cache_folder import cache_folder
from happyhorse_fast.ops.runtime.cuda.binaries import Capability
from happyhorse_fast.ops.runtime.cuda.errors import CudaError, bindings, cuda_version

logger = logging.getLogger(__name__)


def version() -> int:
    """Version of NVRTC, numbered as drivers are: 13000 for 13.0.

    Raises:
        CudaError: cuda-bindings or NVRTC is not installed.
    """
    nvrtc = bindings("nvrtc")
    try:
        result = nvrtc.nvrtcVersion()
    except Exception as error:  # cuda-bindings loads the library at its first call
        first_line = str(error).partition("\n")[0]
        raise CudaError(f"NVRTC is not installed ({first_line}): pip install nvidia-cuda-nvrtc") from error
    major, minor = _checked("does not tell its version", result)
    return 1000 * int(major) + 10 * int(minor)


def target(capability: Capability, supported: list[int]) -> str:
    """Target to compile for: the GPU itself, the nearest that it runs binaries of, or PTX of the newest there is.

    Args:
        capability: Compute capability.
        supported: What this NVRTC compiles for, 90 for sm_90.

    Raises:
        CudaError: The GPU is older than all of them.
    """
    number = 10 * capability[0] + capability[1]
    if number == 90 and 90 in supported:
        return "sm_90a"
    same_major = [known for known in supported if known // 10 == capability[0] and known <= number]
    if same_major:
        return f"sm_{max(same_major)}"
    older = [known for known in supported if known < number]
    if not older:
        raise CudaError(f"NVRTC compiles for sm_{min(supported)} and later, this GPU is sm_{number}")
    return f"compute_{max(older)}"


def obstacle(capability: Capability, driver: int) -> str | None:
    """Why NVRTC cannot serve a GPU and its driver; None where it can.

    Args:
        capability: Compute capability.
        driver: Version of the driver, as ``cuDriverGetVersion`` has it.
    """
    try:
        own = version()
        wanted = target(capability, _supported())
    except CudaError as error:
        return str(error)
    # A driver runs binaries of every NVRTC of its major version; PTX only where it is not older than NVRTC.
    if own // 1000 > driver // 1000 or (wanted.startswith("compute_") and own > driver):
        return (
            f"NVRTC {cuda_version(own)} makes code that a driver for CUDA {cuda_version(driver)} does not load: take "
            "a newer driver, or 'happyhorse-fast[cuda12]' with a torch for CUDA 12"
        )
    try:
        with tempfile.TemporaryFile(dir=cache_folder()):
            pass
    except OSError as error:
        return f"the cache of compiled kernels cannot be written: {error}; HAPPYHORSE_FAST_CACHE names another folder"
    return None


def compile(stem: str, wanted: str) -> bytes:
    """A translation unit as a cubin, or as PTX where ``wanted`` is virtual; no GPU is needed.

    Args:
        stem: The translation unit.
        wanted: Such as ``sm_90a`` or ``compute_80``.

    Raises:
        CudaError: It does not compile; the message has the compiler's words.
    """
    nvrtc = bindings("nvrtc")
    texts = sources.texts(stem)
    unit = texts.pop(f"{stem}.cu")
    headers, names = [text.encode() for text in texts.values()], [name.encode() for name in texts]
    created = nvrtc.nvrtcCreateProgram(unit.encode(), f"{stem}.cu".encode(), len(names), headers, names)
    (program,) = _checked(f"does not take {stem}", created)
    try:
        options = [option.encode() for option in _options(wanted)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(status) != 0:
            _, size = nvrtc.nvrtcGetProgramLogSize(program)
            log = b" " * size
            nvrtc.nvrtcGetProgramLog(program, log)
            words = log.rstrip(b"\0 \n").decode(errors="replace")
            raise CudaError(f"NVRTC does not compile {stem} for {wanted}: {status.name}\n{words}")
        kind = "CUBIN" if wanted.startswith("sm_") else "PTX"
        _, size = getattr(nvrtc, f"nvrtcGet{kind}Size")(program)
        code = b" " * size
        _checked(f"does not return {stem} for {wanted}", getattr(nvrtc, f"nvrtcGet{kind}")(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def compiled(stem: str, capability: Capability, driver: int) -> bytes:
    """A translation unit for a GPU: from the cache, or compiled now and put there.

    A cached file that is not what was written is reported, and compiled again.

    Args:
        stem: The translation unit.
        capability: Compute capability.
        driver: Version of the driver, as ``cuDriverGetVersion`` has it.

    Raises:
        CudaError: It does not compile.
    """
    wanted = target(capability, _supported())
    try:
        path = cache_path(stem, wanted, driver)
    except OSError as error:
        logger.warning("compiled kernels of %s cannot be kept: %s", stem, error)
        return compile(stem, wanted)
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            return content[32:]
        logger.warning(
            "%s cannot be used and is compiled again: its digest does not match its %d bytes", path, len(content)
        )
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("%s cannot be used and is compiled again: %s", path, error)
    code = compile(stem, wanted)
    try:
        with replacing(path) as partial:
            partial.touch(0o600)
            partial.write_bytes(hashlib.sha256(code).digest() + code)
    except OSError as error:
        logger.warning("compiled kernels of %s cannot be kept: %s", stem, error)
    return code


def cache_path(stem: str, wanted: str, driver: int) -> Path:
    """Where a compiled translation unit is kept.

    Raises:
        OSError: There is no folder of the user's own for it.
    """
    parts = [sources.digest(stem), *_options(wanted), str(version()), str(driver)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return cache_folder() / f"{stem}.{wanted}.{key[:32]}.bin"


def _options(wanted: str) -> list[str]:
    return [*sources.OPTIONS, f"--gpu-architecture={wanted}"]


def _supported() -> list[int]:
    (numbers,) = _checked("does not tell what it compiles for", bindings("nvrtc").nvrtcGetSupportedArchs())
    return [int(number) for number in numbers]


def _checked(what: str, result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call of NVRTC returned besides its status; CudaError where that is one."""
    status, *values = result
    if int(status) != 0:
        raise CudaError(f"NVRTC {what}: {status.name}")
    return tuple(values)
