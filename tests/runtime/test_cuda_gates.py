"""Resources of the CUDA kernels as NVRTC compiles them, for every architecture, with no GPU and no toolkit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.aot import cubin_gates as gates
from happyhorse_fast.csrc import sources
from happyhorse_fast.ops.runtime.cuda import nvrtc

GOOD = gates.Kernel(
    stem="block_sparse_attention",
    name="block_sparse_attention_d64",
    target="sm_90a",
    registers=200,
    stack=0,
    static_shared=1024,
    local=0,
    tensor_core={"HMMA": 128},
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


def problems(kernel: gates.Kernel) -> list[str]:
    """Gates that a kernel fails, with that of how many blocks must fit."""
    most = RESIDENT.get(kernel.name, gates.MOST_REGISTERS)
    crowded = [f"{kernel.name} for {kernel.target}: {kernel.registers} registers, {most} for its blocks an SM"]
    return gates.problems(kernel) + (crowded if most < kernel.registers <= gates.MOST_REGISTERS else [])


@pytest.mark.slow
@pytest.mark.parametrize("target", sources.ARCHITECTURES)
@pytest.mark.parametrize("stem", sources.stems())
def test_every_kernel_holds_its_gates(stem: str, target: str) -> None:
    assert [problem for kernel in gates.compiled(stem, target) for problem in problems(kernel)] == []


@pytest.mark.slow
@pytest.mark.parametrize("target", sources.VIRTUAL_ARCHITECTURES)
@pytest.mark.parametrize("stem", sources.stems())
def test_every_kernel_compiles_to_ptx(stem: str, target: str) -> None:
    text = nvrtc.compile(stem, target).decode()
    assert f".target {target.replace('compute', 'sm')}" in text


def test_a_kernel_that_spills_is_found_beside_one_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "DEVICE", tmp_path)
    (tmp_path / "planted.cu").write_text(SPILLS)
    kernels = {kernel.name: kernel for kernel in gates.compiled("planted", "sm_90a")}
    assert gates.problems(kernels["plain"]) == []
    found = "\n".join(gates.problems(kernels["spills"]))
    assert "bytes of stack" in found
    assert "instructions on local memory" in found


def test_the_smallest_kernel_holds_its_gates_on_hopper() -> None:
    """The one that `make test` compiles; the others are slow."""
    (kernel,) = gates.compiled("rmsnorm_quantize", "sm_90a")
    assert problems(kernel) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"registers": 256}, "256 registers, at most 255 allowed"),
        ({"stack": 16}, "16 bytes of stack"),
        ({"local": 2}, "2 instructions on local memory"),
        ({"static_shared": 2048}, "2048 bytes of static shared memory"),
        ({"target": "sm_80", "static_shared": 1024}, "1024 bytes of static shared memory"),
        ({"tensor_core": {}}, "tensor-core instructions none, not HMMA"),
        ({"tensor_core": {"HMMA": 8, "IMMA": 8}}, "tensor-core instructions HMMA, IMMA, not HMMA"),
        ({"name": "score_blocks", "registers": 129}, "129 registers, 128 for its blocks an SM"),
        ({"stem": "rmsnorm_quantize"}, "tensor-core instructions HMMA, not none"),
    ],
)
def test_each_gate_can_fail(change: dict[str, object], message: str) -> None:
    assert problems(GOOD) == []
    (problem,) = problems(replace(GOOD, **change))
    assert message in problem
