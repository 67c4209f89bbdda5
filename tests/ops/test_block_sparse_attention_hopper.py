"""The Hopper kernel itself: when it is taken, what its emulation catches, and what only its forms can get wrong.

Its results, in every case of the other kernels: test_block_sparse_attention.py, "hopper".
"""

import math
from unittest import mock

import pytest
import torch
from attention_cases import (
    FORMATS,
    MAP,
    bound_of,
    dense_oracle,
    formatted,
    hopper,
    inputs,
    normed,
    problems,
    run,
    with_e4m3_v,
)
from gluon_emulator import Emulated, EmulationError
from hopper_bugs import BUGS, HIDDEN_BY_SCALE, MASKED_FIRST, SUMS, WIDE_E4M3

from bench.hopper import running
from happyhorse_fast.block_map import BlockMap
from happyhorse_fast.kernels import launch
from happyhorse_fast.ops import block_sparse_attention
from happyhorse_fast.ops.attention import triton as launcher
from happyhorse_fast.ops.attention.score_bound import LIMIT, MARGIN, norm_bound
from happyhorse_fast.ops.runtime.formats import uses_e4m3
from happyhorse_fast.ops.runtime.triton.device import by_pointers, pretend

BOUNDED = ("bf16", "int8_qk")
SCALE = 32**-0.5
UNEVEN = BlockMap.from_ranges([(0, 100), (100, 250), (290, 400)], [(30, 400), (0, 333), (0, 1)], 540, 400)
"""Rows that begin with a partial block, rows and a whole block without a key, and a last block that is not whole."""

LONG = BlockMap.dense(150, 1024)
"""More steps over full blocks than slots, and no other blocks."""

PARTIAL = BlockMap.dense(150, 300)
"""Every row, the last item's too, ends with a partial block."""


def attention(given, block_map=MAP, seed=1, replace=(), slots=None, **options):
    """The op through the emulated kernel."""
    bound = options.pop("bound", bound_of(given, SCALE))
    with hopper(seed, replace, slots):
        return block_sparse_attention(**given, block_map=block_map, scale=SCALE, bound=bound, **options)


# When it is taken -----------------------------------------------------------------------------------------------------


def launched(monkeypatch, given, **options):
    """Whether a call launches the Hopper kernel, and the plain one."""
    calls = []
    monkeypatch.setattr(Emulated, "__getitem__", lambda self, grid: lambda *a, **k: calls.append("hopper"))
    plain = mock.MagicMock()
    plain.__getitem__.side_effect = lambda grid: lambda *a, **k: calls.append("plain")
    monkeypatch.setattr(launcher, "block_sparse_attention_kernel", plain)
    attention(given, **options)
    return calls


@pytest.mark.parametrize("fmt", FORMATS)
def test_taken_where_tiles_can_be_described(fmt, monkeypatch):
    given = inputs(fmt)
    for options in ({}, {"return_lse": True}):
        assert launched(monkeypatch, given, **options) == ["hopper"]
    for name in "qk":
        apart = given | {name: given[name].transpose(0, 2).contiguous().transpose(0, 2)}
        assert launched(monkeypatch, apart) == ["plain"], f"{name} with channels apart"


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0)])
def test_of_long_sequences_tensors_in_another_order_are_copied(fmt, order, monkeypatch):
    given = inputs(fmt)
    names = "qk" if uses_e4m3(fmt) else "qkv"
    apart = given | {name: given[name].permute(order).contiguous().permute(order) for name in names}
    expected = attention(given)[0]
    monkeypatch.setattr(launcher, "LONG", len(given["k"]))
    assert torch.equal(attention(apart)[0], expected)
    assert launched(monkeypatch, apart) == ["hopper"]
    monkeypatch.setattr(launcher, "LONG", len(given["k"]) + 1)
    assert launched(monkeypatch, apart) == ["plain"]
    if not uses_e4m3(fmt):  # with a maximum the Hopper kernel has no form
        monkeypatch.setattr(launcher, "LONG", 1)
        assert launched(monkeypatch, apart, bound=math.inf) == ["plain"]


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_row_of_nan_has_an_lse_of_nan(fmt):
    given = inputs(fmt)
    if fmt == "fp8":
        given["q"].view(torch.uint8)[3] = 0x7F
    else:
        given.get("q_scale", given["q"])[3] = torch.nan
    out, _, lse = attention(given, bound=LIMIT, return_lse=True)
    assert out[3].isnan().all() and lse[:, 3].isnan().all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_without_a_bound_the_plain_kernel_keeps_a_maximum(fmt, monkeypatch):
    given = inputs(fmt)
    e4m3 = uses_e4m3(fmt)
    assert launched(monkeypatch, given, bound=math.inf) == (["hopper"] if e4m3 else ["plain"])
    assert launched(monkeypatch, given, bound=LIMIT) == ["hopper"]
    assert launched(monkeypatch, given, bound=math.nextafter(LIMIT, math.inf)) == (["hopper"] if e4m3 else ["plain"])
    found_on_the_device = {"bf16": ["hopper", "plain"], "int8_qk": ["plain"]}
    assert launched(monkeypatch, given, bound=None) == found_on_the_device.get(fmt, ["hopper"])


@pytest.mark.parametrize("fits", [True, False])
def test_of_two_launches_the_flag_lets_one_compute(fits):
    given = inputs("bf16", 150, heads=(2, 1), spread=1.0 if fits else 40.0)
    block_map = BlockMap.dense(150, 150)
    plain = mock.MagicMock()
    with mock.patch.object(launcher, "block_sparse_attention_kernel", plain):
        out, _, lse = run(given, block_map, SCALE, "hopper", bound=None, return_lse=True)
    assert plain.__getitem__.return_value.call_count == 1, "the other form"
    assert plain.__getitem__.return_value.call_args.kwargs["BOUNDED"] is False
    if fits:
        assert problems(given, block_map, out, SCALE, backend="hopper") == []
        assert torch.isfinite(lse).all()
    else:  # as they were allocated
        assert out.isnan().all() and lse.isnan().all()


def test_taken_on_hopper_for_heads_of_128_and_nowhere_else():
    q, narrow = (torch.empty(256, 2, d, dtype=torch.bfloat16, device="meta") for d in (128, 64))
    int8, codes = q.to(torch.int8), q.to(torch.float8_e4m3fn)
    transposed = torch.empty(2, 128, 256, dtype=torch.float8_e4m3fn, device="meta")
    for given in ((q, q, q), (int8, int8, q), (int8, int8, transposed), (codes, codes, transposed)):
        with pretend(90):
            assert launcher.launch_config(*given, bounded=True).hopper
            assert launcher.launch_config(*given, bounded=True, lse=True).hopper
        with pretend(90), by_pointers():
            assert not launcher.launch_config(*given, bounded=True).hopper
            assert not launcher.launch_config(*given, bounded=True).descriptors
        with pretend(100):
            assert not launcher.launch_config(*given, bounded=True).hopper
    with pretend(90):
        assert not launcher.launch_config(narrow, narrow, narrow, bounded=True).hopper, "measured at 128 alone"
        with running("triton"):
            assert not launcher.launch_config(q, q, q, bounded=True).hopper, "the plain kernel, by its name"
    assert launch.config_for(launcher.STEM, "bf16_d128_hopper", 90).hopper
    config = launch.config_for(launcher.STEM, "bf16_d128_hopper", 90)
    assert launch.illegal(config, 90, fp8=False, shared_bytes=0) is None
    for arch in (80, 100, 120):
        assert launch.illegal(config, arch, fp8=False, shared_bytes=0)


# Results --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
def test_bits_depend_neither_on_the_order_of_copies_nor_of_groups(fmt):
    given = inputs(fmt)
    first = attention(given, seed=2, return_lse=True)
    for seed in (3, 4, 5):
        again = attention(given, seed=seed, return_lse=True)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, again, strict=True))


def held(given, block_map, scale=SCALE, **options):
    """Its output, within the budgets of bf16, with the float64 LSE."""
    out, _, lse = run(given, block_map, scale, "hopper", return_lse=True, **options)
    assert problems(given, block_map, out, scale, backend="hopper") == []
    torch.testing.assert_close(lse.double(), dense_oracle(given, block_map, scale)[1], atol=2e-5, rtol=1e-5)
    return out


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 1)])
def test_groups_of_query_heads(fmt, heads):
    held(inputs(fmt, 200, heads=heads), BlockMap.dense(200, 200))


def one_key(fmt, **options):
    """Every query sees one key, each another score: the output is that key's v."""
    given = inputs(fmt, 260, heads=(2, 2), spread=3.0)
    keys = [(5 * i % 260, 5 * i % 260 + 1) for i in range(260)]
    block_map = BlockMap.from_ranges([(i, i + 1) for i in range(260)], keys, 260, 260)
    return attention(given, block_map, **options)[0], given["v"][[first for first, _ in keys]]


@pytest.mark.parametrize("fmt", BOUNDED)
def test_one_key_alone_gives_its_v_exactly(fmt):
    out, expected = one_key(fmt)
    assert torch.equal(out, expected), "as eager attention in bf16 does, whose largest P is 1"


@pytest.mark.parametrize("fmt", BOUNDED)
def test_queries_along_and_against_keys_at_the_bound(fmt):
    """Scores from -99 to 99 in powers of two: every P from 2^-99 to 2^99 is met, alone and beside others."""
    k = normed(200, 1, 32, 0)
    norm = math.sqrt(99 * math.log(2) / SCALE / MARGIN)
    q = torch.cat((k[:80], -k[80:160], normed(40, 1, 32, 1)))
    given = formatted(fmt, q * norm, k * norm, torch.randn(200, 1, 32) * 60)
    assert 90 < bound_of(given, SCALE) <= LIMIT
    held(given, BlockMap.dense(200, 200))
    against = BlockMap.from_ranges([(i, i + 1) for i in range(80, 160)], [(i, i + 1) for i in range(80, 160)], 200, 200)
    out = held(given, against)
    assert torch.equal(out[80:160], given["v"][80:160]), "a sum of one P of 2^-99"


@pytest.mark.parametrize("fmt", BOUNDED)
def test_norm_weights_on_either_side_of_the_switch(fmt, monkeypatch):
    k, q, dense = normed(200, 1, 32, 0), normed(200, 2, 32, 1), BlockMap.dense(200, 200)
    for past, kernel in ((1 - 2**-8, "hopper"), (1 + 2**-8, "plain")):
        widest = math.sqrt(LIMIT * past / (MARGIN * math.log2(math.e) * math.sqrt(32)))
        weight = torch.linspace(0.1, widest - 1, 32)  # the norm multiplies by 1 + weight
        bound = norm_bound(weight, weight)
        assert bound == pytest.approx(LIMIT * past)
        norm = 32**0.5 * (1 + weight)
        given = formatted(fmt, q * norm, k * norm, torch.randn(200, 1, 32))
        assert bound_of(given, SCALE) <= bound
        with monkeypatch.context() as patched:
            assert launched(patched, given, block_map=dense, bound=bound) == [kernel]
        if kernel == "hopper":
            held(given, dense, bound=bound)


@pytest.mark.parametrize("fmt", BOUNDED)
def test_one_huge_row_and_others_tiny(fmt):
    """And where a row's or a block's scale is so small that their product is 0, masked keys are still masked."""
    q, k, v = (torch.randn(300, h, 32, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
    q[1:] *= 1e-30
    q[0] *= 6
    k[128:] *= 1e-25
    given = formatted(fmt, q, k, v)
    held(given, MAP)
    if fmt == "int8_qk":
        assert problems(given, MAP, attention(given, replace=MASKED_FIRST)[0], SCALE, backend="hopper")


@pytest.mark.parametrize("bug", [None, *HIDDEN_BY_SCALE])
def test_hidden_scores_count_for_nothing_however_small_their_scale(bug):
    """Half of the rows see no key of a first block, whose scale times theirs is 0, and scores of -40 in the second."""
    k = normed(200, 1, 32, 0)
    k[128:] = k[128] + 1e-3 * k[128:]
    norm = math.sqrt(40 * math.log(2) / SCALE)
    q = -k[128].expand(128, 1, 32) * norm
    k[:128] *= 1e-38
    v = torch.randn(200, 1, 32, generator=torch.Generator().manual_seed(2))
    given = formatted("int8_qk", q, k * norm, v) | with_e4m3_v(v)
    block_map = BlockMap.from_ranges([(0, 64), (64, 128)], [(128, 200), (0, 100)], 128, 200)
    if bug is None:
        held(given, block_map)
    else:
        out = attention(given, block_map, replace=[HIDDEN_BY_SCALE[bug]])[0]
        assert problems(given, block_map, out, SCALE, backend="hopper")


@pytest.mark.parametrize("fmt", BOUNDED)
def test_65536_equal_keys(fmt):
    """All P are the same, so the result is the mean of v however P was rounded."""
    keys = 65_536
    q, k = normed(64, 1, 32, 0), normed(1, 1, 32, 1).expand(keys, 1, 32)
    norm = math.sqrt(95 * math.log(2) / SCALE / MARGIN)
    v = torch.randn(keys, 1, 32, generator=torch.Generator().manual_seed(2)) + 2
    q[:32] = k[:32]
    given = formatted(fmt, q * norm, k * norm, v)
    out = run(given, BlockMap.dense(64, keys), SCALE, "hopper")[0]
    mean = given["v"].double().mean(dim=0).expand(64, 1, 32)
    assert ((out.double() - mean).abs() <= 2**-8 * mean.abs()).all()


@pytest.mark.parametrize("fmt", BOUNDED)
def test_a_bound_that_is_too_small_shows(fmt):
    given = inputs(fmt, 200, heads=(2, 1), spread=40.0)
    block_map = BlockMap.dense(200, 200)
    assert bound_of(given, SCALE) > 128
    out = run(given, block_map, SCALE, "hopper", bound=50.0)[0]
    assert problems(given, block_map, out, SCALE, backend="hopper")[0] == "the result holds NaN or Inf"


@pytest.mark.parametrize("factor", [1.0, 2.0**-60, 2.0**40])
def test_blocks_of_v_of_any_size_in_e4m3(factor):
    """Each block's scale is in P's exponent: one block's is a thousand times the next one's, all small or all large."""
    given = inputs("fp8", UNEVEN.queries, m=UNEVEN.keys, heads=(2, 2), spread=2.0)
    given["v_scale"] *= factor * torch.tensor([1.0, 2.0**-10, 2.0**6, 1.0])
    held(given, UNEVEN)


# Planted bugs ---------------------------------------------------------------------------------------------------------


def planted(fmt, seed, replace, block_map=UNEVEN, slots=None, heads=(6, 2), d=32):
    """Faults found of an output with bugs planted."""
    given = inputs(fmt, block_map.queries, heads=heads, d=d, m=block_map.keys, spread=3.0 * (32 / d) ** 0.5)
    by_block = torch.tensor([1.0, 0.25, 4.0, 1.0]).repeat(2)[: block_map.key_blocks]
    if uses_e4m3(fmt):
        given["v_scale"] *= by_block
    if given["q"].dtype == torch.int8:
        given["k_scale"] *= by_block / 4
    try:
        out = attention(given, block_map, seed, replace, slots=slots)[0]
    except EmulationError as error:
        return [str(error)]
    return problems(given, block_map, out, SCALE, backend="hopper")


@pytest.mark.quick(9)
@pytest.mark.parametrize(("fmt", "bug"), [(fmt, bug) for fmt, bugs in BUGS.items() for bug in bugs])
def test_planted_bugs_are_caught(fmt, bug):
    found = (planted(fmt, seed, [BUGS[fmt][bug]], m, slots=2) for m in (UNEVEN, LONG, PARTIAL) for seed in (1, 2))
    assert any(found)


@pytest.mark.parametrize("bug", WIDE_E4M3)
def test_planted_bugs_of_wide_heads_are_caught(bug):
    assert any(planted("fp8", seed, [WIDE_E4M3[bug]], LONG, heads=(1, 1), d=128) for seed in (1, 2))


@pytest.mark.parametrize("fmt", BOUNDED)
def test_sums_of_p_before_rounding_are_caught_by_one_key(fmt):
    out, expected = one_key(fmt, replace=SUMS)
    assert not torch.equal(out, expected)
    assert ((out - expected).abs() / expected.abs()).max() > 2**-8


@pytest.mark.quick(6)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("seed", range(2))
def test_without_them_nothing_is_found(fmt, slots, seed):
    """In as few slots as heads of 128 have, where a group may wait for tiles that wait for the other group."""
    for block_map in (UNEVEN, LONG, PARTIAL):
        assert planted(fmt, seed, [], block_map, slots) == []


@pytest.mark.parametrize("seed", range(2))
def test_heads_of_128_in_e4m3(seed):
    for block_map in (UNEVEN, LONG, PARTIAL):
        assert planted("fp8", seed, [], block_map, heads=(2, 1), d=128) == []
