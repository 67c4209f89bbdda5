"""Which implementation of an op is chosen: what was asked for, else what passed its self-check and is known faster."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from happyhorse_fast.ops.runtime import cache_folder, dispatch
from happyhorse_fast.ops.runtime.cuda.launch import use_runner
from happyhorse_fast.ops.runtime.dispatch import STEMS, checked_formats, choose, cuda_ops
from happyhorse_fast.ops.runtime.formats import VARIANTS
from happyhorse_fast.ops.runtime.obstacles import BackendError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
USED = set(STEMS) - {"quantize_rows"}  # in int8 alone


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> dict[str, Any]:
    """A pretended Hopper: what keeps each backend from running, which checks fail, and what was checked."""
    found: dict[str, Any] = {"triton": None, "cuda": None, "failed": {}, "checked": []}

    def failures(backend: str, *_: Any) -> dict[str, str]:
        found["checked"].append(backend)
        return dict.fromkeys(found["failed"].get(backend, ()), f"{backend} is wrong")

    monkeypatch.setenv(cache_folder.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(dispatch, "triton_obstacle", lambda device: found["triton"])
    monkeypatch.setattr(dispatch, "cuda_obstacle", lambda device: found["cuda"])
    monkeypatch.setattr(dispatch, "_failures", failures)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return found


def backends(choices: dict[str, dispatch.Choice]) -> dict[str, str]:
    return {op: choice.backend for op, choice in choices.items()}


def test_auto_takes_triton_and_checks_nothing_else(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    choices = choose("auto", "fp8", GPU)
    assert backends(choices) == dict.fromkeys(USED, "triton")
    assert machine["checked"] == ["triton"]


def test_auto_takes_cuda_where_committed_results_show_it_faster(machine):
    choices = choose("auto", "fp8", GPU)
    assert backends(choices) == dict.fromkeys(USED, "triton") | {"select_blocks": "cuda"}, "on sm_90"
    machine["cuda"] = "cuda-bindings is not installed"
    choice = choose("auto", "fp8", GPU, strict=True)["select_blocks"]
    assert (choice.backend, choice.fell_back) == ("triton", False) and machine["cuda"] in choice.reason


def test_cuda_takes_the_place_of_a_triton_kernel_that_failed(machine):
    machine["failed"] = {"triton": ["rmsnorm_quantize", "fp8_linear"]}
    choices = choose("auto", "fp8", GPU)
    assert choices["rmsnorm_quantize"].backend == "cuda"
    assert choices["rmsnorm_quantize"].reason == "passed its self-check on this machine; triton is wrong"
    assert choices["fp8_linear"].backend == "reference" and choices["fp8_linear"].fell_back
    machine["failed"]["cuda"] = ["rmsnorm_quantize"]
    assert choose("auto", "fp8", GPU)["rmsnorm_quantize"].reason == "triton is wrong; cuda is wrong"
    with pytest.raises(BackendError, match="strict: rmsnorm_quantize would run as plain torch: triton is wrong; cuda"):
        choose("auto", "fp8", GPU, strict=True)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_without_triton_cuda_runs_what_it_has(machine, precision):
    machine["triton"] = "Triton is not installed"
    choices = choose("auto", precision, GPU)
    has = set(VARIANTS["cuda"]) - ({"block_sparse_attention"} if precision == "fp8" else set())
    assert {op for op, choice in choices.items() if choice.backend == "cuda"} == has
    assert {choices[op].backend for op in USED - has} == {"reference"}
    machine["cuda"] = "the driver is of CUDA 12.4"
    assert set(backends(choose("auto", precision, GPU)).values()) == {"reference"}


def test_committed_results_decide_between_kernels_that_passed(machine, tmp_path, monkeypatch):
    file = tmp_path / "preferences.json"
    file.write_text(json.dumps({"90": {"fp8": ["rmsnorm_quantize"]}, "80": {"fp8": ["select_blocks"]}}))
    monkeypatch.setattr(dispatch, "PREFERENCES", file)
    assert {op for op, b in backends(choose("auto", "fp8", GPU)).items() if b == "cuda"} == {"rmsnorm_quantize"}
    assert "cuda" not in backends(choose("auto", "bf16", GPU)).values()
    machine["failed"] = {"cuda": ["rmsnorm_quantize"]}
    assert choose("auto", "fp8", GPU)["rmsnorm_quantize"].backend == "triton"


def test_no_preference_is_shipped_without_a_result():
    assert all(
        op in STEMS
        for ops in json.loads(dispatch.PREFERENCES.read_text()).values()
        for names in ops.values()
        for op in names
    )
    assert dispatch.preferred("fp8", CPU) == ()


def test_a_named_backend_is_taken_as_it_is(machine):
    machine["failed"] = {"triton": list(STEMS), "cuda": list(STEMS)}
    assert set(backends(choose("triton", "fp8", GPU)).values()) == {"triton"}
    assert machine["checked"] == []
    choices = choose("cuda", "bf16", GPU)
    assert all(choices[op].reason == "asked for" for op in VARIANTS["cuda"])
    assert choices["fp8_linear"].reason == "no cuda kernel of it in bf16; triton is wrong"
    assert choices["fp8_linear"].fell_back
    with pytest.raises(BackendError, match="strict: fp8_linear would run as plain torch: no cuda kernel"):
        choose("cuda", "bf16", GPU, strict=True)
    machine["failed"] = {}
    with pytest.raises(BackendError, match="strict: fp8_linear would run as triton: no cuda kernel of it in bf16"):
        choose("cuda", "bf16", GPU, strict=True)


def test_attention_of_another_precision_counts_as_what_it_is(machine):
    assert choose("cuda", "fp8", GPU, attention="bf16")["block_sparse_attention"].backend == "cuda"
    for precision in ("bf16", "int8", "fp8"):
        choices = choose("cuda", precision, GPU, attention="int8_qk")
        assert choices["qkv_linear"].backend == choices["select_blocks"].backend == "cuda"
        choice = choices["block_sparse_attention"]
        assert (choice.backend, choice.fell_back) == ("triton", True)
        assert choice.reason.startswith("no cuda kernel of it in int8_qk; ")


@pytest.mark.parametrize("attention", ["bf16", "int8_qk"])
def test_blocks_are_selected_in_cuda_beside_int8_products(machine, attention, tmp_path, monkeypatch):
    asked = choose("cuda", "int8", GPU, attention=attention)["select_blocks"]
    assert (asked.backend, asked.reason) == ("cuda", "asked for")
    file = tmp_path / "preferences.json"
    file.write_text(json.dumps({"90": {attention: ["select_blocks", "qkv_linear"]}}))
    monkeypatch.setattr(dispatch, "PREFERENCES", file)
    found = {op for op, b in backends(choose("auto", "int8", GPU, attention=attention)).items() if b == "cuda"}
    assert found == {"select_blocks"}, "the products' own format is int8"


def test_cuda_is_offered_where_it_has_every_format_that_runs():
    assert "block_sparse_attention" in cuda_ops("int8", "bf16") and "block_sparse_attention" in cuda_ops("fp8", "bf16")
    assert "block_sparse_attention" in cuda_ops("fp8", "bf16", mixed=True)
    assert "block_sparse_attention" not in cuda_ops("fp8", "int8_qk", mixed=True)
    assert "quantize_rows" not in cuda_ops("bf16", "bf16"), "it does not run there"


CHECKED = {
    ("bf16", "bf16", False): (["bf16"], ["bf16"], ["bf16"], ["bf16"]),
    ("bf16", "int8_qk", False): (["int8_qk"], ["int8_qk"], ["int8_qk"], ["bf16"]),
    ("bf16", "fp8", False): (["bf16_x_fp8"], ["fp8"], ["fp8"], ["bf16"]),
    ("fp8", "bf16", False): (["fp8_x"], ["bf16_fp8_out"], ["bf16"], ["fp8"]),
    ("fp8", "int8_qk", False): (["fp8_x_int8_qk"], ["int8_qk_fp8_out"], ["int8_qk"], ["fp8"]),
    ("fp8", "int8_qk_fp8_v", False): (["fp8_x_int8_qk_fp8_v"], ["int8_qk_fp8_v"], ["int8_qk"], ["fp8"]),
    ("fp8", "fp8", False): (["fp8"], ["fp8"], ["fp8"], ["fp8"]),
    ("bf16", "int8_qk", True): (["bf16", "int8_qk"], ["bf16", "int8_qk"], ["bf16", "int8_qk"], ["bf16"]),
    ("fp8", "int8_qk", True): (
        ["bf16", "fp8_x", "fp8_x_int8_qk", "int8_qk"],
        ["bf16", "bf16_fp8_out", "int8_qk", "int8_qk_fp8_out"],
        ["bf16", "int8_qk"],
        ["bf16", "fp8"],
    ),
    ("fp8", "fp8", True): (
        ["bf16", "bf16_x_fp8", "fp8", "fp8_x"],
        ["bf16", "bf16_fp8_out", "fp8"],
        ["bf16", "fp8"],
        ["bf16", "fp8"],
    ),
}


@pytest.mark.parametrize("asked", CHECKED, ids=str)
def test_the_formats_in_which_a_model_runs_an_op(asked: Any) -> None:
    precision, attention, mixed = asked
    ops = ("qkv_linear", "block_sparse_attention", "select_blocks", "fp8_linear")
    assert tuple(sorted(checked_formats(op, precision, attention, mixed=mixed)) for op in ops) == CHECKED[asked]
    assert all(set(checked_formats(op, precision, attention, mixed=mixed)) <= set(VARIANTS["triton"][op]) for op in ops)


def test_products_that_are_mixed_meet_in_the_activation():
    def formats(precision: str, *, mixed: bool) -> set[str]:
        return set(checked_formats("fp8_linear_activation", precision, "bf16", mixed=mixed))

    assert [formats(p, mixed=False) for p in ("bf16", "int8", "fp8")] == [{"bf16"}, {"int8"}, {"fp8"}]
    assert formats("int8", mixed=True) == {"bf16", "int8"}, "its result is bf16"
    assert formats("fp8", mixed=True) == {"bf16", "bf16_fp8_out", "fp8_bf16_out", "fp8"}
    assert all(formats("fp8", mixed=True) <= set(VARIANTS[b]["fp8_linear_activation"]) for b in VARIANTS)


def test_a_runner_for_tests_is_not_chosen_by_itself():
    assert set(backends(choose("auto", "bf16", CPU)).values()) == {"reference"}
    assert choose("cuda", "bf16", CPU)["rmsnorm_quantize"].backend == "cuda"
    with use_runner(None), pytest.raises(BackendError, match="backend 'cuda' cannot run: CUDA kernels need a GPU"):
        choose("cuda", "bf16", CPU)
