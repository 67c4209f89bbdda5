"""The choice of blocks: the kernels, in the strict interpreter, choose exactly what plain torch chooses."""

import itertools
import math

import interpreter  # noqa: F401  (exact arithmetic)
import pytest
import torch
import triton
import triton.runtime.interpreter as interp
from hypothesis import given, settings
from hypothesis import strategies as st
from strict import permuted_grid, strict
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from happyhorse_fast.block_map import BLOCK, BlockMap, BlockSelector, Layout
from happyhorse_fast.kernels import select_blocks as kernels
from happyhorse_fast.model.launches import LaunchCounter
from happyhorse_fast.ops import self_check
from happyhorse_fast.ops.select_blocks import LAUNCHES, _reference, select_blocks
from happyhorse_fast.ops.triton import select_blocks as launcher

FP8 = torch.float8_e4m3fn
ALIGNED = Layout(3, 250, 30, 1, align_frames=True, align_modalities=True)  # 8 blocks, 6 of them video
RAGGED = Layout(5, 131, 20, 30)  # 705 slots, no boundary on a block
SCORES = ("bf16", "fp8")


def inputs(layout=ALIGNED, heads=(2, 1), d=32, fmt="bf16", seed=0, spread=1.0):
    """q, k and their scales as keyword arguments; random, so no two scores are close to each other."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(layout.slots, h, d, generator=generator) * spread for h in heads)
    if fmt == "bf16":
        return {"q": q.bfloat16(), "k": k.bfloat16()}
    scales = [0.5 + torch.rand(-(-layout.slots // BLOCK), generator=generator) for _ in range(2)]
    return {"q": (100 * q).to(FP8), "k": (100 * k).to(FP8), "q_scale": scales[0] / 100, "k_scale": scales[1] / 100}


def integers(layout, heads=(2, 1), d=32, seed=0, distinct=3):
    """q and k of small integers, with blocks alike and so with ties; their scores are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for h in heads:
        patterns = torch.randint(-2, 3, (distinct, BLOCK, h, d), generator=generator).float()
        patterns[0] *= 0
        which = torch.randint(0, distinct, (-(-layout.slots // BLOCK),), generator=generator)
        made.append(patterns[which].flatten(0, 1)[: layout.slots].bfloat16())
    return dict(zip("qk", made, strict=True))


def selector(layout=ALIGNED, radius=None):
    return BlockSelector(layout, BlockMap.frame_window(layout, radius), "cpu")


def differences(ours, theirs):
    """Names of the tensors of two maps that are not equal."""
    names = ("counts", "starts", "columns", "mask_ids", "mask_bits", "order")
    found = [n for n, a, b in zip(names, ours.tensors(), theirs.tensors(), strict=True) if not torch.equal(a, b)]
    blocks = zip(ours.to_blocks(), theirs.to_blocks(), strict=True)
    return found + ([] if all(torch.equal(a, b) for a, b in blocks) else ["blocks"])


def held(chooser, given, *, checked=True, **amount):
    """The kernels' map, validated and equal to plain torch's, every tensor and every place of it."""
    if checked:
        with strict(seed=0):
            ours = select_blocks(**given, selector=chooser, **amount)
    else:
        ours = select_blocks(**given, selector=chooser, **amount)
    ours.validate()
    assert differences(ours, select_blocks(**given, selector=chooser, **amount, backend="reference")) == []
    return ours


def kept(block_map):
    full, ids = block_map.to_blocks()
    return full | (ids >= 0)


# Against plain torch, and against a choice written down again ---------------------------------------------------------


@pytest.mark.parametrize("fmt", SCORES)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (5, 1)])
def test_groups_and_formats(fmt, heads):
    held(selector(), inputs(heads=heads, fmt=fmt), keep=2)
    held(selector(radius=0), inputs(heads=heads, fmt=fmt, seed=1, spread=4.0), mass=0.6, pool="mean")


@pytest.mark.parametrize("d", [64, 128])
def test_head_dims(d):
    held(selector(), inputs(heads=(1, 1), d=d), keep=3)


@pytest.mark.parametrize("layout", [RAGGED, Layout(5, 77, 0, 0), Layout(1, 5, 0, 1), Layout(2, 128, 1, 300)])
@pytest.mark.parametrize("radius", [None, 1])
def test_ragged_layouts_within_a_window(layout, radius):
    held(selector(layout, radius), inputs(layout), keep=2)


def test_every_keep_and_every_mass():
    chooser, given = selector(RAGGED), inputs(RAGGED, spread=6.0)
    base, sizes = kept(chooser.base).sum(), []
    for keep in range(1, len(chooser.prefix) + 2):
        sizes.append(kept(held(chooser, given, keep=keep, checked=False)).sum())
    assert sizes == sorted(sizes) and sizes[0] < sizes[1] < sizes[-1] == base
    sizes = []
    for tenths in range(1, 11):
        sizes.append(kept(held(chooser, given, mass=tenths / 10, checked=False)).sum())
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] == base


def rule(chooser, given, keep=None, mass=None):
    """What is kept, in float64 and without sorting tricks: bool [Hkv, R, S]."""
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


@pytest.mark.parametrize("amount", [{"keep": 1}, {"keep": 4}, {"mass": 0.37}, {"mass": 0.83}, {"mass": 1.0}])
@pytest.mark.parametrize("layout", [ALIGNED, RAGGED])
def test_ties_go_to_the_lowest_block(layout, amount):
    chooser = selector(layout, 2)
    for seed in range(3):
        given = integers(layout, heads=(4, 2), seed=seed)
        block_map = held(chooser, given, checked=seed == 0, **amount)
        assert torch.equal(kept(block_map), rule(chooser, given, **amount))


def test_all_scores_equal():
    given = {x: torch.zeros(ALIGNED.slots, 1, 32).bfloat16() for x in "qk"}
    video = kept(held(selector(), given, keep=3))[0, :6, :6]
    assert video.sum(dim=1).eq(3).all() and video[:, :3].all()
    video = kept(held(selector(), given, mass=0.5))[0, :6, :6]
    assert video.sum(dim=1).eq(3).all() and video[:, :3].all()


def test_a_product_that_underflows_to_minus_zero_ties_with_zero():
    given = {x: torch.zeros(ALIGNED.slots, 1, 32).bfloat16() for x in "qk"}
    given["q"][:] = 2.0**-80
    given["k"][:128] = -(2.0**-80)
    assert kept(held(selector(), given, keep=1))[0, 0, :6].tolist() == [True] + [False] * 5


def test_audio_and_text_are_kept_and_dense_as_queries():
    base, result = kept(selector().base)[0], kept(held(selector(), inputs(seed=2), keep=1))[0]
    assert torch.equal(result[6:], base[6:])
    assert torch.equal(result[:6, 6:], base[:6, 6:])
    assert result[:6, :6].sum(dim=1).eq(1).all()


def test_rows_without_a_candidate_and_without_a_key():
    base = BlockMap.from_ranges([(0, 200), (640, 1024)], [(0, 300), (700, 900)], ALIGNED.slots, ALIGNED.slots)
    for amount in ({"keep": 2}, {"mass": 0.9}):
        block_map = held(BlockSelector(ALIGNED, base, "cpu"), inputs(), **amount)
        assert block_map.counts[0, 2:5].eq(0).all()
        assert block_map.counts[0, 0, 1] > 0


def test_slots_without_a_token_are_not_read():
    given = inputs()
    for x in given.values():
        x[250:256], x[1024 - 90 :] = torch.nan, torch.nan
    poisoned, clean = held(selector(), given, keep=2), held(selector(), inputs(), keep=2)
    assert torch.equal(poisoned.columns, clean.columns)


def test_strided_inputs_give_the_same_map():
    given = inputs(heads=(2, 1))
    packed = torch.cat([given["q"], given["k"], given["k"]], dim=1)
    strided = {"q": packed[:, :2], "k": packed[:, 2:3]}
    assert differences(held(selector(), strided, keep=2), held(selector(), given, keep=2)) == []
    channels_first = {n: x.permute(1, 2, 0).contiguous().permute(2, 0, 1) for n, x in given.items()}
    assert differences(held(selector(), channels_first, keep=2), held(selector(), given, keep=2)) == []


def test_strides_past_2_to_the_31_do_not_overflow():
    layout = Layout(1, 129, 0, 1)
    far = torch.empty_strided((130, 2, 32), (2**24 + 64, 32, 1), dtype=torch.bfloat16)
    assert 129 * far.stride(0) > 2**31
    far.copy_(inputs(layout)["q"])
    with permuted_grid(0):
        held(selector(layout), {"q": far, "k": far[:, 1:]}, keep=1)


def test_bits_do_not_depend_on_the_order_of_the_programs():
    given = inputs(RAGGED, heads=(4, 2))
    maps = []
    for seed in range(2):
        with permuted_grid(seed):
            maps.append(select_blocks(**given, selector=selector(RAGGED), mass=0.7))
    assert differences(*maps) == []


def test_more_rows_than_one_program_orders():
    layout = Layout(70, 128, 0, 1)
    held(selector(layout, 3), integers(layout, heads=(1, 1), distinct=9), checked=False, mass=0.6)


@st.composite
def cases(draw):
    size = lambda top: draw(st.integers(0, top))  # noqa: E731
    layout = Layout(1 + size(3), 1 + size(200), size(150), size(150), draw(st.booleans()), draw(st.booleans()))
    amount = {"keep": 1 + size(6)} if draw(st.booleans()) else {"mass": draw(st.floats(0.01, 1.0))}
    heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]))
    return layout, draw(st.sampled_from([None, 0, 1])), heads, draw(st.integers(0, 99)), amount


@settings(max_examples=12, deadline=None)
@given(cases())
def test_any_layout(case):
    layout, radius, heads, seed, amount = case
    chooser = selector(layout, radius)
    held(chooser, integers(layout, heads, seed=seed, distinct=5), checked=False, **amount)
    held(chooser, inputs(layout, heads, seed=seed, spread=3.0), checked=False, **amount)


# Planted bugs ---------------------------------------------------------------------------------------------------------


@triton.jit
def rank_key_without_sign(score):
    return score.to(triton.language.uint32, bitcast=True) | 1


@triton.jit
def block_sum_of_half(
    source, live, block, head, stride_row, stride_head, stride_channel, D, BLOCK, ROWS: triton.language.constexpr
):
    place = source + block * BLOCK * stride_row + head * stride_head + triton.language.arange(0, D) * stride_channel
    return triton.language.load(place).to(triton.language.float32)


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


# The op ---------------------------------------------------------------------------------------------------------------


class NoSync(TorchDispatchMode):
    """Fails on what waits for the device, or would: the value or the place of an element on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(n in str(func) for n in ("_local_scalar_dense", "nonzero", "masked_select", "unique")), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", [launcher.select_blocks, _reference])
def test_no_wait_for_the_device(op):
    given = inputs()
    for amount in ((2, 0), (0, 2**19)):
        with NoSync():
            op._init_fn(*given.values(), *selector().tensors(), None, None, *amount, False)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        given["q"].sum().item()


@pytest.mark.parametrize("amount", [(2, 0), (0, 2**19)])
def test_the_op_launches_what_it_declares(amount, monkeypatch):
    launched, executor = [], interp.GridExecutor.__call__

    def launch(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        executor(self, *args, **kwargs)

    monkeypatch.setattr(interp.GridExecutor, "__call__", launch)
    given, tensors = inputs(), selector().tensors()
    with LaunchCounter() as counter:
        launcher.select_blocks._init_fn(*given.values(), *tensors, None, None, *amount, False)
    assert [n for n in counter.names if "aten::" in n and n not in ("aten::copy_", "aten::_to_copy")] == []
    assert len(launched) == LAUNCHES["happyhorse_fast::select_blocks"]


@pytest.mark.parametrize("fmt", SCORES)
def test_opcheck(fmt):
    given = inputs(fmt=fmt)
    scales = given.get("q_scale"), given.get("k_scale")
    arguments = (given["q"], given["k"], *selector().tensors(), *scales, 2, 0, False)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if fmt == "bf16":  # test_schema multiplies every input, which torch 2.13 does not do for e4m3 on the CPU
        checks.append("test_schema")
    for op in (torch.ops.happyhorse_fast.select_blocks, torch.ops.happyhorse_fast.select_blocks_reference):
        torch.library.opcheck(op.default, arguments, test_utils=checks)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiles_as_one_graph(backend):
    chooser, given = selector(), inputs()

    def tensors(q, k):
        return select_blocks(q, k, chooser, mass=0.5, backend=backend).tensors()

    compiled = torch.compile(tensors, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(**given), tensors(**given), strict=True):
        assert torch.equal(a, b)


def unmade_selector(blocks):
    """A selector of shapes alone, dense, on the device that is current."""
    made = BlockSelector.__new__(BlockSelector)
    n, one = blocks * BLOCK, torch.empty(1, dtype=torch.int32)
    shapes = ((1, blocks, 2), (1, blocks), (blocks**2,), (blocks**2,), (1, BLOCK, 4), (blocks,))
    made.base = BlockMap(*(one.new_empty(s) for s in shapes), queries=n, keys=n)
    made.table, made.inverse = one.new_empty(blocks, blocks), torch.empty(blocks)
    made.prefix, made.live = torch.empty(blocks, dtype=torch.int8), torch.empty(n, dtype=torch.int8)
    return made


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("fmt", SCORES)
def test_fake_tensors_have_the_shapes_of_a_15b_layer(fmt, backend):
    with FakeTensorMode(), torch.device("cuda"):
        blocks, dtype = 1464, torch.bfloat16 if fmt == "bf16" else FP8
        q, k = (torch.empty(blocks * BLOCK, h, 128, dtype=dtype) for h in (40, 8))
        scales = {} if fmt == "bf16" else {"q_scale": torch.empty(blocks), "k_scale": torch.empty(blocks)}
        made = select_blocks(q, k, unmade_selector(blocks), keep=300, **scales, backend=backend)
    assert made.counts.shape == (8, blocks, 2) and made.order.shape == (8 * blocks,)
    assert made.columns.shape == made.mask_ids.shape == (8 * blocks**2,)
    assert {t.dtype for t in made.tensors()} == {torch.int32} and made.device.type == "cuda"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(1024, 2, 32)}, TypeError, "q must be bfloat16 or float8_e4m3fn, got torch.float32"),
        ({"k": torch.zeros(1024, 1, 32).to(FP8)}, TypeError, "k must be of q's dtype"),
        ({"q": torch.zeros(1023, 2, 32).bfloat16()}, ValueError, r"q must be \[1024, heads, D\], got \[1023, 2, 32\]"),
        ({"k": torch.zeros(1024, 4, 32).bfloat16()}, ValueError, "q must have a multiple of k's heads"),
        ({x: torch.zeros(1024, 1, 48).bfloat16() for x in "qk"}, ValueError, "head dim of 32, 64 or 128; got 48"),
        ({"q_scale": torch.ones(8)}, ValueError, "q_scale must be given exactly where"),
        ({"keep": 0}, ValueError, "keep must be at least 1, got 0"),
        ({"keep": None, "mass": 1.5}, ValueError, "0 < mass <= 1, got 1.5"),
        ({"mass": 0.5}, ValueError, "exactly one of keep and mass must be given, got keep=2 and mass=0.5"),
        ({"pool": "min"}, ValueError, 'pool must be "max" or "mean", got \'min\''),
        ({"backend": "cuda"}, ValueError, 'backend must be "triton" or "reference", got \'cuda\''),
        ({"q": torch.zeros(1024, 2, 32, device="meta").bfloat16()}, ValueError, "on q's device meta"),
    ],
)
def test_what_the_kernel_cannot_take_is_named(change, error, message):
    with pytest.raises(error, match=message):
        select_blocks(**({**inputs(), "selector": selector(), "keep": 2} | change))


def test_scales_of_another_size_and_too_many_blocks_are_named():
    given = inputs(fmt="fp8")
    with pytest.raises(ValueError, match=r"k_scale must be of shape \[8\], got \[7\]"):
        select_blocks(**given | {"k_scale": torch.ones(7)}, selector=selector(), keep=2)
    with FakeTensorMode(), pytest.raises(ValueError, match="at most 2048 blocks and fewer than .* got 2049 blocks"):
        x = torch.empty(2049 * BLOCK, 1, 32, dtype=torch.bfloat16)
        select_blocks(x, x, unmade_selector(2049), keep=2)


def test_a_selector_says_what_it_cannot_take():
    with pytest.raises(ValueError, match="one map for all heads, got one for each of 2"):
        BlockSelector(ALIGNED, select_blocks(**inputs(heads=(2, 2)), selector=selector(), keep=1), "cpu")
    with pytest.raises(ValueError, match="base must be given for a layout of type object"):
        BlockSelector(object(), None, "cpu")
