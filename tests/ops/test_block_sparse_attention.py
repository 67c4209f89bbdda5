"""The attention kernels, in the strict interpreter and the CUDA shim, against float64 and within their budgets.

The ops around them, and how they load: test_block_sparse_attention_ops.py.
"""

import dataclasses
import functools
import math

import pytest
import torch
from attention_cases import (
    CASES,
    FORMATS,
    FP8,
    KERNELS,
    MAP,
    RUNS,
    bound_of,
    dense_oracle,
    eager_bf16,
    form_of,
    inputs,
    problems,
    rounding,
    run,
    values,
    with_e4m3_v,
)
from bf16_budget import bf16_violations
from fuzz import examples
from hypothesis import example, given
from hypothesis import strategies as st
from strict import permuted_grid

from happyhorse_fast import budgets
from happyhorse_fast.block_map import BlockMap, Layout
from happyhorse_fast.eager.attention import block_sparse_attention as exact_attention
from happyhorse_fast.ops import block_sparse_attention
from happyhorse_fast.ops.attention.reference import output_scale, sparse_attention
from happyhorse_fast.ops.attention.score_bound import LIMIT
from happyhorse_fast.ops.qkv.reference import quantize_v
from happyhorse_fast.ops.quantize import SMALLEST_SCALE, dequantize
from happyhorse_fast.ops.runtime.formats import uses_e4m3


def held(given, block_map, scale=None, **options):
    scale = given["q"].shape[2] ** -0.5 if scale is None else scale
    out, _, lse = run(given, block_map, scale, return_lse=True, **options)
    assert problems(given, block_map, out, scale, options.get("gate"), options["backend"]) == []
    expected = dense_oracle(given, block_map, scale)[1]
    torch.testing.assert_close(lse.double(), expected, atol=2e-5, rtol=1e-5)
    return out


@pytest.mark.quick(17)
@CASES
@pytest.mark.parametrize("n", [1, 127, 128, 129, 255])
def test_tails(fmt, n, backend):
    held(inputs(fmt, n, heads=(1, 1)), BlockMap.dense(n, n), backend=backend)


@pytest.mark.quick(6)
@CASES
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (10, 2)])
def test_grouped_heads_on_a_frame_window(fmt, heads, backend):
    held(inputs(fmt, heads=heads), MAP, backend=backend)


@pytest.mark.quick(7)
@CASES
@pytest.mark.parametrize("d", [64, 128])
def test_head_dims(fmt, d, backend):
    held(inputs(fmt, 200, heads=(2, 1), d=d), BlockMap.dense(200, 200), backend=backend)


@pytest.mark.quick(10)
@CASES
@pytest.mark.parametrize("layout", [Layout(2, 100, 0, 30), Layout(2, 120, 14, 1), Layout(3, 60, 0, 0)])
def test_empty_audio_one_text_token_and_no_prefix(fmt, layout, backend):
    held(inputs(fmt, layout.slots, heads=(2, 1)), BlockMap.frame_window(layout, 0), backend=backend)


@pytest.mark.quick(5)
@CASES
def test_several_clips_in_one_sequence(fmt, backend):
    layouts = [Layout(2, 60, 5, 9), Layout(1, 100, 0, 30)]
    block_map = BlockMap.frame_window(layouts, 0)
    held(inputs(fmt, block_map.queries, heads=(2, 1)), block_map, backend=backend)


@pytest.mark.quick(5)
@CASES
def test_aligned_padding_is_never_read_as_a_key(fmt, backend):
    layout = Layout(2, 120, 20, 30, align_frames=True, align_modalities=True)
    block_map = BlockMap.frame_window(layout, 0)
    given = inputs(fmt, layout.slots, heads=(2, 1))
    out = held(given, block_map, backend=backend)
    given["k"].view(torch.uint8)[120:128] = 0x38  # other finite values in the padding
    if not uses_e4m3(fmt):
        given["v"][120:128] = 7.0
    changed = run(given, block_map, backend=backend)[0]
    used = torch.cat([torch.arange(*s) for s in layout.frame_spans() + layout.prefix_spans()])
    assert torch.equal(out[used], changed[used])


@CASES
def test_more_keys_than_queries_and_the_other_way_round(fmt, backend):
    held(inputs(fmt, 70, m=200, heads=(2, 1)), BlockMap.dense(70, 200), backend=backend)
    held(inputs(fmt, 200, m=70, heads=(2, 1)), BlockMap.dense(200, 70), backend=backend)


@pytest.mark.quick(5)
@CASES
def test_rows_without_a_key_give_zero_and_minus_infinity(fmt, backend):
    block_map = BlockMap.from_ranges([(0, 100), (140, 150)], [(0, 256), (30, 90)], 300, 300)
    given = inputs(fmt, heads=(2, 1))
    out, _, lse = run(given, block_map, return_lse=True, backend=backend)
    assert problems(given, block_map, out, 32**-0.5, backend=backend) == []
    empty = torch.cat([torch.arange(100, 140), torch.arange(150, 300)])
    assert (out[empty] == 0).all()
    assert (lse[:, empty] == -torch.inf).all() and torch.isfinite(lse[:, :100]).all()
    codes, _, _ = run(given, block_map, fp8_out=True, backend=backend)
    assert (codes[empty].float() == 0).all()


@pytest.mark.parametrize("backend", KERNELS)
def test_nothing_at_all(backend):
    given = inputs("bf16", 5, m=0)
    out, _, lse = run(given, BlockMap.dense(5, 0), return_lse=True, backend=backend)
    assert (out == 0).all() and (lse == -torch.inf).all()
    assert run(inputs("bf16", 0, m=5), BlockMap.dense(0, 5), backend=backend)[0].shape == (0, 4, 32)


@pytest.mark.quick(5)
@CASES
def test_strided_inputs_give_the_same_bits(fmt, backend):
    given = inputs(fmt)
    plain = run(given, MAP, backend=backend)
    strided = dict(given)
    for name, start, heads in (("q", 0, 4), ("k", 128, 2), ("v", 192, 2)):
        if given[name].shape[0] != 300:
            continue  # v in e4m3 is transposed
        packed = torch.zeros(300, 4 * 32 + 2 * 32 + 2 * 32 + 32).to(given[name].dtype)
        view = packed[:, start : start + heads * 32].unflatten(1, (heads, 32))
        view.view(torch.uint8).copy_(given[name].view(torch.uint8))
        strided[name] = view
    assert torch.equal(run(strided, MAP, backend=backend)[0], plain[0])
    if not backend.startswith("triton"):
        return  # cuda loads 16 bytes, the Hopper kernel loads by TMA: their channels cannot be apart
    for name in "qkv":
        strided[name] = given[name].transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(run(strided, MAP, backend=backend)[0], plain[0])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_strides_past_2_to_the_31_do_not_overflow(name, backend):
    given = inputs("bf16", 130, heads=(1, 1))
    far = torch.empty_strided((130, 1, 32), (2**31 // 128 + 64, 32, 1), dtype=torch.bfloat16)
    far.copy_(given[name])
    expected = run(given, BlockMap.dense(130, 130), backend=backend)[0]
    assert torch.equal(run(given | {name: far}, BlockMap.dense(130, 130), backend=backend)[0], expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_one_softmax_over_the_union_of_window_and_prefix(backend):
    ranges = [(0, 77, 0, 77), (77, 154, 77, 154), (154, 231, 154, 231), (0, 231, 231, 300), (231, 300, 0, 300)]
    given = inputs("bf16")
    q, k, v = values(given)
    exact, lse = exact_attention(q, k, v, ranges)
    out, _, got = run(given, MAP, return_lse=True, backend=backend)
    eager = budgets.measure(eager_bf16(given, MAP, 32**-0.5), exact)
    assert bf16_violations(budgets.measure(out, exact), eager) == []
    torch.testing.assert_close(got.double(), lse, atol=2e-5, rtol=1e-5)
    window, _ = exact_attention(q, k, v, [r for r in ranges if r[2] < 231 or r[0] == 231])
    prefix, _ = exact_attention(q, k, v, [(0, 231, 231, 300)])
    for wrong in (window + prefix, (window + prefix) / 2):
        assert bf16_violations(budgets.measure(wrong, exact), eager)


@pytest.mark.quick(5)
@CASES
def test_a_map_per_key_value_head(fmt, backend):
    layout = Layout(4, 128, 20, 30)
    given = inputs(fmt, layout.slots, heads=(4, 2))
    q, k, _ = values(given)
    block_map = BlockMap.top_k(q.float(), k.float(), layout, keep=1)
    assert block_map.heads == 2
    assert not torch.equal(block_map.to_dense()[0], block_map.to_dense()[1])
    held(given, block_map, backend=backend)


@pytest.mark.quick(5)
@CASES
def test_gate_and_fp8_output(fmt, backend):
    given = inputs(fmt)
    gate = torch.rand(300, 4, generator=torch.Generator().manual_seed(1))
    held(given, MAP, gate=gate, backend=backend)
    codes, scale, lse = run(given, MAP, gate=gate, fp8_out=True, backend=backend)
    assert codes.dtype == FP8 and lse.numel() == 0
    of_v = given["v_scale"].max() * 448 if uses_e4m3(fmt) else given["v"].abs().max()
    assert torch.equal(scale, (of_v * gate.max() * (1 / 448)).float().reshape(1))
    exact, _ = sparse_attention(
        **given,
        block_map=MAP,
        scale=32**-0.5,
        gate=gate,
        out_scale=scale,
        **rounding(given, backend),
        wide=torch.float64,
    )
    value, wanted = (dequantize(c, scale, torch.float64) for c in (codes, exact))
    assert budgets.measure(value, wanted).tile_distance < 3.3e-4, "what one e4m3 rounding costs"


@CASES
def test_one_key_alone_reaches_the_largest_code_of_fp8_output(fmt, backend):
    """Every query sees the key with the largest v, of 1e4 among ones: with rounding, the bound itself."""
    given = inputs(fmt, heads=(2, 2))
    v = torch.ones(300, 2, 32)
    v[7, :, 3], v[7, :, 4], v[7, :, 5] = 1e4, -1e4, -0.0
    given |= with_e4m3_v(v) if uses_e4m3(fmt) else {"v": v.bfloat16()}
    gate = torch.full((300, 2), 0.7)
    block_map = BlockMap.from_ranges([(0, 300)], [(7, 8)], 300, 300)
    codes, scale, _ = run(given, block_map, gate=gate, fp8_out=True, backend=backend)
    value = codes.float() * scale
    assert (codes[:, :, 3].float() == 448).all() and (codes[:, :, 4].float() == -448).all()
    assert (codes[:, :, 5].float() == 0).all()
    torch.testing.assert_close(value, (values(given)[2][7] * 0.7).float().expand_as(value), rtol=2**-4, atol=0.02)


def test_the_scale_of_fp8_output_bounds_it():
    v = torch.tensor([3.0, -5.0, 0.0]).reshape(3, 1, 1).bfloat16()
    gate = torch.tensor([[0.5], [-0.25]])
    for case, wanted in (
        ((v, None, None), 5 / 448),
        ((v, None, gate), 2.5 / 448),
        ((torch.ones(1, 2, 256).to(torch.float8_e4m3fn), torch.tensor([[0.25, 2.0]]), gate), 1.0),
        ((0 * v, None, gate), SMALLEST_SCALE),
        ((v, None, 0 * gate), SMALLEST_SCALE),
        ((v[:0], None, gate), SMALLEST_SCALE),
        ((v * torch.inf, None, gate), torch.nan),
    ):
        assert torch.allclose(output_scale(*case), torch.tensor([wanted]), rtol=0, atol=0, equal_nan=True), case


def test_blocks_of_zeros_do_not_bound_e4m3_results():
    """Their scale of v is the smallest there is."""
    given = inputs("fp8", 400, heads=(2, 2))
    v = 0.03 * torch.randn(400, 2, 32, generator=torch.Generator().manual_seed(0))
    v[128:256] = 0
    v[300:, 0] = -v[300:, 0].abs()
    given["v"], of_v = quantize_v(v)
    given["v_scale"] = of_v.contiguous()
    assert (of_v[:, 1] == SMALLEST_SCALE).all() and (of_v[:, [0, 2, 3]] > 1e-5).all()
    codes, scale, _ = run(given, BlockMap.dense(400, 400), fp8_out=True)
    exact, _, _ = run(given, BlockMap.dense(400, 400))
    assert (codes.float() * scale - exact.float()).norm() < 0.03 * exact.float().norm()
    assert float(scale) == pytest.approx(float(of_v.max()), rel=1e-6)


@pytest.mark.quick(3)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bound", [math.inf, LIMIT], ids=["running", "bounded"])
def test_bits_do_not_depend_on_the_order_of_the_work(fmt, bound):
    given = inputs(fmt)
    options = {"scale": 32**-0.5, "bound": bound, "return_lse": True}
    first = block_sparse_attention(**given, block_map=MAP, **options)
    shuffled = dataclasses.replace(MAP, order=MAP.order.flip(0).contiguous())
    for block_map, seed in ((shuffled, 1), (MAP, 2), (MAP, 3)):
        with permuted_grid(seed):
            again = block_sparse_attention(**given, block_map=block_map, **options)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, again, strict=True))


@pytest.mark.quick(10)
@CASES
@pytest.mark.parametrize("spread", [1e-3, 40.0, 2000.0])
def test_small_and_large_scores(fmt, spread, backend):
    """Without a maximum: of up to 40 and 99 in powers of two."""
    if form_of(backend) == "bounded" and not uses_e4m3(fmt) and spread > 1:
        spread = (40 if spread == 40 else 99) / bound_of(inputs(fmt, 200, heads=(2, 1)), 32**-0.5)
    given = inputs(fmt, 200, heads=(2, 1), spread=spread)
    out, _, lse = run(given, BlockMap.dense(200, 200), return_lse=True, backend=backend)
    assert torch.isfinite(out).all()
    expected = dense_oracle(given, BlockMap.dense(200, 200), 32**-0.5)[1]
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-4)
    assert problems(given, BlockMap.dense(200, 200), out, 32**-0.5, backend=backend) == []


def test_equal_scores_give_the_mean_without_saturating_p():
    given = inputs("fp8", 300, heads=(1, 1))
    given["q"] = torch.zeros_like(given["q"].float()).to(FP8)
    out = run(given, BlockMap.dense(300, 300))[0]
    mean = values(given)[2].mean(dim=0)
    torch.testing.assert_close(out.double(), mean.expand(300, 1, 32), atol=1e-3, rtol=8e-3)


@CASES
def test_sparse_exact_inputs_show_every_index(fmt, backend):
    generator = torch.Generator().manual_seed(3)
    given = inputs(fmt, 300, heads=(2, 1))
    for name in "qkv":
        codes = torch.randint(-2, 3, given[name].shape, generator=generator) * (
            torch.rand(given[name].shape, generator=generator) < 0.25
        )
        given[name] = codes.float().to(given[name].dtype)
    for name in ("q_scale", "k_scale", "v_scale"):
        if name in given:
            given[name] = torch.exp2(torch.arange(given[name].numel()).view(given[name].shape) % 3 - 1.0)
    held(given, MAP, backend=backend)


@st.composite
def cases(draw):
    n, m = draw(st.integers(1, 260)), draw(st.integers(1, 260))
    span = lambda size: st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted)  # noqa: E731
    rows = draw(st.lists(st.tuples(span(n), span(m)), max_size=4))
    heads = draw(st.sampled_from([(1, 1), (2, 1), (5, 1)]))
    fmt, backend = draw(st.sampled_from(RUNS))
    return fmt, backend, n, m, heads, rows


@examples(16)
@example(("fp8", "triton", 245, 3, (2, 1), [([0, 1], [2, 3])]))
@given(cases())
def test_any_ranges(case):
    fmt, backend, n, m, heads, rows = case
    block_map = BlockMap.from_ranges([q for q, _ in rows], [k for _, k in rows], n, m)
    given = inputs(fmt, n, heads=heads, m=m)
    out = run(given, block_map, backend=backend)[0]
    ordered, _ = sparse_attention(
        **given, block_map=block_map, scale=32**-0.5, **rounding(given, backend), wide=torch.float64, round_out=False
    )
    # A row of one key is a row of e4m3 v: few different values, whose rounding to bf16 can go one way by 3.9e-3.
    assert budgets.violations(budgets.measure(out, ordered.to(out.dtype))) == []


@pytest.mark.quick(5)
@CASES
def test_the_reference_backend_is_the_kernel_within_rounding(fmt, backend):
    given = inputs(fmt)
    gate = torch.rand(300, 4)
    options = {"gate": gate, "return_lse": True}
    ours, theirs = (run(given, MAP, backend=b, **options) for b in (backend, "reference"))
    assert ours[1].shape == theirs[1].shape == (0,)
    out, sums = theirs[::2]
    if rounding(given, backend)["folded"]:  # which no other kernel does
        out, sums = sparse_attention(**given, block_map=MAP, scale=32**-0.5, folded=True, **options)
    assert budgets.measure(ours[0], out).tile_distance < 2e-4
    torch.testing.assert_close(ours[2], sums, atol=2e-4, rtol=1e-5)
    exact, lse = dense_oracle(given, MAP, 32**-0.5)
    wide = sparse_attention(
        **given, block_map=MAP, scale=32**-0.5, wide=torch.float64, exact_p=True, round_out=False, return_lse=True
    )
    torch.testing.assert_close(wide[0], exact)
    torch.testing.assert_close(wide[1].double(), lse, rtol=1e-6, atol=1e-6)


# Planted bugs: each must be past the budget -------------------------------------------------------------------------


def without_block(block_map, row, place):
    """The map with one block of a row taken out."""
    counts, columns, ids = block_map.counts.clone(), block_map.columns.clone(), block_map.mask_ids.clone()
    start, n_full = int(block_map.starts[0, row]), int(counts[0, row, 0])
    end = start + int(counts[0, row, 1])
    for tensor in (columns, ids):
        tensor[start + place : end - 1] = tensor[start + place + 1 : end].clone()
    counts[0, row, 1] -= 1
    if place < n_full:
        counts[0, row, 0] -= 1
    return dataclasses.replace(block_map, counts=counts, columns=columns, mask_ids=ids)


@functools.cache
def without_bugs(fmt, backend):
    """(inputs, map, output), which nobody changes: six bugs are compared with one run."""
    layout = Layout(2, 256, 20, 40)
    block_map = BlockMap.frame_window(layout, 0)
    given = inputs(fmt, layout.slots, heads=(2, 2), d=32)
    return given, block_map, run(given, block_map, backend=backend)[0]


@pytest.mark.quick(8)
@CASES
@pytest.mark.parametrize(
    "bug", ["block skipped", "tile dropped", "scale", "prefix forgotten", "other head", "mask ignored"]
)
def test_planted_bugs_are_past_the_budget(fmt, backend, bug):
    given, block_map, good = without_bugs(fmt, backend)
    assert problems(given, block_map, good, 32**-0.5, backend=backend) == []
    if bug == "block skipped":
        bad = run(given, without_block(block_map, 2, 0), backend=backend)[0]
    elif bug == "tile dropped":
        bad = good.clone()
        bad[128:256] = 0
    elif bug == "scale":
        bad = run(given, block_map, scale=32**-0.5 * 1.04, backend=backend)[0]
    elif bug == "prefix forgotten":
        video = [(f * 256, (f + 1) * 256) for f in range(2)]
        short = BlockMap.from_ranges([*video, (512, 572)], [*video, (0, 572)], 572, 572)
        bad = run(given, short, backend=backend)[0]
    elif bug == "other head":
        bad = run(given | {"k": given["k"].flip(1)}, block_map, backend=backend)[0]
    else:
        everything = dataclasses.replace(block_map, mask_bits=torch.full_like(block_map.mask_bits, -1))
        bad = run(given, everything, backend=backend)[0]
    assert problems(given, block_map, bad, 32**-0.5, backend=backend)
