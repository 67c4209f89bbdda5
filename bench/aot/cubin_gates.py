"""Resource gates of the CUDA kernels' binaries: no stack, no spills, the tensor-core instruction where one is due."""

from __future__ import annotations

import re

from bench.aot.disassembly import Compiled, read
from bench.aot.gates import resources
from happyhorse_fast.ops.runtime.cuda import binaries, nvrtc

SYSTEM_SHARED = 1024
"""Bytes of shared memory that the system takes of every block since sm_90; the tools count them."""
TENSOR_CORES = {"block_sparse_attention": ("HMMA",)}
"""Tensor-core instructions of the kernels of a translation unit; of others none."""


def problems(kernel: Compiled, stem: str, target: str) -> list[str]:
    """Gates that a kernel fails, each in a line; empty where it holds all.

    Args:
        kernel: As it was compiled.
        stem: Its translation unit.
        target: What it was compiled for, such as ``"sm_90a"``.
    """
    found = resources(kernel, TENSOR_CORES.get(stem, ()))
    if kernel.shared > (SYSTEM_SHARED if int(re.findall(r"\d+", target)[0]) >= 90 else 0):
        found.append(f"{kernel.shared} bytes of static shared memory; a launch asks for all that a kernel uses")
    return [f"{kernel.kernel} for {target}: {problem}" for problem in found]


def compiled(stem: str, target: str) -> list[Compiled]:
    """The kernels of a translation unit as NVRTC compiles it now."""
    return [kernel for kernel, _ in read(nvrtc.compile(stem, target))]


def built(stem: str, target: str) -> list[Compiled]:
    """Its kernels in the package's binary, which nvcc built; none where it did not."""
    file = binaries.FOLDER / f"{stem}.{target}.cubin"
    return [kernel for kernel, _ in read(file.read_bytes())] if file.is_file() else []
