"""On Hopper the self-check launches every kernel that a model does, and `explain` names those of Hopper's own."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from beside_cases import PRODUCT_BUGS, activation_beside, qkv_beside, residual_beside
from gluon_emulator import EmulationError

from happyhorse_fast import golden
from happyhorse_fast.fast.accelerate import accelerate, explain
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.ops.attention import triton as launcher
from happyhorse_fast.ops.attention.reference import output_scale, sparse_attention
from happyhorse_fast.ops.attention.score_bound import LIMIT, scores_fit
from happyhorse_fast.ops.runtime import cache_folder, dispatch, op_checks, self_check
from happyhorse_fast.ops.runtime.formats import ATTENTION_OUT, uses_e4m3
from happyhorse_fast.ops.runtime.self_check import CHECKS, VARIANTS
from happyhorse_fast.ops.runtime.triton import device

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MULTIPROCESSORS = 132
"""Of an H100."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache_folder.CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.mark.parametrize("variant", VARIANTS["triton"]["block_sparse_attention"])
def test_on_hopper_attention_is_checked_in_both_kernels(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def reference(
        q: Any, k: Any, v: Any, block_map: Any, *, bound: float | None, backend: str, fp8_out: bool, **given: Any
    ) -> Any:
        bounded = bool(scores_fit(q, k, v, given["scale"])) if bound is None else bound <= LIMIT
        config = launcher.launch_config(q, k, v, bounded=bounded, lse=given["return_lse"])
        asked.append((bounded, fp8_out, given["return_lse"], config.hopper))
        scale = output_scale(v, given.get("v_scale"), given["gate"]) if fp8_out else None
        options = launcher.rounding_of(config, v) | {"bounded": bounded, "out_scale": scale}
        out, lse = sparse_attention(q, k, v, block_map, **options, **given)
        return out, scale, lse

    monkeypatch.setattr(launcher, "architecture", lambda _: 90)
    monkeypatch.setattr(device, "addressable", lambda _: True)
    monkeypatch.setattr(op_checks, "block_sparse_attention", reference)
    compared = CHECKS["block_sparse_attention"]("triton", CPU, variant)
    assert self_check._judge(compared)[0], "the reference passes in steps of either kernel"
    e4m3, to_fp8 = ATTENTION_OUT[variant][1] is None, uses_e4m3(variant)
    for hopper in (True, False):  # and False for tensors that no descriptor can be made of
        assert (not e4m3, to_fp8, False, hopper) in asked
    assert all(found[3] == (e4m3 or found[0]) for found in asked if found[2]), "with an LSE"
    assert e4m3 or (False, to_fp8, False, False) in asked, "a running maximum"


PRODUCTS = ("qkv_linear", "fp8_linear", "fp8_linear_residual", "fp8_linear_activation")


@pytest.mark.parametrize("wrong", [None, "described", "pointers", "few programs", "heads of 64"])
@pytest.mark.parametrize("op", PRODUCTS)
def test_products_are_checked_in_every_launch(op: str, wrong: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[set[str]] = []
    real = getattr(op_checks, op)

    def kernel(*given: Any, backend: str, **options: Any) -> Any:
        """The reference in the kernel's place, wrong in one of the ways to launch it."""
        results = real(*given, **options, backend="reference")
        if backend != "reference":
            ways = {"described" if device.addressable(given[0]) else "pointers"}
            ways |= {"few programs"} if device.multiprocessors(torch.device("meta")) == 3 else set()
            ways |= {"heads of 64"} if op == "qkv_linear" and given[5].shape[1] == 64 else set()
            launched.append(ways)
            if wrong in ways:
                first = given[5] if results is None else results[0] if isinstance(results, tuple) else results
                first.mul_(1.04)
        return results

    monkeypatch.setattr(op_checks, op, kernel)
    with device.pretend(90):
        passed, detail = self_check._judge(CHECKS[op]("triton", CPU, "bf16"))
        wanted = [{"described"}, {"pointers"}, {"described", "few programs"}]
        if op == "qkv_linear":
            wanted += [{"described", "heads of 64"}, {"described", "few programs", "heads of 64"}]
        assert all(ways in launched for ways in wanted) and all(ways in wanted for ways in launched)
        assert len({launched.count(ways) for ways in wanted}) == 1
        assert passed == (wrong is None or (wrong == "heads of 64" and op != "qkv_linear")), detail
        if not passed and wrong != "described":
            assert f", {wrong}:" in detail
        assert device.addressable(torch.empty(0)), "descriptors are made again after the check"
        assert device.multiprocessors(torch.device("meta")) == MULTIPROCESSORS
    for backend, arch in (("triton", 89), ("cuda", 90)):
        launched.clear()
        with device.pretend(arch):
            CHECKS[op](backend, CPU, "bf16")
        assert len(launched) <= 2 and all(len(ways) == 1 and ways == launched[0] for ways in launched)


def test_few_programs_end_with_their_context() -> None:
    meta = torch.device("meta")
    with device.few_programs():
        assert device.multiprocessors(meta) == 3
        with device.few_programs(2):
            assert device.multiprocessors(meta) == device.multiprocessors(CPU) == 2
        assert device.multiprocessors(meta) == 3
    assert device.multiprocessors(meta) == MULTIPROCESSORS


EMULATED = {
    "fp8_linear_residual": residual_beside,
    "fp8_linear_activation": activation_beside,
    "qkv_linear": qkv_beside,
}
FORMS = (", pointers", ", few programs", ", heads of 64")
BETWEEN_TILES = (
    "sums never released",
    "turn forgotten",
    "last slot never released",
    "last slot released too early",
)
ANOTHER_EXPERTS = ("channel = expert * product.features + feature", "channel = feature")


@pytest.mark.quick(4)
@pytest.mark.parametrize(("op", "variant"), [(op, variant) for op in EMULATED for variant in VARIANTS["triton"][op]])
def test_on_hopper_products_are_checked_in_both_kernels(op: str, variant: str) -> None:
    """Sums of codes cross as float16 there: at most 2e-5 of codes, and 7e-7 of other results, are off."""
    for replace, passes in (((), True), ((ANOTHER_EXPERTS,), False)):
        with EMULATED[op](replace=replace):
            compared = CHECKS[op]("triton", CPU, variant)
        passed, detail = self_check._judge(compared)
        assert passed == passes and not any(form in detail for form in FORMS), detail
        if passes:
            tighter = {name: (*results, distance / 3) for name, (*results, distance) in compared.items()}
            assert self_check._judge(tighter)[0]
    assert all(any(form in name for name in compared) for form in FORMS if op == "qkv_linear" or "heads" not in form)


@pytest.mark.quick(2)
@pytest.mark.parametrize("bug", BETWEEN_TILES)
@pytest.mark.parametrize("op", EMULATED)
def test_few_programs_show_what_is_wrong_between_tiles(op: str, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an H100's 132 multiprocessors no program of the check has a second tile, and such a bug passes."""

    def judged(of_check: str) -> tuple[bool, str]:
        """What the check finds, or the emulator's complaint, which on a GPU is a hang or a wrong number."""
        try:
            with EMULATED[op](replace=(PRODUCT_BUGS[bug],), programs=MULTIPROCESSORS):
                return self_check._judge(CHECKS[op]("triton", CPU, of_check))
        except EmulationError as error:
            return False, f"emulator: {error}"

    assert not judged("bf16")[0]
    monkeypatch.setattr(device, "few_programs", contextlib.nullcontext)
    assert judged("bf16")[0]


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
def test_explain_says_what_runs_in_hopper_kernels(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = golden.load_case("local_d128_fp32")
    model: Any = accelerate(case.model(torch.bfloat16), FastConfig(precision=precision, backend="triton"))

    def said() -> set[str]:
        return {e.op for e in explain(model) if "in the Hopper kernel" in e.reason}

    assert said() == set()
    monkeypatch.setattr(dispatch, "compute_capability", lambda device: {CPU: 90}[device])
    wanted = {"block_sparse_attention", "fp8_linear_residual", "fp8_linear_activation"}
    assert said() == wanted | {"qkv_linear"}
    monkeypatch.setattr(dispatch, "HOPPER_HEAD_DIM", 64)
    assert said() == wanted, "QKV has heads of its own"
    for layer in model.block.layers:
        layer.plan.backend.update(dict.fromkeys(wanted, "cuda"))
    assert said() == set()


def test_the_launch_table_says_what_is_the_hopper_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def where(op: str, precision: str, device: torch.device = GPU, head_dim: int = 128) -> bool:
        return dispatch.is_hopper(op, precision, device, head_dim=head_dim, activation="gelu7")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert all(where("block_sparse_attention", fmt) for fmt in ("bf16", "fp8", "int8_qk"))
    assert not where("block_sparse_attention", "bf16", head_dim=64) and not where("block_sparse_attention", "bf16", CPU)
    assert where("fp8_linear_residual", "fp8") and where("fp8_linear_activation", "int8", head_dim=64)
    assert where("qkv_linear", "bf16") and not where("qkv_linear", "bf16", head_dim=64)
    assert not where("fp8_linear", "fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert not where("block_sparse_attention", "bf16") and not where("fp8_linear_residual", "bf16")
    assert not where("block_sparse_attention", "fp8"), "it has no such entry"


def test_what_two_threads_tell_launchers_ends_with_each() -> None:
    """Two checks at once end in any order; one that restored all would tell what the other did, for good."""
    empty = torch.empty(0)
    with device.pretend(90):
        pointers, few = device.by_pointers(), device.few_programs()
        pointers.__enter__()
        few.__enter__()
        pointers.__exit__(None, None, None)
        assert device.addressable(empty) and device.multiprocessors(CPU) == 3
        few.__exit__(None, None, None)
        assert device.addressable(empty) and device.multiprocessors(CPU) != 3
