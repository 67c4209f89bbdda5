"""Resources of the CUDA kernels as NVRTC compiles them, for every architecture, with no GPU and no toolkit."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.aot.disassembly import Compiled, read
from bench.aot.gates import MOST_REGISTERS, resources
from happyhorse_fast.csrc import sources
from happyhorse_fast.ops.runtime.cuda import binaries, nvrtc

GOOD = Compiled(
    kernel="block_sparse_attention_d64", registers=200, stack=0, shared=1024, opcodes=Counter(HMMA=128, MOV=9)
)
# What the predictions at the top of their sources count on, of 65,536 registers an SM: two blocks of 256 threads, and
# five of 160, which 5120 channels take.
RESIDENT = {"score_blocks": 128, "rmsnorm_quantize": 80}
# 256 values are held across a barrier by each of 1024 threads, which have 64 registers each.
SPILLS = """
extern "C" __global__ void __launch_bounds__(1024) spills(float* x) {
  float held[256];
#pragma unroll
  for (int i = 0; i < 256; ++i) held[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 256; ++i) x[(255 - i) * 1024 + threadIdx.x] = held[i] * held[(i + 64) % 256];
}
extern "C" __global__ void plain(float* x) { x[threadIdx.x] *= 2.0f; }
"""


# Bytes of shared memory that the system takes of every block since sm_90; the tools count them.
SYSTEM_SHARED = 1024
# Tensor-core instructions of the kernels of a translation unit; of others none.
TENSOR_CORES = {"block_sparse_attention": ("HMMA",)}


def problems(kernel: Compiled, stem: str, target: str) -> list[str]:
    """Gates that a kernel of a translation unit fails, with that of how many blocks must fit."""
    found = resources(kernel, TENSOR_CORES.get(stem, ()))
    if kernel.shared > (0 if target.startswith("sm_8") else SYSTEM_SHARED):
        found.append(f"{kernel.shared} bytes of static shared memory; a launch asks for all that a kernel uses")
    most = RESIDENT.get(kernel.kernel, MOST_REGISTERS)
    if most < kernel.registers <= MOST_REGISTERS:
        found.append(f"{kernel.registers} registers, {most} for its blocks an SM")
    return [f"{kernel.kernel} for {target}: {problem}" for problem in found]


def kernels(cubin: bytes) -> list[Compiled]:
    return [kernel for kernel, _ in read(cubin)]


@pytest.mark.slow
@pytest.mark.parametrize("target", sources.ARCHITECTURES)
@pytest.mark.parametrize("stem", sources.stems())
def test_every_kernel_holds_its_gates(stem: str, target: str) -> None:
    found = kernels(nvrtc.compile(stem, target))
    built = binaries.FOLDER / f"{stem}.{target}.cubin"  # of nvcc, where there is one
    found += kernels(built.read_bytes()) if built.is_file() else []
    assert [problem for kernel in found for problem in problems(kernel, stem, target)] == []


@pytest.mark.slow
@pytest.mark.parametrize("target", ["compute_80", "compute_89"])
@pytest.mark.parametrize("stem", sources.stems())
def test_every_kernel_compiles_to_ptx(stem: str, target: str) -> None:
    text = nvrtc.compile(stem, target).decode()
    assert f".target {target.replace('compute', 'sm')}" in text


def test_a_kernel_that_spills_is_found_beside_one_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "DEVICE", tmp_path)
    (tmp_path / "planted.cu").write_text(SPILLS)
    planted = {kernel.kernel: kernel for kernel in kernels(nvrtc.compile("planted", "sm_90a"))}
    assert problems(planted["plain"], "planted", "sm_90a") == []
    found = "\n".join(problems(planted["spills"], "planted", "sm_90a"))
    assert "bytes of stack" in found
    assert "spills: " in found


def test_the_smallest_kernel_holds_its_gates_on_hopper() -> None:
    """The one that `make test` compiles; the others are slow."""
    (kernel,) = kernels(nvrtc.compile("rmsnorm_quantize", "sm_90a"))
    assert problems(kernel, "rmsnorm_quantize", "sm_90a") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"registers": 256}, "256 registers, at most 255 allowed"),
        ({"stack": 16}, "16 bytes of stack"),
        ({"opcodes": Counter(HMMA=128, STL=2)}, "spills: 2 STL, 0 LDL"),
        ({"opcodes": Counter(HMMA=128, LDL=2)}, "spills: 0 STL, 2 LDL"),
        ({"shared": 2048}, "2048 bytes of static shared memory"),
        ({"target": "sm_80"}, "1024 bytes of static shared memory"),
        ({"opcodes": Counter(MOV=9)}, "tensor-core instructions none, not HMMA"),
        ({"opcodes": Counter(HMMA=8, IMMA=8)}, "tensor-core instructions HMMA, IMMA, not HMMA"),
        ({"kernel": "score_blocks", "registers": 129}, "129 registers, 128 for its blocks an SM"),
        ({"stem": "rmsnorm_quantize"}, "tensor-core instructions HMMA, not none"),
    ],
)
def test_each_gate_can_fail(change: dict[str, Any], message: str) -> None:
    unit = {"stem": "block_sparse_attention", "target": "sm_90a"}
    assert problems(GOOD, **unit) == []
    placed = {name: change.pop(name) for name in unit if name in change}
    (problem,) = problems(replace(GOOD, **change), **unit | placed)
    assert message in problem
