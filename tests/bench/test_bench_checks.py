"""What must hold before timing: self-checks are remembered one by one; a lost GPU ends a process, not the rest."""

from __future__ import annotations

import pytest
import torch

from bench import LOST, checks
from happyhorse_fast.ops.runtime import cache_folder, self_check, trust
from happyhorse_fast.ops.runtime.self_check import KernelCheck

CPU = torch.device("cpu")
OPS = ("rmsnorm_quantize", "qkv_linear", "fp8_linear")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Three checks that note what ran; the op named ``crash`` loses the GPU, the one named ``full`` finds no memory."""
    state = {"crash": None, "full": None, "ran": []}

    def run_checks(backend, device, *, fp8, only):
        for op in OPS:
            if (op, "bf16") in only:
                state["ran"].append(op)
                fault = {state["crash"]: self_check.LOST, state["full"]: self_check.RAISED}.get(op, "")
                yield KernelCheck(op, "bf16", not fault, "worst tile distance 1e-6", 0.1, fault)
                if fault == self_check.LOST:
                    return

    monkeypatch.setenv(cache_folder.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setitem(self_check.VARIANTS, "triton", dict.fromkeys(OPS, ("bf16",)))
    monkeypatch.setattr(self_check, "run_checks", run_checks)
    monkeypatch.setattr(checks, "_backends", lambda device, impl: ["triton"])
    return state


def trusted():
    return {c.op: c.passed for c in trust.recall(trust.machine_key("triton", CPU))}


def test_a_check_that_loses_the_gpu_is_not_tried_again_and_blames_no_other(machine, capsys):
    machine["crash"] = "qkv_linear"
    assert checks.self_checks(CPU, []) == LOST
    assert trusted() == {"rmsnorm_quantize": True, "qkv_linear": False}, "written as it was found"
    assert checks.self_checks(CPU, []) == 1
    assert machine["ran"] == list(OPS) and trusted()["fp8_linear"]
    assert "qkv_linear bf16: FAILED, worst tile distance 1e-6, remembered" in capsys.readouterr().out


def test_what_could_not_be_checked_is_red_and_tried_again(machine):
    machine["full"] = "fp8_linear"
    assert checks.self_checks(CPU, []) == 1
    assert "fp8_linear" not in trusted()
    machine["full"] = None
    assert checks.self_checks(CPU, []) == 0
    assert machine["ran"] == [*OPS, "fp8_linear"]


def test_only_what_is_named_is_checked(machine):
    assert checks.self_checks(CPU, ["fp8_linear"]) == 0
    assert machine["ran"] == ["fp8_linear"]
