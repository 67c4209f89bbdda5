"""`fp8_linear_residual` in the Hopper kernel with its epilogue beside the tensor cores, emulated: results, and bugs."""

from unittest import mock

import pytest
import torch
from beside_cases import CODE_BUGS, INT8_BUGS, PRODUCT_BUGS, WHOLE_BUGS, residual_beside
from bf16_budget import bf16_violations
from gluon_emulator import EmulationError
from linear_cases import Case, row_tiles, run_epilogue
from test_int8_products import int8_case

from bench.hopper import running
from happyhorse_fast.budgets import measure, violations
from happyhorse_fast.kernels.launch import config_for, hopper_of, illegal
from happyhorse_fast.kernels.product_beside import Product
from happyhorse_fast.ops.linear import op as ops
from happyhorse_fast.ops.linear import triton as launcher
from happyhorse_fast.ops.quantize import E4M3_MAX
from happyhorse_fast.ops.runtime.triton.device import pretend

FORMATS = ("fp8", "int8", "bf16")
EXPERTS = (128, 129, 127, 1)
"""Rows: whole tiles, one with a single row, and one that ends in the middle."""


def make(fmt, sizes=EXPERTS, f=320, k=176, **options):
    return int8_case(sizes, f, k) if fmt == "int8" else Case(sizes, f, k, fmt == "fp8", **options)


def problems(case, hidden):
    """Gates of the product that was added, which a large residual would hide."""
    error, exact = measure(hidden.double() - case.hidden.double(), case.exact()), case.exact()
    if case.x_scale is not None:
        return violations(error)
    return bf16_violations(error, measure(case.eager(), exact))


@pytest.mark.quick(4)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    ("sizes", "f", "k", "programs"),
    [
        (EXPERTS, 320, 176, 4),  # two features tiles an expert, of which one is ragged; a ragged last slot
        (EXPERTS, 256, 96, 3),  # one slot a tile, itself not full
        ((257,), 64, 1040, 2),  # more slots a tile than the ring has
        ((40,), 512, 256, 9),  # more programs than tiles
        ((130, 1, 5), 256, 512, 1),  # one program for all
    ],
)
def test_within_the_budget(fmt, sizes, f, k, programs):
    case = make(fmt, sizes, f, k)
    with residual_beside(programs=programs):
        hidden = run_epilogue(case, "residual")
    assert problems(case, hidden) == []


def test_one_scale_for_all_rows():
    case = make("fp8", static=True)
    with residual_beside():
        assert problems(case, run_epilogue(case, "residual")) == []


def test_a_static_scale_far_above_the_values():
    """Codes of RMS 0.022, 20,000 times below a static bound: sums as small as any that docs/OPS.md allows."""
    case = make("fp8", static=True)
    x = case.x.float()
    case.x = (x * (0.022 / x.square().mean().sqrt())).to(torch.float8_e4m3fn)
    case.wide_x = case.x.double() * case.x_scale.double()
    with residual_beside():
        assert problems(case, run_epilogue(case, "residual")) == []


@pytest.mark.parametrize("fmt", FORMATS)
def test_bits_depend_neither_on_the_order_nor_on_the_number_of_programs(fmt):
    case = make(fmt)
    results = []
    for seed, programs in ((1, 4), (2, 4), (3, 1), (4, 12)):
        with residual_beside(seed, programs=programs):
            results.append(run_epilogue(case, "residual"))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_of_zeros_and_of_nan(fmt):
    case = make(fmt)
    case.x[3] = 0
    if fmt == "fp8":
        case.x.view(torch.uint8)[130] = 0x7F
    else:
        (case.x_scale if fmt == "int8" else case.x)[130] = torch.nan
    with residual_beside():
        hidden = run_epilogue(case, "residual")
    assert torch.equal(hidden[3], case.hidden[3])
    assert hidden[130].isnan().all() and hidden.isnan().any(dim=1).sum() == 1


def test_rows_that_no_tile_names_stay():
    case = make("bf16", (256,))
    case.tiles = torch.tensor([[0, 5, 120]], dtype=torch.int32)
    with residual_beside():
        hidden = run_epilogue(case, "residual")
    changed = (hidden != case.hidden).any(dim=1)
    assert changed.nonzero().flatten().tolist() == list(range(5, 120))


@pytest.mark.quick(1)
@pytest.mark.parametrize("k", [128, 5120, 13_696])
def test_the_largest_sums_stay_finite(k):
    """Every code is the largest one: sums of 2.7e9 in e4m3 and 2.2e8 in int8 at K = 13,696."""
    for dtype, code in ((torch.float8_e4m3fn, E4M3_MAX), (torch.int8, 127)):
        x, weight = (torch.full(shape, float(code)).to(dtype) for shape in ((3, k), (1, 8, k)))
        x[1] = (-x[1].float()).to(dtype)
        hidden = torch.zeros(3, 8)
        with residual_beside():
            ops.fp8_linear_residual(x, torch.ones(3), weight, torch.ones(1, 8), row_tiles((3,)), hidden)
        wanted = torch.tensor([1.0, -1.0, 1.0])[:, None] * code**2 * k
        torch.testing.assert_close(hidden, wanted.expand(3, 8), rtol=2**-11, atol=0)


@pytest.mark.parametrize("k", [1, 64, 128, 320, 2560, 5120, 13_696, 20_480, 132_000])
def test_the_power_of_two_uses_float16s_range(k):
    for int8, code in ((True, 127), (False, 448)):
        largest = k * code**2
        down = Product(features=256, k=k, bits=8, int8=int8, slots=3, group_m=16).down
        assert largest * down <= 65504
        assert down == 1 or largest * down * 2 > 65504
    assert Product(features=256, k=k, bits=16, int8=False, slots=3, group_m=16).down == 1


# When it is taken -----------------------------------------------------------------------------------------------------


def test_sm_90_alone_takes_it():
    x = torch.empty(128, 256, dtype=torch.bfloat16, device="meta")
    for arch in (80, 89, 90, 100, 120):
        with pretend(arch):
            assert launcher.config_of(x, "residual").hopper == (arch == 90)
    with pretend(90), running("triton"):
        assert not launcher.config_of(x, "residual").hopper
    config = hopper_of(config_for(launcher.STEM, "bf16_residual", 90))
    assert illegal(config, 90, fp8=False, shared_bytes=0) is None
    for arch in (80, 89, 100, 120):
        assert illegal(config, arch, fp8=False, shared_bytes=0)
    assert illegal(config, 100, fp8=False, shared_bytes=0) == "sm_100 has no warp-group products (sm_90 alone has)"


@pytest.mark.parametrize(("k", "described"), [(100, False), (104, True)])
def test_tensors_that_no_descriptor_can_read_take_the_plain_kernel(k, described):
    case = make("bf16", (5,), 64, k)
    with residual_beside(), mock.patch.object(launcher, "launch_hopper", wraps=launcher.launch_hopper) as launched:
        assert problems(case, run_epilogue(case, "residual")) == []
    assert launched.called == described


# Planted bugs ---------------------------------------------------------------------------------------------------------

RELEASE = "            release_sums(sums, group)\n"
AWAIT = "            await_sums(sums, group, turn)\n"
EACH = "        for group in range(GROUPS):\n"
FIRST = "to_b = residual_of(hidden, row, live, feature + QUARTER, product)"
AHEAD = "following = residual_of(hidden, after[0], after[1], feature, product)"
RESIDUAL = {
    "sums released before they are read": (AWAIT, AWAIT + RELEASE),
    "one group not awaited": (EACH + AWAIT, EACH.replace("GROUPS", "1") + AWAIT),
    "one group not released": (EACH + RELEASE, EACH.replace("GROUPS", "1") + RELEASE),
    "rows past the end": ("return row, row < end", "return row, row < end + 1"),
    "rows past the end ahead": ("rows_of(first, end, piece + 1)", "rows_of(first, end + 1, piece + 1)"),
    "the piece after the last": ("return row, row < end", "return row, row < end + piece // 8 * PIECE"),
    "features past the end": ("(column < F)[None, :]", "(column < F + 4)[None, :]"),
    "rows of another piece": ("row = first + piece * PIECE", "row = first + (piece ^ 1) * PIECE"),
    "sums of another piece": ("piece % PIECES, LAYOUT)", "(piece ^ 1) % PIECES, LAYOUT)"),
    "sums of the other group": ("sums, piece // PIECES, half", "sums, 1 - piece // PIECES, half"),
    "a wrong quarter's residual": (AHEAD, AHEAD.replace("feature", "feature + QUARTER")),
    "a piece's residual for the next": (AHEAD, AHEAD.replace("after", "now")),
    "the next piece's residual": ("residual + gl", "following + gl"),
    "a tile's first residual of another quarter": (FIRST, FIRST.replace(" + QUARTER", "")),
    "turn forgotten while finishing": (RELEASE + "        turn += 1\n", RELEASE),
    "other features": ("column = feature + gl.arange(0, QUARTER", "column = gl.arange(0, QUARTER"),
    "a quarter twice": ("d, hidden, now, after, feature + 3 *", "d, hidden, now, after, feature + 2 *"),
    "quarters in another order": ("a, b = half_of", "b, a = half_of"),
}
CODES = {
    "another channel's scale": ("gl.minimum(column, F - 1)", "gl.minimum(column + 1, F - 1)"),
    "another expert's scale": ("weight_scale + expert * F", "weight_scale"),
    "another row's scale": ("x_scale + row * PER_ROW", "x_scale + first // 2 * PER_ROW"),
    "a piece's scale for the next": ("x_scale + after[0] * PER_ROW", "x_scale + now[0] * PER_ROW"),
    "the left half's scales for the right": ("expert, feature + HALF, product)", "expert, feature, product)"),
}
BUGS = {
    "bf16": PRODUCT_BUGS | WHOLE_BUGS | RESIDUAL,
    "fp8": PRODUCT_BUGS | WHOLE_BUGS | RESIDUAL | CODES | CODE_BUGS,
    "int8": PRODUCT_BUGS | RESIDUAL | CODES | CODE_BUGS | INT8_BUGS,
}


def planted(fmt, seed, replace, sizes, f, k):
    """Faults found of a result with bugs planted."""
    case = make(fmt, sizes, f, k)
    try:
        with residual_beside(seed, replace, programs=2):
            return problems(case, run_epilogue(case, "residual"))
    except EmulationError as error:
        return [str(error)]


SHAPES = (((129, 100), 320, 176), ((130,), 256, 1040), ((300, 260), 256, 64))
"""Ragged tiles of several experts; more slots a tile than the ring has; tiles of one slot, which outrun what finishes
them."""


@pytest.mark.quick(6)
@pytest.mark.parametrize(("fmt", "bug"), [(fmt, bug) for fmt, bugs in BUGS.items() for bug in bugs])
def test_planted_bugs_are_caught(fmt, bug):
    assert any(planted(fmt, seed, [BUGS[fmt][bug]], *shape) for seed in range(1, 5) for shape in SHAPES)


@pytest.mark.quick(1)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("seed", range(1, 5))
def test_without_them_nothing_is_found(fmt, seed):
    for shape in SHAPES:
        assert planted(fmt, seed, [], *shape) == []
