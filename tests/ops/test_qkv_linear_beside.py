"""`qkv_linear` in the Hopper kernel with its epilogue beside the tensor cores, emulated: results, and planted bugs."""

from unittest import mock

import pytest
import torch
from beside_cases import CODE_BUGS, INT8_BUGS, PRODUCT_BUGS, WHOLE_BUGS, qkv_beside
from gluon_emulator import EmulationError
from qkv_cases import (
    NAMES,
    bf16_linear,
    bf16_problems,
    exact,
    fp8_linear,
    fp8_problems,
    make,
    published,
    tail,
    without_scale,
)
from strict import poisoned_outputs

from bench.measure import gates
from happyhorse_fast import budgets
from happyhorse_fast.ops.qkv import op as ops
from happyhorse_fast.ops.qkv import triton as launcher
from happyhorse_fast.ops.quantize import SMALLEST_SCALE, token_order

SHAPES = {
    "every kind in a tile": ((129,), 256, 128, 5, 1),
    "experts, and half a tile": ((128, 256, 57), 176, 128, 2, 2),
    "one slot": ((40, 3), 64, 128, 1, 1),
}
"""Rows per expert, C, D, Hq, Hkv: heads of q, k, v and gates share tiles, or leave the last half of one empty."""
ALIGNED = tuple(SHAPES)[:2]
OFF_GRID = ((130, 57, 1), 1040, 128, 3, 1)
ROUNDED = 2.0**-7
"""Of a largest magnitude: rounding its sum to bf16, and its row's norm."""


def run(case, fmt, out, seed=1, replace=(), programs=4):
    """The results by name, every output NaN before."""
    with qkv_beside(seed, replace, programs), poisoned_outputs():
        if fmt != "bf16":
            results = fp8_linear(case, out)
        else:
            x, _ = ops.rmsnorm_quantize(case.hidden, case.norm, case.row_tiles, backend="reference")
            scale = case.qk_scale if out == "fp8" else None
            results = ops.qkv_linear(x, None, case.weight, None, *tail(case), out, scale)
    return dict(zip(("q", "k", "v", "q_scale", "k_scale", "v_scale", "gate"), results, strict=True))


def off(name, found, wanted, distance=gates.INT8_DISTANCE, slope=gates.CODE_SLOPE):
    """What is wrong with values of codes, by the bench's gates."""
    found = budgets.violations(budgets.measure(found, wanted), distance=distance, slope=slope)
    return [f"{name}: {problem}" for problem in found]


def off_codes(name, codes, wanted, scale):
    """What is wrong with e4m3 codes of one scale: beside a boundary between two of them both are right."""
    compared = gates.compare_codes(name, codes.double() * scale.double(), wanted, scale.reshape(1))
    return [problem for one in compared for problem in off(*one)]


def far(name, found, wanted):
    """What is wrong with scales of largest magnitudes."""
    close = torch.allclose(found.double(), wanted, rtol=ROUNDED, atol=0)
    return [] if close else [f"{name} is not of the largest magnitude"]


def problems(case, fmt, out, result):
    """What is wrong with results, by the gates of their formats."""
    bf16 = fmt == "bf16"
    truth = published(case, torch.float64) if bf16 else exact(case)
    if out == "bf16":
        values = [result[name] for name in NAMES]
        return bf16_problems(case, values, truth) if bf16 else fp8_problems(values, truth)
    n, (q, k, v, gate) = len(case.x), truth
    blocks = [slice(a, min(a + 128, n)) for a in range(0, n, 128)]
    found = off("gate", result["gate"], gate, budgets.GEMM_DISTANCE, budgets.GEMM_SLOPE)
    if out == "int8_qk":
        found += off("v", result["v"], v, budgets.GEMM_DISTANCE, budgets.GEMM_SLOPE)
        found += far("q_scale", result["q_scale"], q.abs().amax(2) / 127)
        found += off("q", result["q"].double() * result["q_scale"][..., None], q)
        for i, rows in enumerate(blocks):
            scale = result["k_scale"][:, i]
            found += far("k_scale", scale, k[rows].abs().amax((0, 2)) / 127)
            found += off("k", result["k"][rows].double() * scale[:, None], k[rows], gates.INT8_K_DISTANCE)
        return found
    for i, (name, value) in enumerate((("q", q), ("k", k))):
        by_row = torch.cat([case.qk_scale[e, i].expand(b - a) for e, a, b in case.spans])
        if not torch.equal(result[f"{name}_scale"], by_row[::128]):
            found.append(f"{name}_scale")
        for e, a, b in case.spans:
            found += off_codes(name, result[name][a:b], value[a:b], case.qk_scale[e, i])
    codes = token_order(result["v"])
    if not codes[:, :, n:].float().eq(0).all():
        found.append("v past the end")
    for i, rows in enumerate(blocks):
        wanted, scale = v[rows].permute(1, 2, 0), result["v_scale"][:, i]
        found += far("v_scale", scale, wanted.abs().amax((1, 2)) / 448)
        for head in range(len(scale)):
            found += off_codes("v", codes[head, :, rows], wanted[head], scale[head])
    return found


FORMS = [(fmt, out) for fmt in ("bf16", "fp8", "int8") for out in ("bf16", "int8_qk", "fp8")]


def cased(name, fmt):
    shape = SHAPES.get(name, OFF_GRID)
    return make(shape, codes="int8" if fmt == "int8" else "fp8")


@pytest.mark.quick(6)
@pytest.mark.parametrize(("fmt", "out"), FORMS)
@pytest.mark.parametrize("name", ALIGNED)
def test_within_the_budget(name, fmt, out):
    case = cased(name, fmt)
    assert problems(case, fmt, out, run(case, fmt, out)) == []


@pytest.mark.parametrize("fmt", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("name", ALIGNED)
def test_of_both_formats_q_and_k_have_the_bits_of_one_and_v_those_of_the_other(name, fmt):
    case = cased(name, fmt)
    both, int8_qk, e4m3 = (run(case, fmt, out) for out in ("int8_qk_fp8_v", "int8_qk", "fp8"))
    wanted = int8_qk | {name: e4m3[name] for name in ("v", "v_scale")}
    assert all(torch.equal(both[name].view(torch.uint8), wanted[name].view(torch.uint8)) for name in both)


@pytest.mark.quick(2)
@pytest.mark.parametrize("fmt", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("name", ["one slot", "off the grid of 128"])
def test_rows_off_the_grid(name, fmt):
    case = cased(name, fmt)
    for programs in (1, 3, 40):
        assert problems(case, fmt, "bf16", run(case, fmt, "bf16", programs=programs)) == []


@pytest.mark.slow
def test_two_heads_of_gates():
    case = make(((3,), 64, 128, 129, 1))
    assert problems(case, "fp8", "bf16", run(case, "fp8", "bf16")) == []


@pytest.mark.quick(1)
@pytest.mark.parametrize(("fmt", "out"), FORMS[3:6])
def test_bits_depend_neither_on_the_order_nor_on_the_number_of_programs(fmt, out):
    case = cased(ALIGNED[0], fmt)
    first, *others = (run(case, fmt, out, seed, programs=n) for seed, n in ((1, 4), (2, 4), (3, 1), (4, 12)))
    for other in others:
        assert all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for a, b in zip(first.values(), other.values(), strict=True)
        )


def test_bf16_is_rounded_where_the_reference_rounds():
    """Sums of small integers are exact, so the product's bf16 is the reference's, and so is all that follows."""
    case = cased(ALIGNED[1], "bf16")
    g = torch.Generator().manual_seed(3)
    x, weight = (torch.randint(-2, 3, shape, generator=g).bfloat16() for shape in (case.x.shape, case.weight.shape))
    with qkv_beside():
        found = ops.qkv_linear(x, None, weight, None, *tail(case), "bf16")
    wanted = ops.qkv_linear(x, None, weight, None, *tail(case), "bf16", backend="reference")
    assert torch.equal(found[2], wanted[2])
    for a, b in zip(without_scale(found), without_scale(wanted), strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2.0**-7, atol=2.0**-12)


@pytest.mark.parametrize("out", ["bf16", "int8_qk", "fp8"])
def test_a_row_of_zeros_and_one_of_nan(out):
    case = cased(ALIGNED[1], "fp8")
    case.x[3] = 0
    case.x.view(torch.uint8)[130] = 0x7F
    result = run(case, "fp8", out)
    assert (result["gate"][3] == 0.5).all() and (result["q"][3].float() == 0).all()
    bad = result["gate"].isnan().any(dim=1)
    assert bad.nonzero().flatten().tolist() == [130], "and no other row"
    if out == "int8_qk":
        assert result["q_scale"][3].eq(SMALLEST_SCALE).all()
        assert result["q_scale"].isnan().any(dim=1).nonzero().flatten().tolist() == [130]
        assert result["k_scale"].isnan().all(dim=0).tolist() == [False, True, False, False]
    else:
        assert result["q"][130].float().isnan().all() and result["k"][130].float().isnan().all()
    if out == "fp8":
        assert result["v_scale"].isnan().all(dim=0).tolist() == [False, True, False, False]
    else:
        assert result["v"][130].isnan().all() and result["v"][131].isfinite().all()


PAST = {
    "v past its end": ("codes = to_e4m3(gl.where(live[:, None], value, 0.0)", "codes = to_e4m3(value"),
    "scales of what is past the end": ("larger(held, gl.where(live, amax, 0.0))", "larger(held, amax)"),
}


@pytest.mark.parametrize("out", ["int8_qk", "fp8"])
def test_what_is_past_a_tiles_end_changes_nothing(out):
    """Rows behind it are NaN, or zeros."""

    def same(replace):
        found = []
        for factor in (torch.nan, 0):
            x = torch.randn(128, 128, generator=torch.Generator().manual_seed(5))
            x[100:] *= factor
            case = make(((128,), 128, 128, 1, 1))
            case.row_tiles = torch.tensor([[0, 0, 100]], dtype=torch.int32)
            scale = case.qk_scale if out == "fp8" else None
            with qkv_beside(replace=replace), poisoned_outputs():
                results = ops.qkv_linear(x.bfloat16(), None, case.weight, None, *tail(case), out, scale)
            found.append(results)
        _, _, v, _, k_scale, v_scale, _ = zip(*found, strict=True)
        of_codes = (v, v_scale) if out == "fp8" else (k_scale,)
        return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in of_codes)

    assert same(())
    assert not same([PAST["scales of what is past the end"]])
    assert out != "fp8" or not same([PAST["v past its end"]])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_other_heads_take_the_plain_kernel(head_dim):
    case = make(((5,), 64, head_dim, 1, 1))
    with qkv_beside(), mock.patch.object(launcher, "launch_hopper", wraps=launcher.launch_hopper) as launched:
        assert bf16_problems(case, without_scale(bf16_linear(case))) == []
    assert launched.called == (head_dim == 128)


# Planted bugs ---------------------------------------------------------------------------------------------------------

AWAIT = "            await_sums(sums, group, turn)\n"
EACH = "        for group in range(GROUPS):\n"
RELEASE = "            release_sums(sums, group)\n"
AHEAD = "        ahead = ahead_of(head, piece + 1, scales, cos_sin, heads)\n"
ROTATED = "        y, by = rotated(sums, head, piece, channels, loaded, product)\n"
BY_ROW, BY_HEAD, OF_K = "        row, live = rows_of", "        if heads.fp8", "        codes = rounded("
"""What follows in the loops over q's pieces, q's or k's, and k's that are walked again."""
NEXT = "        ahead = factors_of(head, piece + 1, scales, BY_ROW, heads)\n"
OF_GATES, OF_V = "        value = values_of", "        value = (values_of"
"""And in those over gates' and v's."""
WHICH = "    which = head.expert * 2 + (head.index >= heads.q).to(gl.int32)\n    norm"
QKV = {
    "sums released before they are read": (AWAIT, AWAIT + RELEASE),
    "one group not awaited": (EACH + AWAIT, EACH.replace("GROUPS", "1") + AWAIT),
    "one group not released": (EACH + RELEASE, EACH.replace("GROUPS", "1") + RELEASE),
    "turn forgotten while finishing": (RELEASE + "        turn += 1\n", RELEASE),
    "the other head": ("feature // D + half", "feature // D + 1 - half"),
    "rows past the end": ("row < head.end\n", "row < head.end + 1\n"),
    "rows of another piece": ("+ piece * PIECE + gl", "+ (piece ^ 1) * PIECE + gl"),
    "k's norm for q": (WHICH, "    which = head.expert * 2 + 1\n    norm"),
    "another expert's norm": (WHICH, "    which = (head.index >= heads.q).to(gl.int32)\n    norm"),
    "norm without its 1": ("norm + 1.0", "norm"),
    "rotated the other way": ("a * cos - b * sin, b * cos + a * sin", "a * cos + b * sin, b * cos - a * sin"),
    "sines for cosines": ("return gl.load(at), gl.load(at", "return gl.load(at + D // 2), gl.load(at"),
    "the first row's phases": ("cos_sin + row[:, None]", "cos_sin + (head.first + 0 * row)[:, None]"),
    "not the mean of squares": ("factor / D + EPS", "factor + EPS"),
    "rows not over their norm": (", inverse * factor", ", factor"),
    "rows past the end ahead": ("gl.minimum(row, head.end - 1)", "gl.minimum(row, head.end)"),
    "the piece after the last": ("gl.minimum(row, head.end - 1)", "row"),
    "phases of another piece": ("sin = phases_of(head, piece,", "sin = phases_of(head, piece ^ 1,"),
    "sums of another piece": ("piece % PIECES, layout)", "(piece ^ 1) % PIECES, layout)"),
    "sums of the other group": ("piece // PIECES, head.half", "1 - piece // PIECES, head.half"),
    "gates of no head": ("(gate < heads.q)", "(gate < heads.q + 1)"),
    "gates not turned": ("gl.exp(-value)", "gl.exp(value)"),
    "heads of gates forgotten": ("return self.gates - (-self.q // self.d)", "return self.gates"),
}
SCALED = {
    "another expert's weight scale": ("(head.expert * heads.all + head.index)", "(head.index)"),
    "another head's weight scale": ("heads.all + head.index)", "heads.all)"),
    "another row's scale": ("scales.x + rows_within", "scales.x + head.first + 0 * rows_within"),
    "a piece's scales for gates of the next": (NEXT + OF_GATES, NEXT.replace(" + 1", "") + OF_GATES),
    "a norm with a row's scale once": ("* factor * factor /", "* factor /"),
}
INT8_QK = {
    "q by the scale of all rows": (
        "rounded(y * (by * (1.0 / scale))[:, None]), head, head.index,",
        "rounded(y * (by * (1.0 / gl.max(scale, axis=0)))[:, None]), head, head.index,",
    ),
    "a piece's scales for v of the next": (NEXT + OF_V, NEXT.replace(" + 1", "") + OF_V),
    "q's piece for the next": (AHEAD + ROTATED + BY_ROW, AHEAD.replace(" + 1", "") + ROTATED + BY_ROW),
    "q's next piece": (ROTATED + BY_ROW, ROTATED.replace("loaded", "ahead") + BY_ROW),
    "k's piece for the next": ("(piece + 1) % COUNT", "piece"),
    "k's piece behind the last": ("(piece + 1) % COUNT", "piece + 1"),
    "k's next piece": (AHEAD + ROTATED + OF_K, AHEAD + ROTATED.replace("loaded", "ahead") + OF_K),
    "k's piece for the next, walked again": (AHEAD + ROTATED + OF_K, AHEAD.replace(" + 1", "") + ROTATED + OF_K),
    "k's maximum of the last piece": ("larger(held, gl.where(live, amax, 0.0))", "gl.where(live, amax, 0.0)"),
    "k's maximum with a sign": ("gl.abs(value)", "value"),
    "k_scale of another head": ("(head.index - heads.q) * out.blocks", "head.index * 0 * out.blocks"),
    "k_scale of another block": ("heads.q) * out.blocks + head.first // (GROUPS * ROWS)", "heads.q) * out.blocks"),
}
FP8 = {
    "v in the order of tokens": ("(1, 0, 2, 3)", "(0, 1, 2, 3)"),
    "v of another block": ("block * (GROUPS * ROWS) + place", "place"),
    "v_scale of another block": ("index * out.blocks + block", "index * out.blocks"),
    "v of another head": ("(index * D + channel)", "(channel)"),
    "v's pieces in one place": ("tile + piece * PIECE", "tile + piece // 2 * PIECE"),
    "a piece's scales for the next, in v's maximum": (
        NEXT + "        _, live",
        NEXT.replace(" + 1", "") + "        _, live",
    ),
    "v's maximum of the last piece": ("larger(held, gl.where(live, amax, 0.0))", "gl.where(live, amax, 0.0)"),
    "q's scale for k": ("scale = gl.load(scales.qk + which)", "scale = gl.load(scales.qk + head.expert * 2)"),
    "q_scale by a head that is not the first": ("head.index == 0", "head.index == 1"),
}
LOOP = {
    "a piece for the next": (AHEAD + ROTATED + BY_HEAD, AHEAD.replace(" + 1", "") + ROTATED + BY_HEAD),
    "the next piece": (ROTATED + BY_HEAD, ROTATED.replace("loaded", "ahead") + BY_HEAD),
}
SHARED = {"bf16": PRODUCT_BUGS | QKV | LOOP | WHOLE_BUGS, "int8": PRODUCT_BUGS | QKV | INT8_BUGS}
BUGS = {
    ("bf16", "bf16"): SHARED["bf16"],
    ("fp8", "fp8"): SHARED["bf16"] | SCALED | CODE_BUGS | FP8,
    ("int8", "int8_qk"): SHARED["int8"] | SCALED | CODE_BUGS | INT8_QK,
}
PLANTED = (SHAPES[ALIGNED[1]], ((128, 30), 64, 128, 3, 1), ((20,), 1040, 128, 1, 1))
"""Several experts; tiles of one slot, which outrun what finishes them; more slots than the ring has."""


def planted(fmt, out, seed, replace, shape):
    """Faults found of results with bugs planted."""
    case = make(shape, codes="int8" if fmt == "int8" else "fp8")
    try:
        return problems(case, fmt, out, run(case, fmt, out, seed, replace, programs=2))
    except EmulationError as error:
        return [str(error)]


@pytest.mark.quick(6)
@pytest.mark.parametrize(("fmt", "out", "bug"), [(*form, bug) for form, bugs in BUGS.items() for bug in bugs])
def test_planted_bugs_are_caught(fmt, out, bug):
    found = (planted(fmt, out, seed, [BUGS[fmt, out][bug]], shape) for seed in range(1, 4) for shape in PLANTED)
    assert any(found)


@pytest.mark.quick(1)
@pytest.mark.parametrize(("fmt", "out"), BUGS)
@pytest.mark.parametrize("seed", range(1, 4))
def test_without_them_nothing_is_found(fmt, out, seed):
    for shape in PLANTED:
        assert planted(fmt, out, seed, [], shape) == []
