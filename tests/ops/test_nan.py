"""NaN stays NaN through clamps, casts and scales, where min.f32 and a comparison lose it, and no scale makes one."""

import interpreter  # noqa: F401
import pytest
import torch
from attention_cases import CASES, inputs, run, with_e4m3_v
from linear_cases import Case
from qkv_cases import make

from happyhorse_fast.block_map import BlockMap
from happyhorse_fast.ops import fp8_linear_activation
from happyhorse_fast.ops.attention.reference import output_scale
from happyhorse_fast.ops.qkv import op as rmsnorm_qkv
from happyhorse_fast.ops.quantize import E4M3_MAX, INT8_MAX, SMALLEST_SCALE, code_scale
from happyhorse_fast.ops.runtime.formats import uses_e4m3

BACKENDS = ("triton", "cuda", "reference")


@pytest.mark.parametrize("largest", [E4M3_MAX, INT8_MAX])
def test_the_scale_of_nan_is_nan_and_a_scale_has_a_reciprocal(largest):
    scale = code_scale(torch.tensor([torch.nan, 0.0, 1e-37, 1.0]), largest)
    assert scale[0].isnan() and scale[1:3].tolist() == [SMALLEST_SCALE] * 2 and 0 < float(scale[3]) < 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("activation", ["swiglu7", "gelu7"])
def test_activations_keep_nan(activation, fp8, backend):
    case = Case((3,), 256, 64, fp8=False)
    case.x[1, 5] = torch.nan
    y, _ = fp8_linear_activation(*case.arguments, activation, fp8, backend=backend)
    assert y[1].float().isnan().all() and y[::2].float().isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out", ["bf16", "int8_qk", "fp8"])
def test_a_row_of_nan_in_q_k_and_v(out, backend):
    case = make(((200,), 64, 64, 2, 1))
    case.x, _ = rmsnorm_qkv.rmsnorm_quantize(case.hidden, case.norm, case.row_tiles, backend="reference")
    case.x[3, 7] = torch.nan
    qk_scale = case.qk_scale if out == "fp8" else None
    tail = (case.qk_norm, case.cos_sin, case.row_tiles, 2, 1, out, qk_scale)
    q, k, v, q_scale, k_scale, v_scale, gate = rmsnorm_qkv.qkv_linear(
        case.x, None, case.weight, None, *tail, backend=backend
    )
    q, k, v = q.float(), k.float(), v.float()
    block = slice(0, 128)
    if out == "int8_qk":
        q, k = q * q_scale[:, :, None], k * k_scale.repeat_interleave(128, 1).T[:200, :, None]
    if out == "fp8":
        v = (v * v_scale.repeat_interleave(128, 1)[:, None]).permute(2, 0, 1)
    # What shares a scale with NaN is lost with it.
    for x, lost in (
        (q, slice(3, 4)),
        (k, block if out == "int8_qk" else slice(3, 4)),
        (v, block if out == "fp8" else slice(3, 4)),
        (gate, slice(3, 4)),
    ):
        here = torch.zeros(len(x), dtype=torch.bool)
        here[lost] = True
        assert x[here].isnan().all() and x[~here].isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_a_scale_of_nan_of_v_reaches_every_row_that_sees_its_block(backend):
    given = inputs("fp8", 200, heads=(2, 1))
    given["v_scale"][0, 1] = torch.nan
    window = BlockMap.from_ranges([(0, 128), (128, 200)], [(0, 128), (0, 200)], 200, 200)
    out, _, _ = run(given, window, backend=backend)
    assert out[:128].isfinite().all() and out[128:].isnan().all()


@pytest.mark.parametrize("bad", ["v", "gate"])
def test_nan_in_v_or_gate_shows_in_e4m3_results(bad):
    v, gate = torch.ones(3, 1, 32).bfloat16(), torch.ones(3, 2)
    (v if bad == "v" else gate)[1, 0] = torch.nan
    assert output_scale(v, None, gate).isnan().all()


# Multiplied by the reciprocal of a smaller scale, infinity, zeros would become NaN.
@CASES
def test_values_too_small_for_a_scale_have_the_smallest_one(fmt, backend):
    given = inputs(fmt, 200, heads=(2, 2))
    v = torch.full((200, 2, 32), 1e-37)
    v[100:] = 0
    given |= with_e4m3_v(v) if uses_e4m3(fmt) else {"v": v.bfloat16()}
    codes, scale, _ = run(given, BlockMap.dense(200, 200), fp8_out=True, backend=backend)
    assert codes.float().eq(0).all() and scale.tolist() == [SMALLEST_SCALE]
