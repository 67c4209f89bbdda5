"""`fp8_linear_activation` in the Hopper kernel with its epilogue beside the tensor cores, emulated: results, bugs."""

import pytest
import torch
from beside_cases import CODE_BUGS, INT8_BUGS, PRODUCT_BUGS, WHOLE_BUGS, activation_beside
from bf16_budget import bf16_violations
from gluon_emulator import EmulationError
from linear_cases import Case, row_tiles
from strict import poisoned_outputs
from test_int8_products import int8_case

from bench.measure import gates
from happyhorse_fast.budgets import measure, violations
from happyhorse_fast.kernels.activation_beside import Activation
from happyhorse_fast.kernels.product_beside import PIECE, ROWS, Product
from happyhorse_fast.ops.linear import op as ops
from happyhorse_fast.ops.linear.contract import ACTIVATIONS
from happyhorse_fast.ops.quantize import E4M3_MAX, dequantize

FORMS = [("bf16", False), ("bf16", True), ("fp8", False), ("fp8", True), ("int8", False)]
"""Format of the inputs, and whether results are e4m3."""
EXPERTS = (128, 129, 127, 1)
"""Rows: whole tiles, one with a single row, and one that ends in the middle."""


def make(fmt, sizes=EXPERTS, f=384, k=176, **options):
    return int8_case(sizes, f, k) if fmt == "int8" else Case(sizes, f, k, fmt == "fp8", **options)


def run(case, activation, fp8, backend="triton"):
    """Results, each NaN before it was written, and their scale."""
    with poisoned_outputs():
        return ops.fp8_linear_activation(*case.arguments, activation, fp8, backend=backend)


def problems(case, activation, fp8, result):
    """Gates of an activation; beside a boundary between two codes of e4m3 both are right."""
    (y, scale), function = result, ACTIVATIONS[activation][0]
    exact = function(case.exact())
    if fp8:
        compared = gates.compare_codes("y", dequantize(y, scale, torch.float64), exact, scale)
        return [
            problem
            for _, result, wanted, distance, slope in compared
            for problem in violations(measure(result, wanted), distance=distance, slope=slope)
        ]
    if case.x_scale is not None:
        return violations(measure(y, exact))
    return bf16_violations(measure(y, exact), measure(function(case.eager().float()).bfloat16(), exact))


@pytest.mark.quick(8)
@pytest.mark.parametrize(("fmt", "fp8"), FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("sizes", "f", "k", "programs"),
    [
        (EXPERTS, 384, 176, 4),  # two tiles of features an expert, of which one is half a tile; a ragged last slot
        (EXPERTS, 256, 96, 3),  # one slot a tile, itself not full
        ((257,), 128, 1040, 2),  # more slots a tile than the ring has; half a tile
        ((40,), 512, 256, 9),  # more programs than tiles
        ((130, 1, 5), 256, 512, 1),  # one program for all
    ],
)
def test_within_the_budget(fmt, fp8, activation, sizes, f, k, programs):
    case = make(fmt, sizes, f, k)
    with activation_beside(programs=programs):
        result = run(case, activation, fp8)
    assert problems(case, activation, fp8, result) == []


@pytest.mark.quick(1)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_scale_for_all_rows(activation):
    case = make("fp8", static=True)
    with activation_beside():
        assert problems(case, activation, True, run(case, activation, True)) == []


@pytest.mark.parametrize(("fmt", "fp8"), [form for form in FORMS if form != ("bf16", True)])
def test_bits_depend_neither_on_the_order_nor_on_the_number_of_programs(fmt, fp8):
    case = make(fmt)
    results = []
    for seed, programs in ((1, 4), (2, 4), (3, 1), (4, 12)):
        with activation_beside(seed, programs=programs):
            results.append(run(case, "swiglu7", fp8)[0].view(torch.uint8))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.quick(3)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("fmt", "fp8"), FORMS)
def test_rows_of_zeros_and_of_nan(fmt, fp8, activation):
    case = make(fmt)
    case.x[3] = 0
    if fmt == "fp8":
        case.x.view(torch.uint8)[130] = 0x7F
    else:
        (case.x_scale if fmt == "int8" else case.x)[130] = torch.nan
    with activation_beside():
        y = run(case, activation, fp8)[0].float()
    assert (y[3] == 0).all()
    assert y[130].isnan().all() and y.isnan().any(dim=1).sum() == 1


@pytest.mark.parametrize("fp8", [False, True])
def test_rows_that_no_tile_names_are_not_written(fp8):
    case = make("bf16", (256,))
    case.tiles = torch.tensor([[0, 5, 120]], dtype=torch.int32)
    with activation_beside():
        y = run(case, "swiglu7", fp8)[0].float()
    assert (~y.isnan()).any(dim=1).nonzero().flatten().tolist() == list(range(5, 120))
    assert y[5:120].isfinite().all()


def wrong_ends(activation, dtype, replace=()):
    """Which rows are wrong: of zeros, at the upper bound, with a negative linear part, where the sigmoid is 0."""
    x = torch.zeros(4, 64)
    x[1, 1] = x[2, 2] = x[3, 3] = E4M3_MAX
    weight = torch.zeros(1, 128, 64)
    weight[:, :, 1:3], weight[:, :, 3], weight[:, 1::2, 2] = 1, -1, -1
    scales = (None, None) if dtype == torch.bfloat16 else (torch.ones(4), torch.ones(1, 128))
    operands = x.to(dtype), scales[0], weight.to(dtype), scales[1], row_tiles([4])
    with activation_beside(replace=replace), poisoned_outputs():
        y, scale = ops.fp8_linear_activation(*operands, activation, True)
    wanted = torch.zeros(y.shape)
    if activation == "swiglu7":
        wanted[1], wanted[2] = 56, -40  # -42 is between two codes, and this one is even
    else:
        wanted[1], wanted[2, ::2] = 7, 7
    return (dequantize(y, scale) != wanted).any(dim=1).nonzero().flatten().tolist()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_the_ends_of_the_static_scale(activation, dtype):
    assert wrong_ends(activation, dtype) == []


def test_ends_that_are_wrong_are_seen():
    codes = "y = to_e4m3(y * activation.inverse)"
    assert wrong_ends("swiglu7", torch.bfloat16, [(codes, "y = (y * 8.0625).to(gl.float8e4nv)")]) == [1, 2]
    assert wrong_ends("swiglu7", torch.bfloat16, [("swiglu7(gate, up)", "swiglu7(gate, gate)")]) == [2]
    assert wrong_ends("gelu7", torch.bfloat16, [("gelu7(value)", "value")]) == [2, 3]


@pytest.mark.quick(1)
@pytest.mark.parametrize("k", [128, 5120, 13_696])
def test_the_largest_sums_stay_finite(k):
    """Every code is the largest one: sums of 1.0e9 in e4m3 and 8.3e7 in int8 at K = 5,120."""
    for dtype, code in ((torch.float8_e4m3fn, E4M3_MAX), (torch.int8, 127)):
        x, weight = (torch.full(shape, float(code)).to(dtype) for shape in ((3, k), (1, 128, k)))
        x[1] = (-x[1].float()).to(dtype)
        scales = torch.full((3,), 3 / (k * code)), torch.full((1, 128), 1 / code)
        with activation_beside():
            y, _ = ops.fp8_linear_activation(x, scales[0], weight, scales[1], row_tiles((3,)), "swiglu7", False)
        exact = torch.tensor([3.0, -3.0, 3.0])[:, None].expand(3, 128).double()
        torch.testing.assert_close(y.double(), ACTIVATIONS["swiglu7"][0](exact), rtol=2**-7, atol=0)


def test_bf16_is_rounded_where_the_reference_rounds():
    """Sums of a few hundred 1/256 are exact in float32, not in bf16; the sigmoid's last bit moves hardly any result."""

    def differing(replace=()):
        g = torch.Generator().manual_seed(3)
        case = make("bf16", (128,), 256, 128)
        case.x, case.weight = (
            (torch.randint(-11, 12, t.shape, generator=g) / 16).bfloat16() for t in (case.x, case.weight)
        )
        with activation_beside(replace=replace):
            found, _ = run(case, "swiglu7", False)
        wanted, _ = run(case, "swiglu7", False, backend="reference")
        return float((found != wanted).float().mean())

    assert differing() < 1e-3
    assert differing([("gl.bfloat16 if self.bits == 16 else gl.float16", "gl.float16")]) > 0.05


# Shared memory --------------------------------------------------------------------------------------------------------


def banks_met(layout, addresses):
    """Groups of four banks at which 16 bytes of (row, column) each lie in shared memory."""
    at = {}
    bases = [tuple(map(int, basis)) for basis in layout.offset_bases]
    for offset in range(2 ** len(bases)):
        row = column = 0
        for bit, (r, c) in enumerate(bases):
            if offset >> bit & 1:
                row, column = row ^ r, column ^ c
        at[row, column] = offset
    assert len(at) == 2 ** len(bases), "no two elements share a place"
    places = [at[address] for address in addresses]
    assert all(place % 8 == 0 for place in places)
    return {place // 8 % 8 for place in places}


@pytest.mark.parametrize("read", [4, 8, 16, 32])
def test_every_bank_is_met_once(read):
    product = Product(features=256, k=128, bits=8, int8=False, slots=3, group_m=16)
    stored, pieces = product.crossing(ROWS.value, read), product.crossing(PIECE.value, read)
    assert stored.offset_bases[: len(pieces.offset_bases)] == pieces.offset_bases, "pieces of the same memory"
    for first in range(0, 128, 8):
        matrix = [(row, first) for row in range(8)]  # what STSM stores at a time
        assert len(banks_met(stored, matrix)) == 8
    across = 128 // read
    threads = [(thread // across, thread % across * read) for thread in range(32)]
    for part in range(0, max(read, 8), 8):
        for eight in range(0, 32, 8):
            loads = {(row, (column + part) // 8 * 8) for row, column in threads[eight : eight + 8]}
            assert len(banks_met(pieces, loads)) == len(loads)
    if read > 8:
        other = product.crossing(PIECE.value, 8)
        assert len(banks_met(other, [(row, column) for row, column in threads[:8]])) == 4, "twice, without it"


@pytest.mark.parametrize(
    ("name", "inverse", "columns"), [("swiglu7", 8.0, 32), ("swiglu7", 0.0, 16), ("gelu7", 0.0, 8)]
)
def test_a_thread_stores_16_bytes(name, inverse, columns):
    activation = Activation(name, inverse, per_row=1)
    assert activation.columns == columns
    assert activation.results * (1 if inverse else 2) == 16


# Planted bugs ---------------------------------------------------------------------------------------------------------

RELEASE = "            release_sums(sums, group)\n"
AWAIT = "            await_sums(sums, group, turn)\n"
ACTIVATE = {
    "sums released before they are read": (AWAIT, AWAIT + RELEASE),
    "turn forgotten while finishing": (RELEASE + "        turn += 1\n", RELEASE),
    "rows past the end": ("mask=(row < end)[:, None]", "mask=(row < end + 1)[:, None]"),
    "features past the end": ("range(gl.minimum(HALVES, (F - feature) // HALF))", "range(HALVES)"),
    "half of a tile forgotten": ("(F - feature) // HALF)", "(F - feature) // (2 * HALF))"),
    "rows of another piece": ("top + piece * PIECE", "top + (piece ^ 1) * PIECE"),
    "the first half twice": ("column = feature + half * HALF", "column = feature"),
    "another row's results": ("(row.to(gl.int64) *", "(row.to(gl.int64) * 0 + first *"),
}
SWIGLU7 = {
    "gate for linear": ("y = swiglu7(gate, up)", "y = swiglu7(up, gate)"),
    "columns that are not adjacent": (
        "gl.reshape(value, (PIECE, HALF // 2, 2))",
        "gl.permute(gl.reshape(value, (PIECE, 2, HALF // 2)), (0, 2, 1))",
    ),
    "results of the column's number": ("result = column // activation.per", "result = column"),
}
GELU7 = {
    "no activation": ("y = gelu7(value)", "y = value"),
    "as if it were SwiGLU7": ("(row.to(gl.int64) * (F // activation.per))", "(row.to(gl.int64) * (F // 2))"),
}
E4M3 = {
    "not divided by the scale": ("y * activation.inverse", "y"),
    "multiplied by the scale": ("y * activation.inverse", "y * (1.0 / activation.inverse)"),
}
CODES = {
    "another channel's scale": ("channel = expert * F + column +", "channel = expert * F + (column ^ 2) +"),
    "another expert's scale": ("channel = expert * F + column", "channel = column"),
    "another row's scale": ("x_scale + row * activation.per_row", "x_scale + (row * 0 + at) * activation.per_row"),
    "another piece's scales": ("(piece + 1) % PIECES", "piece"),
    "scales of the other half's rows": ("(piece + 1) % PIECES", "(piece + 1)"),
    "scales of the other group's rows": ("factor = factors_of(x_scale, top,", "factor = factors_of(x_scale, first,"),
}
BUGS = {
    ("bf16", "swiglu7", False): PRODUCT_BUGS | WHOLE_BUGS | ACTIVATE | SWIGLU7,
    ("fp8", "swiglu7", True): PRODUCT_BUGS | WHOLE_BUGS | ACTIVATE | SWIGLU7 | E4M3 | CODES | CODE_BUGS,
    ("int8", "gelu7", False): PRODUCT_BUGS | ACTIVATE | GELU7 | CODES | CODE_BUGS | INT8_BUGS,
}
SHAPES = (((129, 100), 384, 176), ((130,), 256, 1040), ((300, 260), 256, 64))
"""Ragged tiles of several experts; more slots a tile than the ring has; tiles of one slot, which outrun what finishes
them."""


def planted(form, seed, replace, sizes, f, k):
    """Faults found of a result with bugs planted."""
    fmt, activation, fp8 = form
    case = make(fmt, sizes, f, k)
    try:
        with activation_beside(seed, replace, programs=2):
            return problems(case, activation, fp8, run(case, activation, fp8))
    except EmulationError as error:
        return [str(error)]


@pytest.mark.quick(6)
@pytest.mark.parametrize(("form", "bug"), [(form, bug) for form, bugs in BUGS.items() for bug in bugs])
def test_planted_bugs_are_caught(form, bug):
    assert any(planted(form, seed, [BUGS[form][bug]], *shape) for seed in range(1, 5) for shape in SHAPES)


@pytest.mark.quick(1)
@pytest.mark.parametrize("form", BUGS)
@pytest.mark.parametrize("seed", range(1, 5))
def test_without_them_nothing_is_found(form, seed):
    for shape in SHAPES:
        assert planted(form, seed, [], *shape) == []
