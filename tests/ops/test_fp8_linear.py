"""`fp8_linear`: the kernels against float64, their reference and eager bf16, by the project's own budgets.

The ops around them, launch tables and packing: test_fp8_linear_ops.py.
"""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from bf16_budget import bf16_violations
from fuzz import examples
from hypothesis import example, given
from hypothesis import strategies as st
from linear_cases import E4M3, EPILOGUES, IMPLEMENTED, KERNELS, ROWS, Case, row_tiles, run_epilogue
from strict import checked_memory, checked_overflow, permuted_grid, poisoned_outputs, strict

from happyhorse_fast.budgets import measure, violations
from happyhorse_fast.eager.mlp import gelu7, swiglu7
from happyhorse_fast.kernels import linear as kernels
from happyhorse_fast.kernels.launch import LaunchConfig, table
from happyhorse_fast.ops.linear import op as ops
from happyhorse_fast.ops.linear import triton as launcher
from happyhorse_fast.ops.quantize import dequantize

# The sigmoid of a large negative number: exp overflows to infinity, and 1 / (1 + inf) is the right 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


def check(result, exact, case, eager=None):
    # Rounding a good fp8 product to bf16 costs 1.4e-6 of the budget's distance of 1e-5.
    error = measure(result, exact)
    assert (bf16_violations(error, measure(eager, exact)) if case.x_scale is None else violations(error)) == []


def assert_close_to_float64(case, epilogue, backend="triton"):
    exact = case.exact()
    eager = case.eager() if case.x_scale is None else None
    if epilogue == "plain":
        check(run_epilogue(case, epilogue, backend=backend), exact, case, eager)
    elif epilogue == "residual":
        hidden = run_epilogue(case, epilogue, backend=backend)
        # The product alone: beside a large residual its errors would be hidden.
        check(hidden.double() - case.hidden.double(), exact, case, eager)
    else:
        function = {"swiglu7": swiglu7, "gelu7": gelu7}[epilogue]
        y, scale = run_epilogue(case, epilogue, False, backend)
        assert scale.shape == (0,)
        check(y, function(exact), case, None if eager is None else function(eager.float()).bfloat16())


def one_step_apart(a, b) -> torch.Tensor:
    """Distance of e4m3 codes in steps of the format: their bits, ordered by value."""
    ordered = [
        torch.where(t.view(torch.uint8) < 128, t.view(torch.uint8).int(), 128 - t.view(torch.uint8).int())
        for t in (a, b)
    ]
    return (ordered[0] - ordered[1]).abs()


@pytest.mark.quick(9)
@pytest.mark.parametrize(("epilogue", "backend"), IMPLEMENTED)
@pytest.mark.parametrize(("experts", "k"), [(1, 160), (3, 448)])
def test_bf16_within_twice_eager(epilogue, experts, k, backend):
    with strict(seed=k):
        assert_close_to_float64(Case(ROWS[experts], 256, k, fp8=False), epilogue, backend)


@pytest.mark.quick(15)
@pytest.mark.parametrize(
    ("experts", "k", "static", "epilogue", "backend"),
    [
        (experts, k, static, epilogue, backend)
        for experts, k, static in ((3, 160, False), (1, 424, False), (3, 176, True), (1, 424, True))
        for epilogue, backend in IMPLEMENTED
        # What backend "cuda" refuses: tests/ops/test_cuda_activation_quantize.py.
        if backend != "cuda" or k % 16 == 0
    ],
)
def test_fp8_within_the_gemm_budget(experts, k, static, epilogue, backend):
    with strict(seed=k):
        assert_close_to_float64(Case(ROWS[experts], 256, k, fp8=True, static=static), epilogue, backend)


@pytest.mark.quick(5)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("activation", "static_scale"), [("swiglu7", 0.125), ("gelu7", 1 / 64)])
def test_requantised_codes_are_within_one_step(activation, static_scale, fp8, backend):
    case = Case(ROWS[3], 384, 160, fp8)
    with strict():
        codes, scale = run_epilogue(case, activation, out_fp8=True, backend=backend)
        expected, _ = run_epilogue(case, activation, out_fp8=True, backend="reference")
        held, _ = run_epilogue(case, activation, out_fp8=False, backend=backend)
    assert codes.dtype == E4M3 and torch.equal(scale, torch.tensor([static_scale]))
    assert int(one_step_apart(codes, expected).max()) <= 1
    # An e4m3 value is off by 2^-4 of itself at most, or by half the smallest code.
    error = (dequantize(codes, scale) - held.float()).abs()
    bound = held.float().abs() * (2**-4 + 2**-8) + 2**-10 * scale
    assert bool((error <= bound).all())


@pytest.mark.parametrize(("activation", "backend"), [(e, b) for e, b in IMPLEMENTED if e in ("swiglu7", "gelu7")])
def test_the_ends_of_the_static_scale(activation, backend):
    """Rows of zeros, at the upper bound, with a negative linear part, and so negative that the sigmoid is 0."""
    x = torch.zeros(4, 64)
    x[1, 1] = x[2, 2] = x[3, 3] = 1e4
    weight = torch.zeros(1, 128, 64)
    weight[:, :, 1:3], weight[:, :, 3], weight[:, 1::2, 2] = 1, -1, -1
    with strict():
        y, scale = ops.fp8_linear_activation(
            x.bfloat16(), None, weight.bfloat16(), None, row_tiles([4]), activation, True, backend=backend
        )
    value = dequantize(y, scale)
    assert (value[[0, 3]] == 0).all() and (y[1].float() == 448).all()
    if activation == "swiglu7":
        assert (value[1] == 56).all() and (value[2] == -40).all(), "-42 is between two codes, and this one is even"
    else:
        assert (value[1] == 7).all() and (value[2, ::2] == 7).all() and (value[2, 1::2] == 0).all()


def distinct_configs():
    """(variant, the plain kernel's configuration) of the table, each tile shape once: schedules do not matter here."""
    seen = {}
    for variant, archs in table("linear").items():
        for fields in archs.values():
            config = LaunchConfig(**fields)
            seen[variant, config.block_m, config.block_n, config.block_k] = (
                variant,
                replace(config, descriptors=False, hopper=False),
            )
    return list(seen.values())


@pytest.mark.quick(16)
@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize(("variant", "config"), distinct_configs())
def test_every_committed_tile_shape(variant, config, described, monkeypatch):
    precision, epilogue = variant.split("_")
    # 384 columns end in the middle of a tile of 256; 130 rows and 1 leave tiles nearly empty.
    case = Case((130, 1), 384, 256, precision == "fp8", static=epilogue == "residual")
    if described:
        # The interpreter takes host-made descriptors; the launcher makes them on GPUs alone.
        monkeypatch.setattr(launcher, "descriptors_work", lambda *_: True)
        config = replace(config, descriptors=True)
    monkeypatch.setattr(launcher, "config_of", lambda *_: config)
    with strict():
        assert_close_to_float64(case, epilogue)


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_parts_of_a_row_tile(epilogue, monkeypatch):
    config = LaunchConfig(block_m=32, block_n=128, block_k=64, group_m=4)
    monkeypatch.setattr(launcher, "config_of", lambda *_: config)
    with strict():
        assert_close_to_float64(Case((130, 1, 40), 256, 160, fp8=True), epilogue)


def test_plain_and_residual_take_any_width():
    case = Case((70,), 200, 96, fp8=True)
    with strict():
        for epilogue in ("plain", "residual"):
            assert_close_to_float64(case, epilogue)


@pytest.mark.parametrize("fp8", [False, True])
def test_the_order_of_programs_changes_no_bit(fp8):
    case = Case(ROWS[3], 256, 160, fp8)
    results = []
    for seed in range(2):
        with permuted_grid(seed):
            results.append([run_epilogue(case, "residual"), *run_epilogue(case, "swiglu7", out_fp8=fp8)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("fp8", [False, True])
def test_sparse_representable_inputs_are_exact(fp8):
    gen = torch.Generator().manual_seed(0)
    sizes, f, k = (130, 61), 256, 160

    def small(*shape):
        values = torch.randint(-2, 3, shape, generator=gen)
        return (values * (torch.rand(shape, generator=gen) < 0.25)).to(E4M3 if fp8 else torch.bfloat16)

    x, weight, tiles = small(sum(sizes), k), small(2, f, k), row_tiles(sizes)
    # Powers of two, so that the scaled product is exact as well; sums of 160 products of at most 4 stay below 256.
    scales = [torch.randint(-3, 4, shape, generator=gen).float().exp2() for shape in ((sum(sizes),), (2, f))]
    x_scale, weight_scale = scales if fp8 else (None, None)
    wide = x.double() if x_scale is None else x.double() * x_scale[:, None]
    wide_weight = weight.double() if weight_scale is None else weight.double() * weight_scale[:, :, None]
    exact = torch.cat([a @ b.T for a, b in zip(wide.split(sizes), wide_weight, strict=True)])
    with strict():
        y = ops.fp8_linear(x, x_scale, weight, weight_scale, tiles)
    assert exact.abs().max() > 4
    assert torch.equal(y.double(), exact)


def test_offsets_past_2_31_elements():
    rows, f, k = 78_650, 27_392, 32  # 1080p at 5 s and its up projection: 2.15e9 elements, of which one tile is touched
    x = torch.empty(rows, k, dtype=torch.bfloat16)
    case = Case((128,), f, k, fp8=False)
    x[-128:] = case.x
    tiles = torch.tensor([[0, rows - 128, rows]], dtype=torch.int32)
    with checked_memory(), checked_overflow():
        y = ops.fp8_linear(x, None, case.weight, None, tiles)
    assert y.numel() > 2**31
    assert bf16_violations(measure(y[-128:], case.exact()), measure(case.eager(), case.exact())) == []


def test_inputs_past_2_31_elements():
    rows, k = 186_880, 13_696  # 1080p at 15 s and its down projection
    case = Case((100,), 128, k, fp8=True)
    x, x_scale = torch.empty(rows, k, dtype=E4M3), torch.empty(rows)
    x[-100:], x_scale[-100:] = case.x, case.x_scale
    tiles = torch.tensor([[0, rows - 100, rows]], dtype=torch.int32)
    with checked_memory(), checked_overflow():
        y = ops.fp8_linear(x, x_scale, case.weight, case.weight_scale, tiles)
    assert violations(measure(y[-100:], case.exact())) == []


@examples(12)
@given(
    sizes=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    f=st.integers(1, 3),
    k=st.integers(1, 60),
    form=st.sampled_from(["bf16", "rows", "static"]),
    epilogue=st.sampled_from(EPILOGUES),
    seed=st.integers(0, 9),
)
@example(sizes=[1, 99], f=2, k=50, form="bf16", epilogue="swiglu7", seed=2)  # a factor near 0
def test_any_shape(sizes, f, k, form, epilogue, seed):
    case = Case(tuple(sizes), 128 * f, 8 * k, form != "bf16", form == "static", seed)
    with strict(seed):
        y = run_epilogue(case, epilogue)
        expected = run_epilogue(case, epilogue, backend="reference")
    for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (y, expected)), strict=True):
        # Both round at the same places; sums differ in their order, so a bf16 value may fall on its neighbour.
        room = 2**-6 * (1 + b.float().abs())
        if (form, epilogue) == ("bf16", "swiglu7") and b.numel():
            # Of its factor (linear + 1) near 0 the neighbour is 2^-7 away, and the other factor is up to 7.
            room += 2**-7 * gelu7(run_epilogue(case, "plain", backend="reference")[:, ::2].float()).abs()
        assert (a.dtype, a.shape) == (b.dtype, b.shape) and bool(((a.float() - b.float()).abs() <= room).all())


# --- the budgets catch what they are for ------------------------------------------------------------------------------


def test_the_budget_catches_planted_bugs():
    case = Case((256, 256), 512, 256, fp8=True)
    exact, good = case.exact(), ops.fp8_linear(*case.arguments, backend="reference")
    x, x_scale, weight, weight_scale, tiles = case.arguments
    dropped = good.clone()
    dropped[128:256, 256:384] = 0
    wrong = {
        "tile dropped": dropped,
        "scale": good.float() * 1.04,
        "one expert's scale for all": ops.fp8_linear(
            x, x_scale, weight, weight_scale[:1].expand(2, -1).contiguous(), tiles, backend="reference"
        ),
        "row scale for weight scale": ops.fp8_linear(
            x, weight_scale[0], weight, x_scale.expand(2, -1).contiguous(), tiles, backend="reference"
        ),
    }
    assert violations(measure(good, exact)) == []
    for name, result in wrong.items():
        assert violations(measure(result, exact)), name
    bf16 = Case((256, 256), 512, 256, fp8=False)
    eager = measure(bf16.eager(), bf16.exact())
    for result in (bf16.eager().index_fill(0, torch.arange(128), 0), bf16.eager().float() * 1.04):
        assert bf16_violations(measure(result, bf16.exact()), eager)


@triton.jit
def unclamped(x):
    return x.to(tl.float8e4nv)


@pytest.mark.parametrize("clamped", [True, False])
def test_a_missing_clamp_gives_nan(clamped, monkeypatch):
    case = Case((128,), 256, 96, fp8=True)
    # The right scale leaves the clamp nothing to do, so the plant needs a wrong one to show.
    monkeypatch.setattr(launcher, "activation_scale", lambda _: 2**-10)
    if not clamped:
        monkeypatch.setattr(kernels, "to_e4m3", unclamped)
    codes, _ = run_epilogue(case, "swiglu7", out_fp8=True)
    assert bool(codes.float().isfinite().all()) is clamped


def test_an_unwritten_row_is_nan():
    case = Case((256,), 128, 64, fp8=False)
    with poisoned_outputs():
        y = ops.fp8_linear(case.x, None, case.weight, None, case.tiles[:1])
    assert y[:128].isfinite().all() and y[128:].isnan().all()
