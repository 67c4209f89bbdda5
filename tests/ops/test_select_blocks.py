"""The choice of blocks: the kernels choose exactly what plain torch chooses, and what a plain rule says."""

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl
from fuzz import examples
from hypothesis import given
from select_cases import ALIGNED, KERNELS, RAGGED, SCORES, cases, differences, held, inputs, integers, kept, selector
from strict import permuted_grid, strict

from happyhorse_fast.block_map import BLOCK, BlockMap, BlockSelector, Layout
from happyhorse_fast.kernels import block_selection as kernels
from happyhorse_fast.ops import select_blocks
from happyhorse_fast.ops.runtime import self_check


@pytest.fixture(params=KERNELS)
def backend(request):
    return request.param


# Against plain torch, and against a choice written down again ---------------------------------------------------------


@pytest.mark.quick(5)
@pytest.mark.parametrize("fmt", SCORES)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (5, 1)])
def test_groups_and_formats(fmt, heads, backend):
    held(selector(), inputs(heads=heads, fmt=fmt), keep=2, checked=True, backend=backend)
    held(selector(radius=0), inputs(heads=heads, fmt=fmt, seed=1, spread=4.0), mass=0.6, pool="mean", backend=backend)


def test_int8_pools_values_and_not_codes(backend):
    # Scales of powers of two: sums are exact in any order, and what their values give in bf16 too.
    given = integers(RAGGED, heads=(4, 2), seed=3, distinct=5)
    scales = {
        "q": 2.0 ** (torch.arange(RAGGED.slots * 4) % 3).view(-1, 4),
        "k": 2.0 ** -(torch.arange(12) % 4).view(2, 6),
    }
    each = {"q": scales["q"], "k": scales["k"].repeat_interleave(BLOCK, dim=1)[:, : RAGGED.slots].T}
    values = {x: (given[x].float() * each[x][:, :, None]).bfloat16() for x in "qk"}
    codes = {x: given[x].to(torch.int8) for x in "qk"} | {f"{x}_scale": scales[x].contiguous() for x in "qk"}
    for amount in ({"keep": 2}, {"mass": 0.6}):
        ours = held(selector(RAGGED), codes, **amount, checked=True, backend=backend)
        assert (
            differences(ours, select_blocks(**values, selector=selector(RAGGED), **amount, backend="reference")) == []
        )


@pytest.mark.parametrize("d", [64, 128])
def test_head_dims(d, backend):
    held(selector(), inputs(heads=(1, 1), d=d), keep=3, backend=backend)


@pytest.mark.parametrize("layout", [RAGGED, Layout(5, 77, 0, 0), Layout(1, 5, 0, 1), Layout(2, 128, 1, 300)])
@pytest.mark.parametrize("radius", [None, 1])
def test_ragged_layouts_within_a_window(layout, radius, backend):
    held(selector(layout, radius), inputs(layout), keep=2, checked=True, backend=backend)


def test_every_keep_and_every_mass(backend):
    chooser, given = selector(RAGGED), inputs(RAGGED, spread=6.0)
    base, sizes = kept(chooser.base).sum(), []
    for keep in range(1, len(chooser.prefix) + 2):
        sizes.append(kept(held(chooser, given, keep=keep, backend=backend)).sum())
    assert sizes == sorted(sizes) and sizes[0] < sizes[1] < sizes[-1] == base
    sizes = []
    for mass in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        sizes.append(kept(held(chooser, given, mass=mass, backend=backend)).sum())
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] == base


def rule(chooser, given, keep=None, mass=None):
    """Blocks that are kept, in float64 and without sorting tricks: bool [Hkv, R, S]."""
    live = chooser.live.view(-1, BLOCK, 1, 1).double()
    q, k = (torch.nn.functional.pad(given[x].double(), (0,) * 5 + (-len(given[x]) % BLOCK,)) for x in "qk")
    means = [(x.unflatten(0, (-1, BLOCK)) * live).sum(1) / live.sum(1).clamp(min=1) for x in (q, k)]
    group = q.shape[1] // k.shape[1]
    base, prefix = kept(chooser.base)[0], chooser.prefix.bool()
    result = torch.zeros(k.shape[1], *base.shape, dtype=torch.bool)
    for head, row in itertools.product(range(k.shape[1]), range(len(base))):
        result[head, row] = base[row] & (prefix | prefix[row])
        candidates = (base[row] & ~prefix & ~prefix[row]).nonzero().flatten().tolist()
        members = means[0][row, head * group : (head + 1) * group]
        score = {c: float((members @ means[1][c, head]).max()) / math.sqrt(q.shape[2]) for c in candidates}
        weight = {c: math.exp(score[c] - max(score.values())) for c in candidates}
        reached = 0.0
        for rank, c in enumerate(sorted(candidates, key=lambda c: (-score[c], c))):
            if (rank >= keep) if mass is None else (reached >= mass * sum(weight.values())):
                break
            result[head, row, c] = True
            reached += weight[c]
    return result


@pytest.mark.quick(4)
@pytest.mark.parametrize("amount", [{"keep": 1}, {"keep": 4}, {"mass": 0.37}, {"mass": 0.83}, {"mass": 1.0}])
@pytest.mark.parametrize("layout", [ALIGNED, RAGGED])
def test_ties_go_to_the_lowest_block(layout, amount, backend):
    chooser = selector(layout, 2)
    for seed in range(2):
        given = integers(layout, heads=(4, 2), seed=seed)
        block_map = held(chooser, given, **amount, backend=backend)
        assert torch.equal(kept(block_map), rule(chooser, given, **amount))


def test_all_scores_equal(backend):
    given = {x: torch.zeros(ALIGNED.slots, 1, 32).bfloat16() for x in "qk"}
    video = kept(held(selector(), given, keep=3, backend=backend))[0, :6, :6]
    assert video.sum(dim=1).eq(3).all() and video[:, :3].all()
    video = kept(held(selector(), given, mass=0.5, backend=backend))[0, :6, :6]
    assert video.sum(dim=1).eq(3).all() and video[:, :3].all()


def test_a_product_that_underflows_to_minus_zero_ties_with_zero(backend):
    given = {x: torch.zeros(ALIGNED.slots, 1, 32).bfloat16() for x in "qk"}
    given["q"][:] = 2.0**-80
    given["k"][:128] = -(2.0**-80)
    assert kept(held(selector(), given, keep=1, backend=backend))[0, 0, :6].tolist() == [True] + [False] * 5


def test_audio_and_text_are_kept_and_dense_as_queries(backend):
    base, result = kept(selector().base)[0], kept(held(selector(), inputs(seed=2), keep=1, backend=backend))[0]
    assert torch.equal(result[6:], base[6:])
    assert torch.equal(result[:6, 6:], base[:6, 6:])
    assert result[:6, :6].sum(dim=1).eq(1).all()


def test_rows_without_a_candidate_and_without_a_key(backend):
    base = BlockMap.from_ranges([(0, 200), (640, 1024)], [(0, 300), (700, 900)], ALIGNED.slots, ALIGNED.slots)
    for amount in ({"keep": 2}, {"mass": 0.9}):
        block_map = held(BlockSelector(ALIGNED, base, "cpu"), inputs(), **amount, backend=backend)
        assert block_map.counts[0, 2:5].eq(0).all()
        assert block_map.counts[0, 0, 1] > 0


def test_slots_without_a_token_are_not_read(backend):
    given = inputs()
    for x in given.values():
        x[250:256], x[1024 - 90 :] = torch.nan, torch.nan
    poisoned, clean = (held(selector(), x, keep=2, backend=backend) for x in (given, inputs()))
    assert torch.equal(poisoned.columns, clean.columns)


def test_strided_inputs_give_the_same_map(backend):
    given = inputs(heads=(2, 1))
    contiguous = held(selector(), given, keep=2, backend=backend)
    packed = torch.cat([given["q"], given["k"], given["k"]], dim=1)
    strided = {"q": packed[:, :2], "k": packed[:, 2:3]}
    assert differences(held(selector(), strided, keep=2, backend=backend), contiguous) == []
    channels_first = {n: x.permute(1, 2, 0).contiguous().permute(2, 0, 1) for n, x in given.items()}
    assert differences(held(selector(), channels_first, keep=2, backend=backend), contiguous) == []


def test_strides_past_2_to_the_31_do_not_overflow(backend):
    layout = Layout(1, 129, 0, 1)
    far = torch.empty_strided((130, 2, 32), (2**24 + 64, 32, 1), dtype=torch.bfloat16)
    assert 129 * far.stride(0) > 2**31
    far.copy_(inputs(layout)["q"])
    with permuted_grid(0):
        held(selector(layout), {"q": far, "k": far[:, 1:]}, keep=1, backend=backend)


def test_bits_do_not_depend_on_the_order_of_the_programs():
    given = inputs(RAGGED, heads=(4, 2))
    maps = []
    for seed in range(2):
        with permuted_grid(seed):
            maps.append(select_blocks(**given, selector=selector(RAGGED), mass=0.7))
    assert differences(*maps) == []


@pytest.mark.parametrize("rows", [1, 64, 65, 150])
def test_rows_are_ordered_longest_first_and_equal_ones_as_they_come(rows):
    counts = torch.randint(0, 9, (rows, 2), generator=torch.Generator().manual_seed(rows), dtype=torch.int32)
    with strict():
        order = torch.empty(rows, dtype=torch.int32)
        kernels.order_rows_kernel[(-(-rows // 64),)](counts, order, rows, BLOCK_M=64, BLOCK_N=64)
    assert torch.equal(order, counts[:, 1].argsort(descending=True, stable=True).to(torch.int32))


@examples(6)
@given(cases())
def test_any_layout(case):
    layout, radius, heads, seed, amount = case
    chooser = selector(layout, radius)
    held(chooser, integers(layout, heads, seed=seed, distinct=5), **amount)
    held(chooser, inputs(layout, heads, seed=seed, spread=3.0), **amount)


# Planted bugs ---------------------------------------------------------------------------------------------------------


@triton.jit
def rank_key_without_sign(score):
    return score.to(tl.uint32, bitcast=True) | 1


@triton.jit
def block_sum_of_half(
    source, scale, live, block, head, stride_row, stride_head, stride_channel, HEADS, D, BLOCK, ROWS: tl.constexpr
):
    place = source + block * BLOCK * stride_row + head * stride_head + tl.arange(0, D) * stride_channel
    return tl.load(place).to(tl.float32)


@pytest.mark.quick(5)
@pytest.mark.parametrize(
    "bug", ["rank", "sum", "keep", "mass", "scale", "live", "head", "window", "prefix", "pool", "order"]
)
def test_planted_bugs_change_the_map(bug, monkeypatch):
    chooser, given = selector(radius=1), inputs(heads=(4, 2), fmt="fp8", spread=2.0)
    # Padding that would count, were it read; and a block whose scores the scale alone makes small.
    given["k"][250:256] = 448
    given["k_scale"][1] = 1e-6
    amount = {"mass": 0.6} if bug in ("mass", "live") else {"keep": 2}
    good = select_blocks(**given, selector=chooser, **amount, backend="reference")
    wrong, bad = selector(radius=1), dict(given)
    if bug == "rank":
        monkeypatch.setattr(kernels, "rank_key", rank_key_without_sign)
    elif bug == "sum":
        monkeypatch.setattr(kernels, "block_sum", block_sum_of_half)
    elif bug == "keep":
        amount = {"keep": 3}
    elif bug == "mass":
        amount = {"mass": 0.7}
    elif bug == "scale":
        bad["k_scale"] = torch.ones_like(bad["k_scale"])
    elif bug == "live":
        wrong.live = torch.ones_like(wrong.live)
    elif bug == "head":
        bad["k"] = bad["k"].flip(1)
    elif bug == "window":
        wrong = selector()
    elif bug == "prefix":
        wrong.prefix = torch.zeros_like(wrong.prefix)
    elif bug == "pool":
        amount |= {"pool": "mean"}
    ours = select_blocks(**bad, selector=wrong, **amount)
    if bug == "order":
        ours.order.copy_(ours.order.flip(0))
    assert differences(ours, good) != []


def test_the_self_check_passes_and_sees_a_wrong_map(monkeypatch):
    check = self_check.CHECKS["select_blocks"]
    assert self_check._judge(check("triton", torch.device("cpu"), "fp8"))[0]
    monkeypatch.setattr(kernels, "rank_key", rank_key_without_sign)
    passed, detail = self_check._judge(check("triton", torch.device("cpu"), "bf16"))
    assert not passed and "top-k blocks" in detail
