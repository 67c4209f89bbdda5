"""The shapes that are benchmarked: their FLOPs are the cost model's, their bytes those of the tensors."""

from __future__ import annotations

import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from bench.cases import (
    DROP_IN,
    FULL,
    FULL_SIZES,
    MASKS,
    SMALL_SIZE,
    TINY_SIZE,
    Case,
    cases,
    cases_of,
    exact_map,
    padded_rows,
    select,
)
from bench.inputs import call, make, moved_bytes
from happyhorse_fast.costs import layer_kind, step_costs
from happyhorse_fast.fast.clip_state import SparsePolicy
from happyhorse_fast.fast.config import TopK
from happyhorse_fast.ops.attention.score_bound import LIMIT
from happyhorse_fast.ops.runtime.dispatch import STEMS
from happyhorse_fast.ops.runtime.formats import uses_e4m3

MAIN = FULL_SIZES[0]


def find(size, op, part="", precision="bf16"):
    return next(c for c in cases_of(size) if (c.op, c.part, c.precision) == (op, part, precision))


def test_every_op_of_a_layer_has_a_case():
    ops = {case.op for case in cases("main")}
    assert ops >= set(STEMS) - {"fp8_linear"}  # post-norm layers alone use the plain product; the preset has none
    assert {case.part for case in cases("main") if case.op == "block_sparse_attention"} == set(MASKS)


def test_sizes_are_the_three_resolutions_and_lengths():
    assert {size.name for size in FULL_SIZES} == {f"{r}-{s}s" for r in ("256p", "540p", "1080p") for s in (5, 10, 15)}
    names = [case.name for case in cases("full")]
    assert len(names) == len(set(names))
    assert not any("window/540p" in name or "window/256p" in name for name in names), "below 1080p no layer has one"


def test_the_rest_is_all_but_the_main_size_and_starts_with_what_costs_most():
    # Timed again without peers, an entry would replace the one that has them.
    main, rest, full = ([case.name for case in cases(scope)] for scope in ("main", "rest", "full"))
    assert not set(main) & set(rest) and set(main) | set(rest) == set(full)
    first = cases("rest")[: len(FULL_SIZES) - 1]
    assert {case.kind for case in first} == {f"block_sparse_attention-{part}/fp8" for part in ("window", "dense")}, (
        "a kind of case at all sizes before the next kind"
    )


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
def test_useful_flops_of_all_layers_are_those_of_a_step(precision):
    # 28 shared layers with a window, 4 of the first 32 counted apart, and so on: one case per kind, times its layers.
    costs = {(c.kind, c.op): c for c in step_costs(FULL, MAIN.clip, precision=precision)}
    attention = "int8_qk" if precision == "int8" else precision
    ours = {"attention": 0.0, "qkv": 0.0, "proj": 0.0, "up": 0.0, "down": 0.0}
    for layer in range(FULL.num_layers):
        local = FULL.is_local(layer, MAIN.clip.frame_tokens)
        activation = "gelu7" if layer in FULL.gelu7_layers else "swiglu7"
        for op, case in {
            "attention": Case("block_sparse_attention", "window" if local else "dense", attention, MAIN, layer),
            "qkv": Case("qkv_linear", "", precision, MAIN, layer),
            "proj": Case("fp8_linear_residual", "proj", precision, MAIN, layer),
            "up": Case("fp8_linear_activation", activation, precision, MAIN, layer),
            "down": Case("fp8_linear_residual", "down", precision, MAIN, layer),
        }.items():
            assert case.useful_flops() == costs[layer_kind(FULL, layer, MAIN.clip), op].flops
            ours[op] += case.useful_flops()
    for op, flops in ours.items():
        assert flops == pytest.approx(sum(c.count * c.flops for c in costs.values() if c.op == op), rel=1e-12)


@pytest.mark.parametrize("case", cases("main"), ids=lambda c: c.name)
def test_padding_costs_at_most_two_percent_at_1080p(case):
    useful, computed = Fraction(case.useful_flops()), Fraction(case.computed_flops())
    assert useful <= computed <= Fraction(102, 100) * useful


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize(
    ("op", "part", "costed"), [("qkv_linear", "", "qkv"), ("fp8_linear_activation", "swiglu7", "up")]
)
def test_bytes_are_the_cost_models_but_for_padding_and_scales(op, part, costed, precision):
    case = find(MAIN, op, part, precision)
    kind = layer_kind(FULL, case.layer, MAIN.clip)
    cost = next(c for c in step_costs(FULL, MAIN.clip, precision=precision) if (c.op, c.kind) == (costed, kind))
    # float32 cosines and sines (512 bytes of a token's 12,900 in fp8), gates and scales are not in the cost model.
    assert moved_bytes(case) == pytest.approx(cost.bytes, rel=0.06)


def test_bytes_of_the_residual_product_count_the_stream_twice():
    case = find(SMALL_SIZE, "fp8_linear_residual", "proj")
    given = make(case, "cpu")
    read = sum(given[name].nbytes for name in ("x", "weight", "row_tiles", "hidden"))
    assert moved_bytes(case) == read + given["hidden"].nbytes


@pytest.mark.parametrize("part", ["window", "dense", "25%", "12.5%"])
@pytest.mark.parametrize("size", [TINY_SIZE, SMALL_SIZE], ids=lambda s: s.name)
def test_computed_blocks_are_those_of_the_map(size, part):
    case = find(size, "block_sparse_attention", part)
    block_map = make(case, "cpu")["block_map"]
    assert sum(block_map.blocks()) == case.blocks() * block_map.heads


def test_sparse_cases_keep_what_the_models_policy_keeps():
    case = find(SMALL_SIZE, "block_sparse_attention", "25%")
    given = make(case, "cpu")
    policy = SparsePolicy(TopK(0.25), exact_map(SMALL_SIZE, False), padded_rows(SMALL_SIZE), None)
    chosen = policy.map(SimpleNamespace(q=given["q"], k=given["k"], q_scale=None, k_scale=None), "reference")
    assert torch.equal(chosen.counts, given["block_map"].counts)


@pytest.mark.parametrize("case", select(cases("small"), "attention-dense"), ids=lambda c: c.name)
def test_scores_of_a_case_stay_below_its_bound_as_a_models_do(case):
    given = make(case, "cpu")
    if uses_e4m3(case.precision):
        assert "bound" not in given, "without meaning: P in e4m3 needs the maximum"
        return
    q, k = given["q"].float(), given["k"].float()
    if case.precision == "int8_qk":
        q, k = q * given["q_scale"][..., None], k * given["k_scale"].T.repeat_interleave(128, dim=0)[..., None]
    largest = torch.einsum("qhd,kd->hqk", q, k[:, 0]).abs().max() * given["scale"] / math.log(2)
    if case.op == DROP_IN:
        assert "bound" not in given and largest < LIMIT
        return
    assert largest <= given["bound"] <= LIMIT
    rms = q.square().mean(dim=2).sqrt()
    assert rms.std() < 0.04 * rms.mean(), "normalised: 0.025 by the weights, 0.06 without a norm"
    assert make(case, "meta")["bound"] == given["bound"], "what is compiled ahead is what runs"


@pytest.mark.parametrize("case", cases("tiny"), ids=lambda c: c.name)
def test_every_case_runs_and_its_bytes_are_those_of_its_results(case):
    given = make(case, "cpu")
    outputs = call(case, given, "reference")
    if case.op == "select_blocks":  # a map also carries its base's masks
        return
    inputs = [t for t in given.values() if isinstance(t, torch.Tensor)]
    assert moved_bytes(case) == sum(t.nbytes for t in (*inputs, *outputs))


def test_unknown_words_and_scopes_are_refused():
    with pytest.raises(ValueError, match="got 'atention'"):
        select(cases("tiny"), "atention")
    with pytest.raises(ValueError, match="tiny, small, main, rest, full; got 'big'"):
        cases("big")
