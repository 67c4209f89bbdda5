"""The self-check finds a kernel that is planted wrong, what it found is remembered, and that kernel is not used."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_mutants import mutant
from logged import logs

from happyhorse_fast import golden
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.fast.accelerate import accelerate, explain
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.ops.linear import op as linear
from happyhorse_fast.ops.runtime import cache_folder, dispatch, op_checks, self_check, trust
from happyhorse_fast.ops.runtime.cuda.launch import use_runner
from happyhorse_fast.ops.runtime.self_check import CHECKS, VARIANTS, KernelCheck, run_checks

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache_folder.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_there_is_a_check_for_every_op() -> None:
    assert set(CHECKS) == set(dispatch.STEMS)


def test_there_is_a_check_of_every_kernel_that_the_dispatcher_may_choose() -> None:
    assert set(self_check.VARIANTS["triton"]) == set(dispatch.STEMS)
    assert set(self_check.VARIANTS["cuda"]) <= set(CHECKS)


def test_a_default_dtype_changes_no_input() -> None:
    def drawn() -> list[torch.Tensor]:
        weight, scale = op_checks.packed_weight(11, 384, "fp8")
        assert scale is not None
        return [op_checks.draw(0, 4), op_checks.inputs("bf16")[0], weight.float(), scale]

    expected = drawn()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(drawn(), expected, strict=True))
        CHECKS["select_blocks"]("reference", CPU, "fp8")  # refuses scales that are not float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("backend", VARIANTS)
def test_the_shipped_kernels_pass_on_the_cpu(backend: str) -> None:
    checks = list(run_checks(backend, CPU, fp8=True))
    assert [c for c in checks if not c.passed] == []
    assert {(c.op, c.variant) for c in checks} == {(op, v) for op, vs in VARIANTS[backend].items() for v in vs}


@pytest.mark.parametrize(
    ("backend", "op"),
    [
        ("triton", "fp8_linear"),
        ("cuda", "rmsnorm_quantize"),
        ("cuda", "fp8_linear_activation"),
    ],
)
def test_a_shipped_kernel_passes(backend: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "CHECKS", {op: CHECKS[op]})
    checks = list(run_checks(backend, CPU, fp8=True))
    assert tuple(c.variant for c in checks if c.passed) == VARIANTS[backend][op], checks


def test_attention_in_cuda_is_checked_in_bf16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[tuple[str, str]] = []

    def check(backend: str, device: torch.device, variant: str) -> op_checks.Compared:
        judged.append((backend, variant))
        return {}

    monkeypatch.setattr(self_check, "CHECKS", dict.fromkeys(("block_sparse_attention", "fp8_linear"), check))
    found = [(c.op, c.variant) for c in run_checks("cuda", CPU, fp8=True)]
    assert found == [("block_sparse_attention", "bf16"), ("block_sparse_attention", "bf16_fp8_out")]
    assert judged == [("cuda", "bf16"), ("cuda", "bf16_fp8_out")]
    with pytest.raises(ValueError, match="backend must be 'triton' or 'cuda', got 'reference'"):
        list(run_checks("reference", CPU, fp8=False))


def test_a_cuda_kernel_planted_wrong_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "CHECKS", {"rmsnorm_quantize": CHECKS["rmsnorm_quantize"]})
    wrong = mutant(tmp_path, "rmsnorm_quantize", "(w.w + 1.0f)", "w.w")
    with use_runner(wrong):
        checks = list(run_checks("cuda", CPU, fp8=True))
    assert [c.passed for c in checks] == [False, False, False], checks


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
    monkeypatch.setattr(op_checks, "fp8_linear", planted(change))
    checks = list(run_checks("triton", CPU, fp8=True))
    assert [c.passed for c in checks] == [False, False, False], checks
    monkeypatch.setattr(op_checks, "fp8_linear", planted(lambda y: y))
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


@pytest.fixture
def checked(pretended_gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Ops and formats that were checked, on a device where attention is wrong in e4m3."""
    done: list[tuple[str, str]] = []
    fine = ("bf16", "bf16_fp8_out", "int8_qk", "int8_qk_fp8_out")

    def checks(backend: str, *_: Any, only: Any, **__: Any) -> Iterator[KernelCheck]:
        for op, variant in sorted(only):
            done.append((op, variant))
            yield KernelCheck(op, variant, op != "block_sparse_attention" or variant in fine, "", 0.0)

    monkeypatch.setattr(self_check, "run_checks", checks)
    return done


def test_a_format_that_failed_leaves_the_others_in_use(checked: list[tuple[str, str]]) -> None:
    def backend_of(op: str, **options: Any) -> str:
        return dispatch.choose("auto", "fp8", CPU, **options)[op].backend

    assert backend_of("block_sparse_attention", attention="fp8") == "reference"
    assert backend_of("block_sparse_attention", attention="bf16") == "triton"
    assert backend_of("block_sparse_attention", attention="int8_qk") == "triton"
    assert backend_of("block_sparse_attention", attention="bf16", mixed=True) == "triton"
    assert backend_of("block_sparse_attention", attention="int8_qk", mixed=True) == "triton"
    assert backend_of("block_sparse_attention", attention="fp8", mixed=True) == "reference"
    assert backend_of("block_sparse_attention", attention="int8_qk_fp8_v") == "reference"
    assert backend_of("select_blocks", attention="int8_qk_fp8_v", mixed=True) == "triton"
    assert len(checked) == len(set(checked)), "a check is not repeated"
    assert set(checked) == {(op, f) for op, of in VARIANTS["triton"].items() for f in of if "int8" not in f.split("_x")}


def test_a_model_waits_for_the_checks_of_its_own_formats_alone(checked: list[tuple[str, str]]) -> None:
    accelerate(small_model(), FastConfig(precision="fp8"), report=lambda line: None)
    assert {f for op, f in checked if op == "block_sparse_attention"} == {"int8_qk_fp8_out"}
    assert {f for op, f in checked if op == "fp8_linear"} == {"fp8"}
    accelerate(small_model(), FastConfig(precision="fp8", skip=["down:0"]), report=lambda line: None)
    assert {f for op, f in checked if op == "fp8_linear"} == {"fp8", "bf16"}


def test_what_is_remembered_depends_on_the_machine(pretended_gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.choose("auto", "bf16", CPU)
    monkeypatch.setattr(trust, "__version__", "99.0")
    dispatch.choose("auto", "bf16", CPU)
    assert pretended_gpu == [1, 1]


def test_what_is_remembered_depends_on_the_device_code(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {trust.machine_key(backend, CPU) for backend in ("triton", "cuda")}
    assert len(keys) == 2
    monkeypatch.setattr("happyhorse_fast.csrc.sources.digest", lambda stem: f"another {stem}")
    assert trust.machine_key("cuda", CPU) not in keys
    assert trust.machine_key("triton", CPU) in keys


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_what_is_remembered_depends_on_what_judged_it(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = trust.machine_key(backend, CPU)
    copy = tmp_path / "package"
    shutil.copytree(trust.PACKAGE, copy, ignore=lambda folder, names: [n for n in names if n.endswith("safetensors")])
    monkeypatch.setattr(trust, "PACKAGE", copy)
    assert trust.machine_key(backend, CPU) == before
    keys = {before}
    judges = ("ops/linear/triton.py", "ops/runtime/self_check.py", "ops/attention/reference.py", "eager/qkv.py")
    for name in (*judges, "block_map/dynamic.py", "budgets.py"):
        (copy / name).write_text((copy / name).read_text() + "\n# changed\n")
        keys.add(trust.machine_key(backend, CPU))
    assert len(keys) == 7


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch, pretended_gpu: list[int]) -> dict[str, Any]:
    """Real checks of pretended kernels: ``error`` is what qkv_linear raises, ``lost`` whether the GPU is gone then."""
    state: dict[str, Any] = {"error": None, "lost": False, "ran": []}

    def check_of(op: str) -> Any:
        def check(*_: Any) -> op_checks.Compared:
            state["ran"].append(op)
            if op == "qkv_linear" and state["error"] is not None:
                raise state["error"]
            return {}

        return check

    monkeypatch.setattr(self_check, "run_checks", run_checks)
    monkeypatch.setattr(self_check, "CHECKS", {op: check_of(op) for op in CHECKS})
    monkeypatch.setattr(self_check, "lost", lambda device: state["lost"])
    return state


def test_a_check_that_could_not_be_made_is_made_again(faulty: dict[str, Any]) -> None:
    faulty["error"] = torch.OutOfMemoryError("tried to allocate 2 GiB")
    choices = dispatch.choose("auto", "bf16", CPU)
    assert choices["qkv_linear"].backend == "reference"
    assert "OutOfMemoryError: tried to allocate" in choices["qkv_linear"].reason
    assert choices["fp8_linear"].backend == "triton"
    assert set(faulty["ran"]) == {op for op in CHECKS if "bf16" in VARIANTS["triton"][op]}
    faulty.update(error=None, ran=[])
    assert dispatch.choose("auto", "bf16", CPU)["qkv_linear"].backend == "triton"
    assert faulty["ran"] == ["qkv_linear"]
    dispatch.choose("auto", "bf16", CPU)
    assert faulty["ran"] == ["qkv_linear"], "what passed is remembered"


def test_a_kernel_that_loses_the_gpu_is_named_and_blames_no_other(faulty: dict[str, Any]) -> None:
    faulty.update(error=RuntimeError("CUDA error: an illegal memory access was encountered"), lost=True)
    with pytest.raises(dispatch.BackendError, match=r"triton's qkv_linear in bf16 ended .* illegal memory .* restart"):
        dispatch.choose("auto", "bf16", CPU)
    assert faulty["ran"] == ["rmsnorm_quantize", "qkv_linear"]
    faulty.update(lost=False, ran=[])
    choices = dispatch.choose("auto", "bf16", CPU)
    assert choices["qkv_linear"].backend == "reference"
    assert {c.backend for op, c in choices.items() if op != "qkv_linear"} == {"triton"}
    had = ("rmsnorm_quantize", "qkv_linear")
    assert faulty["ran"] == [op for op in CHECKS if "bf16" in VARIANTS["triton"][op] and op not in had]


def test_a_corrupt_cache_is_said_and_checked_again(pretended_gpu: list[int], own_cache: Path) -> None:
    own_cache.mkdir(mode=0o700)
    kept = own_cache / f"self_check.{trust.machine_key('triton', CPU)}.json"
    kept.write_text("{")
    with logs("remembered self-check cannot be read"):
        dispatch.choose("auto", "bf16", CPU)
    assert pretended_gpu == [1]
    assert len(json.loads(kept.read_text())) == len(CHECKS)


def test_a_cache_that_others_may_write_is_not_trusted(pretended_gpu: list[int], own_cache: Path) -> None:
    own_cache.mkdir()
    own_cache.chmod(0o777)
    with logs("may be written by others"):
        dispatch.choose("auto", "bf16", CPU)
        dispatch.choose("auto", "bf16", CPU)
    assert pretended_gpu == [1, 1]
