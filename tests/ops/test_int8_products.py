"""The products of int8 codes, `fp8_linear*` and `qkv_linear`: against float64, their reference, and exact sums."""

from __future__ import annotations

import pytest
import torch
from linear_cases import IMPLEMENTED, ROWS, Case, row_tiles, run_epilogue
from qkv_cases import BACKENDS, SHAPES, exact, fp8_linear, fp8_problems, int8_steps, make, steps, without_scale
from strict import strict

from happyhorse_fast.budgets import measure, violations
from happyhorse_fast.eager.mlp import gelu7, swiglu7
from happyhorse_fast.ops.linear import op as ops
from happyhorse_fast.ops.qkv import op as qkv
from happyhorse_fast.ops.quantize import dequantize, int8_rows
from happyhorse_fast.ops.runtime.cuda import library_product

# The sigmoid of a large negative number: exp overflows to infinity, and 1 / (1 + inf) is the right 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
INT8 = torch.int8


def int8_case(sizes, f, k, seed=0):
    case = Case(sizes, f, k, fp8=False, seed=seed)
    case.x, case.x_scale = int8_rows(case.x)
    case.weight, case.weight_scale = int8_rows(case.weight)
    case.wide_x = dequantize(case.x, case.x_scale, torch.float64)
    case.wide_weight = dequantize(case.weight, case.weight_scale, torch.float64)
    return case


@pytest.mark.quick(11)
@pytest.mark.parametrize(
    ("experts", "k", "epilogue", "backend"),
    [
        (experts, k, epilogue, backend)
        for experts, k in ((3, 160), (1, 448), (3, 100))
        for epilogue, backend in IMPLEMENTED
        if backend != "cuda" or k % 16 == 0
    ],
)
def test_within_the_gemm_budget(experts, k, epilogue, backend):
    case = int8_case(ROWS[experts], 256, k)
    with strict(seed=k):
        result = run_epilogue(case, epilogue, backend=backend)
    product = case.exact()
    if epilogue == "residual":
        result, wanted = result.double() - case.hidden.double(), product
    elif epilogue == "plain":
        wanted = product
    else:
        result, scale = result
        assert result.dtype == torch.bfloat16 and scale.shape == (0,)
        wanted = {"swiglu7": swiglu7, "gelu7": gelu7}[epilogue](product)
    assert violations(measure(result, wanted)) == []


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_sums_past_what_float32_holds_are_rounded_once(backend):
    """2,048 products of 127 x 127 are past 2^24, where float32 counts in twos."""
    k = 2048
    x, weight = torch.full((3, k), 127, dtype=INT8), torch.full((1, 128, k), -127, dtype=INT8)
    x[1] = torch.arange(k) % 255 - 127
    weight[0, 1] = torch.arange(k) % 251 - 125
    x[2, -1] = 1
    hidden = torch.zeros(3, 128)
    one = torch.ones(1, 128)
    ops.fp8_linear_residual(x, torch.ones(3), weight, one, row_tiles((3,)), hidden, backend=backend)
    sums = x.long() @ weight[0].long().T
    assert int(sums.abs().max()) > 2**24
    assert torch.equal(hidden, sums.float())


def test_every_scale_is_of_its_own_row_channel_and_expert():
    case = int8_case(ROWS[3], 256, 160)
    wanted = case.exact()
    for name, wrong in (
        ("x_scale", case.x_scale.roll(1)),
        ("weight_scale", case.weight_scale.roll(1, 1)),
        ("weight_scale", case.weight_scale[:1].expand(3, -1).contiguous()),
    ):
        given = dict(zip(("x", "x_scale", "weight", "weight_scale", "row_tiles"), case.arguments, strict=True))
        assert violations(measure(ops.fp8_linear(**given | {name: wrong}), wanted))
    assert violations(measure(ops.fp8_linear(*case.arguments), wanted)) == []


@pytest.mark.quick(5)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["tail-1-gqa5", "experts-aligned", "many-gates"])
def test_qkv_in_every_output_kind(name, backend):
    case = make(SHAPES[name], codes="int8")
    assert case.x.dtype == case.codes.dtype == INT8
    truth = exact(case)
    with strict(seed=3):
        plain, codes, fp8 = (fp8_linear(case, out, backend) for out in ("bf16", "int8_qk", "fp8"))
    assert fp8_problems(without_scale(plain), truth) == []
    q, _, v, q_scale, *_ = codes
    torch.testing.assert_close(q_scale.double(), truth[0].abs().amax(2) / 127, rtol=1e-5, atol=0)
    assert int8_steps(q, truth[0] / q_scale[..., None]) <= 1
    assert torch.equal(v, plain[2])
    for e, a, b in case.spans:
        assert steps(fp8[0][a:b], truth[0][a:b] / case.qk_scale[e, 0]) <= 1


def test_results_do_not_depend_on_the_order_of_programs():
    case = int8_case(ROWS[3], 384, 160)
    results = []
    for seed in (0, 1):
        with strict(seed=seed):
            results.append(run_epilogue(case, "residual"))
    assert torch.equal(*results)
    assert torch.equal(results[0], run_epilogue(case, "residual", backend="reference")), "sums are exact"


def test_the_library_gets_at_least_the_rows_it_takes(monkeypatch):
    asked, real = [], torch._int_mm

    def recorded(x, weight):
        asked.append(tuple(x.shape))
        return real(x, weight)

    monkeypatch.setattr(torch, "_int_mm", recorded)
    for rows in (1, 16, 17, 40):
        case = int8_case((rows,), 128, 64)
        product = library_product.library_product(case.x, case.weight[0], library_product.scale_of_one(case.x))
        assert torch.equal(product, (case.x.long() @ case.weight[0].long().T).float())
    assert asked == [(17, 64), (17, 64), (17, 64), (40, 64)]


def test_what_int8_cannot_be_combined_with_is_named():
    case = int8_case((4,), 128, 64)
    with pytest.raises(ValueError, match="fp8 must be False where x is int8: the result is bf16, for quantize_rows"):
        run_epilogue(case, "gelu7", out_fp8=True)
    x, x_scale, weight, weight_scale, tiles = case.arguments
    with pytest.raises(TypeError, match=r"weight must be torch.int8, got torch.float8_e4m3fn"):
        ops.fp8_linear(x, x_scale, weight.to(torch.float8_e4m3fn), weight_scale, tiles)
    with pytest.raises(TypeError, match="x_scale must be a tensor"):
        ops.fp8_linear(x, None, weight, weight_scale, tiles)
    case = make(SHAPES["one-tile"], codes="int8")
    with pytest.raises(TypeError, match="weight_scale must be a tensor"):
        qkv.qkv_linear(case.x, case.x_scale, case.codes, None, case.qk_norm, case.cos_sin, case.row_tiles, 2, 1, "bf16")


@pytest.mark.parametrize("name", ["fp8_linear", "fp8_linear_reference", "fp8_linear_activation_cuda"])
def test_opcheck(name):
    case = int8_case((130,), 128, 64)
    extra = ("swiglu7", False) if "activation" in name else ()
    torch.library.opcheck(getattr(torch.ops.happyhorse_fast, name).default, (*case.arguments, *extra))
