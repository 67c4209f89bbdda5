"""RMSNorm with quantisation: kernels in the exact interpreter and plain-torch references, against float64."""

from __future__ import annotations

import pytest
import torch
from bf16_budget import bf16_violations
from qkv_cases import BACKENDS, KERNELS, SHAPES, make, steps
from strict import strict

from happyhorse_fast import budgets
from happyhorse_fast.eager import qkv as eager
from happyhorse_fast.ops.qkv import op as ops
from happyhorse_fast.ops.quantize import SMALLEST_SCALE


@pytest.mark.quick(8)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("branch", [False, True], ids=["alone", "branch"])
@pytest.mark.parametrize("name", ["one-tile", "tail-1-gqa5", "experts-off-grid"])
def test_normalised_rows(name, branch, out, backend):
    case = make(SHAPES[name])
    before = case.hidden.clone()
    with strict(seed=1):
        x, scale = ops.rmsnorm_quantize(
            case.hidden, case.norm, case.row_tiles, case.branch if branch else None, out, backend=backend
        )
    assert torch.equal(case.hidden, before + case.branch if branch else before)
    truth = torch.cat([eager.rms_norm(case.hidden[a:b].double(), case.norm[e]) for e, a, b in case.spans])
    if out == "int8":
        torch.testing.assert_close(scale.double(), truth.abs().amax(1) / 127, rtol=1e-6, atol=0)
        assert ((x.double() - truth / scale[:, None].double()).abs() <= 0.501).all()
        assert x.abs().amax(1).eq(127).all()
    elif out == "fp8":
        torch.testing.assert_close(scale.double(), truth.abs().amax(1) / 448, rtol=1e-6, atol=0)
        assert steps(x, truth / scale[:, None].double()) <= 1
        assert float(x.float().abs().amax(1).min()) == 448
    else:
        assert scale.shape == (0,)
        rounded = torch.cat([eager.rms_norm(case.hidden[a:b], case.norm[e]).bfloat16() for e, a, b in case.spans])
        assert bf16_violations(budgets.measure(x, truth), budgets.measure(rounded, truth)) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out", ["int8", "fp8"])
def test_a_row_of_zeros_has_the_smallest_scale_and_zero_codes(out, backend):
    hidden, row_tiles = torch.zeros(3, 64), torch.tensor([[0, 0, 3]], dtype=torch.int32)
    x, scale = ops.rmsnorm_quantize(hidden, torch.zeros(1, 64), row_tiles, out=out, backend=backend)
    assert scale.tolist() == [SMALLEST_SCALE] * 3
    assert x.float().eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_in_a_row_shows(bad, out, backend):
    hidden, row_tiles = make(SHAPES["one-tile"]).hidden[:3], torch.tensor([[0, 0, 3]], dtype=torch.int32)
    hidden[1, 7] = bad
    x, scale = ops.rmsnorm_quantize(hidden, torch.zeros(1, 160), row_tiles, out=out, backend=backend)
    values = x.double() if out == "bf16" else x.double() * scale[:, None].double()
    assert values.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_outlier_among_ones_saturates_and_leaves_them_nothing_in_int8(backend):
    hidden, row_tiles = torch.ones(2, 160), torch.tensor([[0, 0, 2]], dtype=torch.int32)
    hidden[1, 3] = -1e4
    x, _ = ops.rmsnorm_quantize(hidden, torch.zeros(1, 160), row_tiles, out="int8", backend=backend)
    assert x[0].eq(127).all() and x[1].nonzero().tolist() == [[3]] and int(x[1, 3]) == -127


@pytest.mark.parametrize("backend", KERNELS)
def test_a_part_of_the_channels_of_wider_rows(backend):
    rows, c = 260, 64
    case = make(((rows,), c, 32, 1, 1))
    buffer = torch.zeros(rows, 3 * c)
    buffer[:, c : 2 * c] = case.hidden
    with strict():
        codes, _ = ops.rmsnorm_quantize(buffer[:, c : 2 * c], case.norm, case.row_tiles, case.branch, backend=backend)
    plain, _ = ops.rmsnorm_quantize(case.hidden, case.norm, case.row_tiles, case.branch, backend=backend)
    assert torch.equal(codes, plain)
    assert buffer[:, :c].eq(0).all() and buffer[:, 2 * c :].eq(0).all()
