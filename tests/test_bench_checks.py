"""What must hold before timing: self-checks are remembered one by one; a lost GPU ends a process, not the rest."""

from __future__ import annotations

import pytest
import torch

from bench import checks
from bench.lost import LOST
from happyhorse_fast.ops import self_check, trust
from happyhorse_fast.ops.self_check import KernelCheck

CPU = torch.device("cpu")
OPS = ("rmsnorm_quantize", "qkv_linear", "fp8_linear")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Three checks, each an op's name in the list of what ran; the one named ``crash`` loses the GPU."""
    ran: list[str] = []
    state = {"crash": None, "lost": None}

    def run_checks(backend, device, *, fp8):
        (op,) = self_check.CHECKS
        ran.append(op)
        if op == state["crash"]:
            state["lost"] = "CUDA error: an illegal memory access"
        yield KernelCheck(op, "bf16", state["lost"] is None, "worst tile distance 1e-6", 0.1)

    monkeypatch.setenv(trust.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(self_check, "CHECKS", dict.fromkeys(OPS))
    monkeypatch.setattr(self_check, "run_checks", run_checks)
    monkeypatch.setattr(checks, "_backends", lambda device, impl: ["triton"])
    monkeypatch.setattr(checks, "lost", lambda device: state["lost"])
    state["ran"] = ran
    return state


def trusted():
    return trust.recall(trust.machine_key("triton", CPU, fp8=True))


def test_a_check_that_loses_the_gpu_is_not_tried_again_and_blames_no_other(machine):
    machine["crash"] = "qkv_linear"
    assert checks.self_checks(CPU, []) == LOST
    assert trusted() is None, "half of the checks are no reason to trust the other half"
    machine["lost"] = None
    assert checks.self_checks(CPU, []) == 1
    assert machine["ran"] == [*OPS[:2], OPS[2]]
    assert {check.op: check.passed for check in trusted()} == dict(zip(OPS, (True, False, True), strict=True))
    machine["crash"] = None
    assert checks.self_checks(CPU, []) == 0, "the next call checks all of them again"
    assert machine["ran"][3:] == list(OPS)


def test_some_checks_alone_are_not_remembered(machine):
    assert checks.self_checks(CPU, ["fp8_linear"]) == 0
    assert machine["ran"] == ["fp8_linear"] and trusted() is None
