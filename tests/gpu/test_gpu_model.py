"""Accelerated models on the GPU against recorded outputs, and layers that never wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_support import DEVICE, DRY, MARKS

from happyhorse_fast import golden
from happyhorse_fast.budgets import measure
from happyhorse_fast.fast.accelerate import accelerate
from happyhorse_fast.fast.config import FastConfig, Tiles, TopK, TopP

pytestmark = MARKS
# The smallest case: 40 s in the interpreter where the others take minutes.
CASES = ["postnorm_v2_fp32"] if DRY else ["dense_v2_fp32", "local_d128_fp32", "local_v1_fp32", "postnorm_v2_fp32"]
# As tests/fast/test_fast_model.py: 8.5e-2 at most with the reference.
FP8_MODEL_BUDGET = 0.12


def velocities(model: torch.nn.Module, case: golden.GoldenCase) -> list[torch.Tensor]:
    inputs = [case.tensors[f"in.{name}"].to(DEVICE) for name in ("video", "audio", "text")]
    with torch.no_grad():
        return [x.cpu() for x in model(*inputs)]


def errors(outputs: list[torch.Tensor], case: golden.GoldenCase) -> list[float]:
    wanted = (case.tensors["out.video"], case.tensors["out.audio"])
    return [measure(x, y.double()).relative_l2 for x, y in zip(outputs, wanted, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_bf16_within_twice_eagers_own_error(name: str) -> None:
    case = golden.load_case(name)
    model = case.model(torch.bfloat16).to(DEVICE)
    eager = errors(velocities(model, case), case)
    fast = errors(velocities(accelerate(model, FastConfig(backend="triton")), case), case)
    assert all(ours <= 2 * theirs for ours, theirs in zip(fast, eager, strict=True)), (fast, eager)


@pytest.mark.skipif(DRY, reason="another 40 s per format in the interpreter; `make check` runs them")
@pytest.mark.parametrize("attention", ["fp8", "int8_qk_fp8_v", "int8_qk", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_fp8_error_is_as_stated(name: str, attention: Any) -> None:
    case = golden.load_case(name)
    fast = FastConfig(precision="fp8", attention=attention, backend="triton")
    model = accelerate(case.model(torch.bfloat16).to(DEVICE), fast)
    for error in errors(velocities(model, case), case):
        assert 1e-2 < error <= FP8_MODEL_BUDGET


@pytest.mark.skipif(DRY, reason="another 80 s per policy in the interpreter")
@pytest.mark.parametrize("sparsity", [TopK(1.0), TopP(1.0), Tiles(99, 99, 99)])
def test_a_policy_that_keeps_everything_is_exact(sparsity: Any) -> None:
    case = golden.load_case("local_v1_fp32")
    exact, kept = (
        velocities(
            accelerate(case.model(torch.bfloat16).to(DEVICE), FastConfig(backend="triton", sparsity=policy)), case
        )
        for policy in (None, sparsity)
    )
    for a, b in zip(exact, kept, strict=True):
        assert measure(b, a.double()).relative_l2 < 4e-3  # as tests/fast/test_fast_model.py


@pytest.mark.skipif(DRY, reason="another 40 s in the interpreter; `make check` runs it")
def test_auto_runs_kernels_and_sparsity_waits_for_nothing() -> None:
    case = golden.load_case("local_d128_fp32")
    fast = FastConfig(precision="fp8", attention="fp8", sparsity=TopK(0.5), strict=True)
    model = accelerate(case.model(torch.bfloat16).to(DEVICE), fast)
    velocities(model, case)  # compiles, and makes the clip's state
    hidden = torch.zeros(
        model.fast.clips[next(iter(model.fast.clips))].rows.slots, model.config.hidden_size, device=DEVICE
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        state = next(iter(model.fast.clips.values()))
        with torch.no_grad():
            for layer in model.block.layers:
                layer(hidden, state, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
