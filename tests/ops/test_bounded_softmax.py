"""Both forms of the softmax at the edges of what they take: the plain Triton and the CUDA kernel.

The Hopper kernel's are in test_block_sparse_attention_hopper.py.
"""

import math
from unittest import mock

import pytest
import torch
from attention_cases import (
    FORMS,
    MAP,
    bound_of,
    dense_oracle,
    form_of,
    formatted,
    inputs,
    normed,
    problems,
    run,
)
from strict import poisoned_outputs

from happyhorse_fast.block_map import BlockMap
from happyhorse_fast.ops import block_sparse_attention
from happyhorse_fast.ops.attention import triton as launcher
from happyhorse_fast.ops.attention.score_bound import LIMIT, MARGIN, norm_bound
from happyhorse_fast.ops.runtime.formats import uses_e4m3

SCALE = 32**-0.5
EVERY = [(fmt, kernel) for kernel in FORMS if kernel != "hopper" for fmt in FORMS[kernel] if not uses_e4m3(fmt)]
BOTH = pytest.mark.parametrize(("fmt", "backend"), EVERY)
BOUNDED = pytest.mark.parametrize(("fmt", "backend"), [run for run in EVERY if form_of(run[1]) == "bounded"])


def held(given, block_map, backend, scale=SCALE, **options):
    """Its output, within the budgets of its format, with the float64 LSE."""
    out, _, lse = run(given, block_map, scale, backend, return_lse=True, **options)
    assert problems(given, block_map, out, scale, backend=backend) == []
    torch.testing.assert_close(lse.double(), dense_oracle(given, block_map, scale)[1], atol=2e-5, rtol=1e-5)
    return out


@BOTH
def test_one_key_alone_gives_its_v_exactly(fmt, backend):
    given = inputs(fmt, 260, heads=(2, 2), spread=3.0)
    keys = [5 * i % 260 for i in range(260)]
    each = BlockMap.from_ranges([(i, i + 1) for i in range(260)], [(j, j + 1) for j in keys], 260, 260)
    assert torch.equal(run(given, each, SCALE, backend)[0], given["v"][keys])


@BOTH
def test_queries_along_and_against_keys_at_the_bound(fmt, backend):
    """Scores from -99 to 99 in powers of two: every P from 2^-99 to 2^99 is met, alone and beside others."""
    k = normed(200, 1, 32, 0)
    norm = math.sqrt(99 * math.log(2) / SCALE / MARGIN)
    q = torch.cat((k[:80], -k[80:160], normed(40, 1, 32, 1)))
    given = formatted(fmt, q * norm, k * norm, torch.randn(200, 1, 32, generator=torch.Generator().manual_seed(2)) * 60)
    assert 90 < bound_of(given, SCALE) <= LIMIT
    held(given, BlockMap.dense(200, 200), backend)
    rows = [(i, i + 1) for i in range(80, 160)]
    out = held(given, BlockMap.from_ranges(rows, rows, 200, 200), backend)
    assert torch.equal(out[80:160], given["v"][80:160]), "a sum of one P of 2^-99"


@pytest.mark.parametrize("fmt", ["bf16", "int8_qk"])
def test_norm_weights_on_either_side_of_the_switch(fmt):
    k, q = normed(200, 1, 32, 0), normed(200, 2, 32, 1)
    for past, bounded in ((1 - 2**-8, True), (1 + 2**-8, False)):
        widest = math.sqrt(LIMIT * past / (MARGIN * math.log2(math.e) * math.sqrt(32)))
        weight = torch.linspace(0.1, widest - 1, 32)  # the norm multiplies by 1 + weight
        norm = 32**0.5 * (1 + weight)
        given = formatted(fmt, q * norm, k * norm, torch.randn(200, 1, 32))
        plain = mock.MagicMock()
        with mock.patch.object(launcher, "block_sparse_attention_kernel", plain):
            options = {"scale": SCALE, "bound": norm_bound(weight, weight)}
            block_sparse_attention(**given, block_map=BlockMap.dense(200, 200), **options)
        assert plain.__getitem__.return_value.call_args.kwargs["BOUNDED"] is bounded
        held(given, BlockMap.dense(200, 200), "triton bounded" if bounded else "triton", bound=options["bound"])


@BOTH
def test_one_huge_row_and_others_tiny(fmt, backend):
    """And where a row's or a block's scale is so small that their product is 0, masked keys are still masked."""
    q, k, v = (torch.randn(300, h, 32, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
    q[1:] *= 1e-30
    q[0] *= 6
    k[128:] *= 1e-25
    held(formatted(fmt, q, k, v), MAP, backend)


@BOTH
def test_65536_equal_keys(fmt, backend):
    """All P are the same, so the result is the mean of v however P was rounded."""
    keys = 65_536
    q, k = normed(64, 1, 32, 0), normed(1, 1, 32, 1).expand(keys, 1, 32)
    norm = math.sqrt(95 * math.log(2) / SCALE / MARGIN)
    v = torch.randn(keys, 1, 32, generator=torch.Generator().manual_seed(2)) + 2
    q[:32] = k[:32]
    given = formatted(fmt, q * norm, k * norm, v)
    out = run(given, BlockMap.dense(64, keys), SCALE, backend)[0]
    mean = given["v"].double().mean(dim=0).expand(64, 1, 32)
    allowed = 2**-8 if form_of(backend) == "bounded" else 2**-7  # P and the sum are not rounded alike
    assert ((out.double() - mean).abs() <= allowed * mean.abs()).all()


@BOUNDED
def test_a_bound_that_is_too_small_shows(fmt, backend):
    given = inputs(fmt, 200, heads=(2, 1), spread=40.0)
    block_map = BlockMap.dense(200, 200)
    assert bound_of(given, SCALE) > 128
    out = run(given, block_map, SCALE, backend, bound=50.0)[0]
    assert problems(given, block_map, out, SCALE, backend=backend)[0] == "the result holds NaN or Inf"


@BOTH
def test_a_row_of_nan_has_an_lse_of_nan(fmt, backend):
    given = inputs(fmt, 200, heads=(2, 1))
    (given["q_scale"] if fmt == "int8_qk" else given["q"])[3] = torch.nan
    bound = LIMIT if form_of(backend) == "bounded" else math.inf
    out, _, lse = run(given, BlockMap.dense(200, 200), SCALE, backend, bound=bound, return_lse=True)
    assert out[3].isnan().all() and lse[:, 3].isnan().all()
    assert out[4:].isfinite().all() and lse[:, 4:].isfinite().all()


def by_flag(given, flag):
    """(out, LSE) of Triton's op with a flag."""
    options = [SCALE, False, torch.tensor([flag], dtype=torch.int32), *[None] * 5, True]
    op = torch.ops.happyhorse_fast.block_sparse_attention
    with poisoned_outputs():
        out, lse = op(*(given[x] for x in "qkv"), *MAP.tensors(), *options)
    return out, lse


def same(first, second):
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, second, strict=True))


def test_of_two_launches_the_flag_lets_one_compute():
    given = inputs("bf16", spread=40.0)  # which the bounded form cannot take
    for flag, bound in ((1, LIMIT), (0, math.inf)):
        alone = block_sparse_attention(**given, block_map=MAP, scale=SCALE, bound=bound, return_lse=True)
        assert alone[0].isfinite().all() == (flag == 0)
        assert same(by_flag(given, flag), alone[::2])


@pytest.mark.parametrize("backend", ["triton", "triton bounded"])
def test_sums_that_begin_at_a_bias_give_the_same_bits(backend, monkeypatch):
    given = inputs("int8_qk", heads=(2, 1))
    given["q"][:40], given["k"][:40] = 127, 127  # the largest sum
    given["q"][40:50] = -127
    options = {"bound": LIMIT if backend.endswith("bounded") else math.inf, "return_lse": True}
    expected = run(given, MAP, 1e-4, backend, **options)
    monkeypatch.setattr(launcher, "I2FP_SINCE", launcher.architecture(torch.device("cpu")) + 1)
    assert same(run(given, MAP, 1e-4, backend, **options), expected)
