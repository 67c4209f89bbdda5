"""Resource gates of the CUDA kernels' binaries: no stack, no spills, the tensor-core instruction where one is due.

python -m bench.aot.cubin_gates            the package's binaries, which nvcc built
python -m bench.aot.cubin_gates --nvrtc    what NVRTC compiles now, for every architecture; needs no toolkit
"""

from __future__ import annotations

import bench.bootstrap  # isort: skip - first: maps the device code # noqa: F401

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.aot import disassembly
from happyhorse_fast.csrc import sources
from happyhorse_fast.ops.runtime.cuda import binaries, nvrtc

MOST_REGISTERS = 255
SYSTEM_SHARED = 1024
"""Bytes of shared memory that the system takes of every block since sm_90; the tools count them."""
TENSOR_CORES = {"block_sparse_attention": {"HMMA"}}
"""Tensor-core instructions of the kernels of a translation unit; of others none."""


@dataclass(frozen=True)
class Kernel:
    """A kernel in a binary.

    Attributes:
        stem: Its translation unit.
        name: Its name.
        target: What it was compiled for.
        registers: Per thread.
        stack: Bytes per thread.
        static_shared: Bytes per block, without what a launch adds.
        local: Number of instructions that store to or load from local memory.
        tensor_core: Its tensor-core instructions and how many of each.
    """

    stem: str
    name: str
    target: str
    registers: int
    stack: int
    static_shared: int
    local: int
    tensor_core: dict[str, int]


def measure(stem: str, target: str, cubin: Path) -> list[Kernel]:
    """The kernels of a binary."""
    used, listed = disassembly.usage(cubin), disassembly.opcodes(disassembly.listing(cubin))
    if not used or set(used) != set(listed):
        raise ValueError(f"{cubin} has kernels {sorted(used)} and listings of {sorted(listed)}")
    return [
        Kernel(
            stem=stem,
            name=name,
            target=target,
            registers=registers,
            stack=stack,
            static_shared=shared,
            local=listed[name]["STL"] + listed[name]["LDL"],
            tensor_core={code: n for code, n in sorted(listed[name].items()) if code.endswith("MMA")},
        )
        for name, (registers, stack, shared) in used.items()
    ]


def problems(kernel: Kernel) -> list[str]:
    """Gates that a kernel fails, each in a line; empty where it holds all."""
    found = []
    if kernel.registers > MOST_REGISTERS:
        found.append(f"{kernel.registers} registers, at most {MOST_REGISTERS} allowed")
    if kernel.stack:
        found.append(f"{kernel.stack} bytes of stack")
    if kernel.local:
        found.append(f"{kernel.local} instructions on local memory")
    if kernel.static_shared > (SYSTEM_SHARED if int(re.findall(r"\d+", kernel.target)[0]) >= 90 else 0):
        found.append(f"{kernel.static_shared} bytes of static shared memory; a launch asks for all that a kernel uses")
    wanted = TENSOR_CORES.get(kernel.stem, set())
    if set(kernel.tensor_core) != wanted:
        used = ", ".join(kernel.tensor_core) or "none"
        found.append(f"tensor-core instructions {used}, not {', '.join(wanted) or 'none'}")
    return [f"{kernel.name} for {kernel.target}: {problem}" for problem in found]


def compiled(stem: str, target: str) -> list[Kernel]:
    """The kernels of a translation unit as NVRTC compiles it now."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{stem}.cubin"
        cubin.write_bytes(nvrtc.compile(stem, target))
        return measure(stem, target, cubin)


def _kernels(by_nvrtc: bool) -> Iterator[Kernel]:
    for stem in sources.stems():
        if by_nvrtc:
            for target in sources.ARCHITECTURES:
                yield from compiled(stem, target)
        else:
            for target, file in binaries.manifest()["stems"][stem]["binaries"].items():
                if target.startswith("sm_"):
                    yield from measure(stem, target, binaries.FOLDER / file["file"])


def main() -> None:
    """Print a line per kernel; fail where a gate fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvrtc", action="store_true", help="compile now, instead of reading the package's binaries")
    failed = []
    for kernel in _kernels(parser.parse_args().nvrtc):
        instructions = ", ".join(f"{code} {count}" for code, count in kernel.tensor_core.items())
        print(f"{kernel.target:8} {kernel.name:32} {kernel.registers:3} registers  {instructions}".rstrip(), flush=True)
        failed += problems(kernel)
    sys.exit("\n".join(failed) or None)


if __name__ == "__main__":
    main()
