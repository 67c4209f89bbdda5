"""What Hopper's e4m3 accumulators cost, by their published model: within every budget of a GPU's results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from wgmma_accumulator import DEPTH, matmul, wgmma

from bench.measure import gates
from happyhorse_fast import budgets
from happyhorse_fast.ops.attention.reference import output_scale, sparse_attention
from happyhorse_fast.ops.attention.score_bound import LIMIT
from happyhorse_fast.ops.quantize import e4m3_rows
from happyhorse_fast.ops.runtime import op_checks, self_check

CPU, GPU = torch.device("cpu"), torch.device("cuda")
OPS = ("qkv_linear", "fp8_linear", "fp8_linear_residual", "fp8_linear_activation")


def test_what_lies_13_bits_below_is_cut_off() -> None:
    x = torch.zeros(1, 2 * DEPTH)
    x[0, 0], x[0, 1], x[0, 2] = 1.0, 2.0**-6, -(2.0**-7)
    ones = torch.ones(2 * DEPTH, 1)
    assert matmul(x, ones).item() == (x @ ones).item()
    assert matmul(x, 2.0**-7 * ones).item() == (x @ ones).item() * 2.0**-7, "only the distance counts"
    y = torch.ones(2 * DEPTH, 1)
    y[1:] = 2.0**-7
    assert matmul(x, y).item() == 1 + 2.0**-13, "2^-13 stays, -2^-14 does not"
    x[0, DEPTH], y[DEPTH] = 1.0, 2.0**-14
    assert matmul(x, y).item() == 1 + 2.0**-13, "nor below what the accumulator holds"


@pytest.mark.parametrize("inputs", [640, 5120, 13_696])
def test_products_stay_within_their_budget(inputs: int) -> None:
    draw = torch.Generator().manual_seed(inputs)
    x, _ = e4m3_rows(torch.randn(128, inputs, generator=draw))
    weight, _ = e4m3_rows(torch.randn(1, 128, inputs, generator=draw))
    left, right = x.float(), weight[0].float().T
    error = budgets.measure(matmul(left, right).double(), left.double() @ right.double())
    assert budgets.violations(error) == [], "13,696 in one accumulator: 3.9e-6 and 4.5e-4"
    assert error.tile_distance > 1e-9, "nothing was cut off"


def test_a_large_sum_is_off_in_proportion() -> None:
    """What a gate allows beside a boundary of codes is four times the error of a product of two such sums."""
    draw = torch.Generator().manual_seed(0)
    left, right = (e4m3_rows(torch.randn(64, 5120, generator=draw))[0].float() for _ in range(2))
    sums, exact = matmul(left, right.T).double(), left.double() @ right.T.double()
    large = exact.abs() > 1.5 * exact.std()
    error = float((sums / exact - 1)[large].std())
    assert 1.2e-3 < error < gates.SUM_ERROR / 4 / 2**0.5 * 1.1


def test_a_mean_of_v_is_lost_unless_every_block_goes_to_float32() -> None:
    """Attention over 16,384 keys, 128 to a block: what the Hopper kernel's additions in float32 are for."""
    draw = torch.Generator().manual_seed(0)
    scores, v = torch.randn(8, 16_384, generator=draw) * 1.44, torch.randn(16_384, 8, generator=draw) + 0.5
    p = torch.exp2(scores - scores.amax(dim=1, keepdim=True) + 8).to(torch.float8_e4m3fn).float()
    v = (v * (448 / v.abs().max())).to(torch.float8_e4m3fn).float()
    exact = p.double() @ v.double()

    def lost(keys: int) -> float:
        parts = [slice(i, i + keys) for i in range(0, len(v), keys)]
        return float((sum(matmul(p[:, i], v[i]).double() for i in parts) - exact).norm() / exact.norm())

    assert lost(128) < 2e-4
    assert lost(2048) > 1e-2
    assert lost(16_384) > 0.1, "0.32 over 65,536 keys, where a mean of 0 costs 0.007"


def on_hopper(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference on Hopper's accumulators in the kernel's place."""
    real = getattr(op_checks, op)

    def call(*given: Any, backend: str, **options: Any) -> Any:
        if backend == "reference":
            return real(*given, backend=backend, **options)
        with wgmma() as products:
            results = real(*given, backend="reference", **options)
        assert products[0]
        return results

    def attention(*, backend: str, bound: float, fp8_out: bool, **options: Any) -> Any:
        scale = output_scale(options["v"], options.get("v_scale"), options["gate"]) if fp8_out else None
        with wgmma((options["q"].dtype != torch.int8, "v_scale" in options)):  # int8 is added in int32
            bounded = "v_scale" not in options and bound <= LIMIT
            out, lse = sparse_attention(**options, step=128, bounded=bounded, out_scale=scale)
            return out, scale, lse

    monkeypatch.setattr(op_checks, op, attention if op == "block_sparse_attention" else call)


@pytest.mark.quick(2)
@pytest.mark.parametrize("op", OPS)
def test_the_self_check_accepts_hoppers_products(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_hopper(op, monkeypatch)
    for variant in self_check.VARIANTS["triton"][op]:
        if variant == "fp8" or variant.startswith("fp8_x"):
            assert self_check._judge(self_check.CHECKS[op]("triton", CPU, variant))[0], variant


@pytest.mark.parametrize("variant", ["fp8", "int8_qk_fp8_v", "int8_qk"])
def test_the_self_check_accepts_hoppers_attention(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_checks, "_launched", lambda *_, **__: ({"step": 128}, False))
    on_hopper("block_sparse_attention", monkeypatch)
    compared = op_checks._check_attention("triton", CPU, variant)
    exact, _ = self_check._judge(compared)
    assert exact == (variant != "fp8"), "1e-5 is not for Hopper where scores are of e4m3; of P in e4m3 4e-7 is found"
    budget = {name: op_checks.attention_distance(variant, GPU, fp8_out=name == "out, e4m3") for name in compared}
    there = {name: (*pair, budget[name]) for name, (*pair, _) in compared.items()}
    assert self_check._judge(there)[0], self_check._judge(there)
    for name, (result, reference, distance) in there.items():
        wrong = {name: (1.04 * result, reference, distance)}
        assert not self_check._judge(wrong)[0], f"{name}: a scale 4 % off"
