"""The self-check finds a kernel that is planted wrong, what it found is remembered, and that kernel is not used."""

from __future__ import annotations

import json
import stat
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import make_exact

from happyhorse_fast.model.accelerate import accelerate, explain
from happyhorse_fast.model.fast_config import FastConfig
from happyhorse_fast.ops import dispatch, self_check, trust
from happyhorse_fast.ops import fp8_linear as linear
from happyhorse_fast.ops.self_check import CHECKS, KernelCheck, run_checks
from happyhorse_fast.reference.model import HappyHorse

make_exact()
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(trust.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_there_is_a_check_for_every_op() -> None:
    assert set(CHECKS) == set(dispatch.STEMS)


@pytest.mark.slow
def test_the_shipped_kernels_pass_in_the_interpreter() -> None:
    checks = list(run_checks("triton", CPU, fp8=True))
    assert [c for c in checks if not c.passed] == []
    assert {(c.op, c.variant) for c in checks} >= {(op, v) for op in CHECKS for v in ("bf16", "fp8")}


@pytest.mark.parametrize("op", ["rmsnorm_quantize", "fp8_linear"])
def test_a_shipped_kernel_passes(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "CHECKS", {op: CHECKS[op]})
    checks = list(run_checks("triton", CPU, fp8=True))
    assert [c.variant for c in checks if c.passed] == ["bf16", "fp8"], checks


def planted(change: Any) -> Any:
    """The reference in the kernel's place, its result changed: quick, and wrong as a kernel would be."""

    def wrong(*arguments: Any, backend: str = "triton", **options: Any) -> torch.Tensor:
        result = linear.fp8_linear(*arguments, backend="reference", **options)
        return change(result) if backend == "triton" else result

    return wrong


def dropped_tile(y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    y[128:256, 128:256] = 0
    return y


def unwritten(y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    y[-1, -1] = torch.nan
    return y


def raises(y: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("PTX was compiled with an unsupported toolchain")


@pytest.mark.parametrize("change", [dropped_tile, lambda y: y * 1.04, lambda y: y.roll(1, 0), unwritten, raises])
def test_a_kernel_planted_wrong_fails(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "CHECKS", {"fp8_linear": CHECKS["fp8_linear"]})
    monkeypatch.setattr(self_check, "fp8_linear", planted(change))
    checks = list(run_checks("triton", CPU, fp8=True))
    assert [c.passed for c in checks] == [False, False], checks
    monkeypatch.setattr(self_check, "fp8_linear", planted(lambda y: y))
    assert all(c.passed for c in run_checks("triton", CPU, fp8=True))


def found(bad: str) -> list[KernelCheck]:
    return [KernelCheck(op, "bf16", op != bad, "worst tile distance 8.0e-4, budget 1.0e-5", 0.1) for op in CHECKS]


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device on which Triton can run, and checks that are counted."""
    calls: list[int] = []

    def checks(*_: Any, **__: Any) -> list[KernelCheck]:
        calls.append(1)
        return found("qkv_linear")

    monkeypatch.setattr(dispatch, "triton_obstacle", lambda device: None)
    monkeypatch.setattr(dispatch, "INTERPRETED_IS_SLOW", None)
    monkeypatch.setattr(self_check, "run_checks", checks)
    return calls


def small_model() -> HappyHorse:
    from happyhorse_fast import golden

    return golden.load_case("postnorm_v2_fp32").model(torch.bfloat16)


def test_a_failed_kernel_is_not_used_and_explained(pretended_gpu: list[int], own_cache: Path) -> None:
    lines: list[str] = []
    model = accelerate(small_model(), FastConfig(), report=lines.append)
    uses = {e.op: (e.backend, e.reason) for e in explain(model)}
    assert uses["qkv_linear"][0] == "reference"
    assert "self-check failed in bf16: worst tile distance 8.0e-4" in uses["qkv_linear"][1]
    assert uses["block_sparse_attention"][0] == "triton"
    assert sum(line.startswith("self-check ") for line in lines) == len(CHECKS)
    assert any("FAILED" in line for line in lines)
    with pytest.raises(dispatch.BackendError, match="strict: qkv_linear"):
        accelerate(small_model(), FastConfig(strict=True))
    assert pretended_gpu == [1], "the second accelerate remembers"
    assert stat.S_IMODE(own_cache.stat().st_mode) == 0o700


def test_what_is_remembered_depends_on_the_machine(pretended_gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.choose("auto", "bf16", CPU)
    monkeypatch.setattr(trust, "__version__", "99.0")
    dispatch.choose("auto", "bf16", CPU)
    assert pretended_gpu == [1, 1]


def test_a_corrupt_cache_is_said_and_checked_again(pretended_gpu: list[int], own_cache: Path) -> None:
    own_cache.mkdir(mode=0o700)
    (own_cache / "self_check.json").write_text("{")
    with pytest.warns(UserWarning, match="remembered self-check cannot be read"):
        dispatch.choose("auto", "bf16", CPU)
    assert pretended_gpu == [1]
    assert len(json.loads((own_cache / "self_check.json").read_text())) == 1


def test_a_cache_that_others_may_write_is_not_trusted(pretended_gpu: list[int], own_cache: Path) -> None:
    own_cache.mkdir()
    own_cache.chmod(0o777)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dispatch.choose("auto", "bf16", CPU)
        dispatch.choose("auto", "bf16", CPU)
    assert pretended_gpu == [1, 1]
    assert any("may be written by others" in str(w.message) for w in caught)
