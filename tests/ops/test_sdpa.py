"""`happyhorse_fast.attention` beside PyTorch's scaled_dot_product_attention, on tensors of any model."""

import dataclasses
import math

import pytest
import torch
from attention_cases import MAP
from strict import strict
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention as eager

import happyhorse_fast
from happyhorse_fast import BlockMap, attention
from happyhorse_fast.ops.attention import score_bound, sdpa
from happyhorse_fast.ops.attention.score_bound import LIMIT, score_limit, scores_fit

U = 2.0**-8
"""Half a step of bf16, relative."""


def drawn(batch=2, heads=(4, 2), n=150, m=150, d=32, seed=0, spread=1.0):
    """q [B, Hq, N, D], k and v [B, Hkv, M, D]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads[0], n, d), (batch, heads[1], m, d), (batch, heads[1], m, d))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return (q * spread).bfloat16(), k.bfloat16(), v.bfloat16()


def far(out, q, k, v, mask=None, scale=None, bounded=True):
    """Largest error of a result as a share of what rounding P and the result to bf16 can cost, against float64.

    ``bounded``, the sum is of P after rounding, so that an error of P is one of its distance from the mean alone.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    p = scores.softmax(dim=-1).nan_to_num()
    exact = p @ v
    centre = exact if bounded else torch.zeros_like(exact)
    away = torch.einsum("bhqk,bhqkd->bhqd", p, (v[:, :, None] - centre[:, :, :, None]).abs())
    allowed = (U / (1 - U) + 2**-15) * away + (U + 2**-15) * exact.abs() + 1e-30
    return float(((out.double() - exact).abs() / allowed).max())


def run(q, k, v, backend="reference", **options):
    with strict(seed=1):
        return attention(q, k, v, backend=backend, **options)


BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])


@BACKENDS
@pytest.mark.parametrize("power", [0, -20, -44, -60])
def test_small_values_keep_their_bits(power, backend):
    q, k, v = drawn(batch=1, heads=(2, 1))
    k = k[:, :, :1].expand_as(k) * (1 + torch.arange(150)[:, None] / 1000).bfloat16()
    k = (k * (16 / k.float().norm(dim=-1).amax())).bfloat16()
    q = (-k.expand(1, 2, -1, -1) * 1.4).bfloat16()  # every score of a row is near -90 in powers of two
    v = v * 2.0**power
    scores = (q.float() @ k.float().transpose(-1, -2)) * 32**-0.5 * math.log2(math.e)
    assert scores.min() > -100 and scores.max() < -60
    assert far(run(q, k, v, backend), q, k, v, bounded=False) <= 1


def test_what_fits_counts_small_values_short_rows_and_many_keys(monkeypatch):
    def fits(q, k, v, scale=1.0):
        return bool(scores_fit(*(torch.full((3, 2, 32), x).bfloat16() for x in (q, k, v)), scale))

    assert fits(1.0, 2.0, 1.0) and not fits(1.0, 2.25, 1.0)  # 92 and 104 in powers of two
    assert fits(1.0, 2.0, 2.0**-24) and not fits(1.0, 2.0, 2.0**-26)
    assert not fits(1.0, 1.0, 0.0)
    assert not fits(2.0**-76, 2.0**61, 1.0, 2.0**18), "the square of q is 0 in float32"
    assert score_limit(2**19) == LIMIT and score_limit(2**21) == LIMIT - 2
    monkeypatch.setattr(score_bound, "KEYS", 2**-10)
    assert not fits(1.0, 2.0, 1.0) and fits(1.0, 1.75, 1.0)


def test_a_map_for_a_graph_is_not_remembered(monkeypatch):
    q, k, v = drawn(batch=1, n=131, m=133)
    before = sdpa._remembered.cache_info().currsize
    monkeypatch.setattr(sdpa, "is_capturing", lambda device: True)
    first = run(q, k, v)
    assert sdpa._remembered.cache_info().currsize == before
    monkeypatch.undo()
    assert torch.equal(run(q, k, v), first) and sdpa._remembered.cache_info().misses


@pytest.mark.quick(10)
@BACKENDS
@pytest.mark.parametrize(
    "shape",
    [{}, {"heads": (2, 2), "d": 64}, {"n": 40, "m": 200, "batch": 1}, {"n": 200, "m": 40, "batch": 1, "d": 128}],
    ids=["GQA", "as many heads", "more keys", "more queries"],
)
@pytest.mark.parametrize("spread", [1.0, 60.0], ids=["within the limit", "past it"])
def test_as_exact_as_pytorch(backend, shape, spread):
    q, k, v = drawn(**shape, spread=spread)
    fits = scores_fit(*(x[0].transpose(0, 1) for x in (q, k, v)), q.shape[-1] ** -0.5)
    assert bool(fits) == (spread == 1.0)
    out, lse = run(q, k, v, backend, return_lse=True)
    assert out.shape == q.shape and out.dtype == torch.bfloat16 and lse.shape == q.shape[:3]
    assert far(out, q, k, v, bounded=bool(fits)) <= 1
    error = lambda x: (x.double() - eager(*(y.double() for y in (q, k, v)), enable_gqa=True)).norm()  # noqa: E731
    assert error(out) <= 1.5 * error(eager(q, k, v, enable_gqa=True)) + 1e-12
    group = q.shape[1] // k.shape[1]
    scores = q.double() @ k.double().repeat_interleave(group, dim=1).transpose(-1, -2) * q.shape[-1] ** -0.5
    torch.testing.assert_close(lse.double(), scores.logsumexp(dim=-1), atol=1e-4, rtol=1e-5)


def test_a_result_that_is_wrong_is_far():
    q, k, v = drawn()
    assert far(run(q, k, v, scale=0.19), q, k, v) > 1
    assert far(run(q, k.flip(1), v), q, k, v) > 1
    assert far(run(q, k, v.flip(0)), q, k, v) > 1


@BACKENDS
def test_a_map_says_which_keys_are_seen(backend):
    q, k, v = drawn(1, n=300, m=300)
    out, lse = run(q, k, v, backend, block_map=MAP, return_lse=True)
    mask = MAP.to_dense()[None]
    assert far(out, q, k, v, mask) <= 1 and far(out, q, k, v) > 1
    empty = BlockMap.from_ranges([(0, 100)], [(0, 300)], 300, 300)
    out, lse = run(q, k, v, backend, block_map=empty, return_lse=True)
    assert (out[:, :, 100:] == 0).all() and (lse[:, :, 100:] == -torch.inf).all()


@BACKENDS
def test_both_layouts_and_any_strides_give_the_same_bits(backend):
    q, k, v = drawn(1)
    expected, lse = run(q, k, v, backend, return_lse=True)
    by_token = [x[0].transpose(0, 1) for x in (q, k, v)]  # [tokens, heads, D]
    out, same = run(*by_token, backend, return_lse=True)
    assert torch.equal(out, expected[0].transpose(0, 1)) and torch.equal(same, lse[0])
    dense = [x.contiguous() for x in by_token]
    assert torch.equal(run(*dense, backend), out)
    assert torch.equal(run(*(x.transpose(0, 1)[None] for x in dense), backend), expected)


def test_it_takes_a_call_of_pytorchs(monkeypatch):
    q, k, v = drawn(heads=(2, 2))
    expected = run(q, k, v, scale=0.2)
    assert torch.equal(attention(q, k, v, None, 0.0, False, scale=0.2), expected), "on a CPU auto is the reference"
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    assert torch.equal(torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.2), expected)


# Values that are not finite -------------------------------------------------------------------------------------------


@pytest.mark.quick(20)
@BACKENDS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("spread", [1.0, 60.0], ids=["within the limit", "past it"])
def test_nan_and_inf_spread_as_in_pytorch(backend, value, name, spread):
    q, k, v = drawn(1, n=40, m=150, spread=spread)
    {"q": q, "k": k, "v": v}[name][0, 1, 3, 5] = value
    out, expected = run(q, k, v, backend), eager(*(x.float() for x in (q, k, v)), enable_gqa=True)
    assert not torch.isfinite(out).all()
    # Where P is 0 in one and the least number in the other, 0 * inf is NaN: past the limit, P is that small.
    for kind in (torch.isnan, torch.isposinf, torch.isneginf) if spread == 1.0 else (torch.isfinite,):
        assert torch.equal(kind(out), kind(expected))
    finite = torch.isfinite(expected)
    torch.testing.assert_close(out[finite].float(), expected[finite], atol=0.03, rtol=0.02)


def test_keys_that_score_minus_infinity_count_nothing():
    """All of the first blocks', so that no maximum is known when they are met."""
    q, k, v = drawn(1, heads=(1, 1), n=20, m=300)
    q, k = q.abs() + 0.1, k.clone()
    k[:, :, :200, 0] = -torch.inf
    for backend in ("reference", "triton", "cuda"):
        assert far(run(q, k, v, backend), q, k[:, :, 200:], v[:, :, 200:], bounded=False) <= 1


# What it is to torch --------------------------------------------------------------------------------------------------


@pytest.mark.quick(3)
@pytest.mark.parametrize("options", [{}, {"return_lse": True}, {"block_map": BlockMap.dense(150, 150)}])
@pytest.mark.parametrize("batch", [1, 2])
def test_compiles_as_one_graph(options, batch):
    compiles_as_one_graph(options, batch, None)


@pytest.mark.slow
def test_compiles_with_sizes_that_are_not_known():
    compiles_as_one_graph({"return_lse": True}, 1, dynamic=True)


def compiles_as_one_graph(options, batch, dynamic):
    q, k, v = drawn(batch)
    torch._dynamo.reset()  # the other cases' graphs count towards its limit of one function's
    compiled = torch.compile(lambda *x: attention(*x, **options), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    ours, expected = compiled(q, k, v), attention(q, k, v, **options)
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (ours, expected)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
def test_the_host_never_waits(backend):
    """Fake tensors have no values: whatever reads one raises."""
    with FakeTensorMode(), torch.device("cuda"):
        q, k = (torch.empty(2, heads, 64_000, 128, dtype=torch.bfloat16) for heads in (40, 8))
        out, lse = attention(q, k, k, return_lse=True, backend=backend)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.bfloat16, "cuda")
    assert (lse.shape, lse.dtype) == ((2, 40, 64_000), torch.float32)
    with FakeTensorMode(), pytest.raises(Exception, match="local_scalar_dense"):
        bool(scores_fit(*(torch.empty(10, 2, 32, dtype=torch.bfloat16) for _ in range(3)), 0.1))


def test_dense_maps_are_remembered_and_not_too_many():
    sdpa._remembered.cache_clear()
    for _ in range(3):
        attention(*drawn(1, n=10, m=20))
    assert sdpa._remembered.cache_info()[:2] == (2, 1)
    for n in range(1, 2 * sdpa.MAPS):
        attention(*drawn(1, n=n, m=1))
    assert sdpa._remembered.cache_info().currsize == sdpa.MAPS
    with FakeTensorMode():
        attention(*drawn(1, n=33, m=1))
    assert attention(*drawn(1, n=33, m=1)).isfinite().all(), "no fake map is remembered"


def test_its_name_is_no_modules():
    import importlib
    import pkgutil

    for module in pkgutil.iter_modules(happyhorse_fast.__path__, "happyhorse_fast."):
        assert module.name != "happyhorse_fast.attention"
    assert importlib.import_module("happyhorse_fast.ops.attention.sdpa").attention is happyhorse_fast.attention


Q, K = torch.zeros(2, 4, 10, 32).bfloat16(), torch.zeros(2, 2, 10, 32).bfloat16()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q.float()}, TypeError, r"q must be bfloat16, got float32: pass q.bfloat16\(\)"),
        ({"k": K.half()}, TypeError, "k must be bfloat16, got float16"),
        ({"v": None}, TypeError, "v must be a bfloat16 tensor, got NoneType"),
        ({"k": K.float().numpy()}, TypeError, "k must be a bfloat16 tensor, got ndarray"),
        ({"scale": "0.1"}, TypeError, "scale must be a positive number or None, got '0.1'"),
        ({"attn_mask": torch.ones(10, 10)}, ValueError, "attn_mask must be None: a BlockMap as block_map"),
        ({"dropout_p": 0.1}, ValueError, "dropout_p must be 0, got 0.1"),
        ({"is_causal": True}, ValueError, "is_causal must be False: pass block_map"),
        ({"enable_gqa": False}, ValueError, "k must have q's 4 heads where enable_gqa is False, got 2"),
        ({"v": K.clone().requires_grad_()}, ValueError, r"v requires gradients, .* under torch.no_grad\(\)"),
        ({"q": Q[..., :24]}, ValueError, r"q must have a head dim of 32, 64, 128; got \[2, 4, 10, 24\]"),
        ({"q": Q[0, 0]}, ValueError, r"q must be \[B, heads, tokens, D\] or \[tokens, heads, D\]"),
        ({"v": K[0]}, ValueError, r"v must be .* as q is; got \[2, 10, 32\] with q \[2, 4, 10, 32\]"),
        ({"k": K[:1], "v": K[:1]}, ValueError, r"q's batch .* got q \[2, 4, 10, 32\], k \[1, 2, 10, 32\]"),
        ({"v": K[:, :, :9]}, ValueError, "k and v must be alike"),
        ({"q": Q[:, :3]}, ValueError, "divisor of q's 3 heads"),
        ({"block_map": BlockMap.dense(9, 10)}, ValueError, "q's 10 queries and k's 10 keys, got 9 and 10"),
        ({"block_map": "dense"}, TypeError, "block_map must be a BlockMap"),
        ({"scale": -1.0}, ValueError, "scale must be positive"),
        ({"backend": "flash"}, ValueError, "backend must be 'auto' or 'triton' or 'cuda' or 'reference'"),
    ],
)
def test_what_it_cannot_take_is_named(change, error, message):
    with pytest.raises(error, match=message):
        attention(**({"q": Q, "k": K, "v": K} | change))


def test_tangents_are_refused():
    """They would count as zeros: torch has no forward derivative of an op of its own, and does not say so."""
    with forward_ad.dual_level(), torch.no_grad():  # no_grad is of backward passes alone
        with pytest.raises(ValueError, match=r"k requires gradients, which this attention has none of"):
            attention(Q, forward_ad.make_dual(K, K), K)
        assert attention(Q, K, K).shape == Q.shape, "nothing to differentiate"


def test_leaves_that_require_gradients_are_fine_without_them():
    leaf = K.clone().requires_grad_()
    with torch.no_grad():
        assert not attention(Q, leaf, leaf).requires_grad


def test_no_keys_and_no_queries():
    assert (attention(Q, K[:, :, :0], K[:, :, :0]) == 0).all()
    assert attention(Q[:, :, :0], K, K).shape == (2, 4, 0, 32)


def test_a_map_of_two_heads():
    q, k, v = drawn(1, n=300, m=300)
    both = [MAP, BlockMap.dense(300, 300)]
    columns, masks = len(MAP.columns), len(MAP.mask_bits)
    joined = dataclasses.replace(
        MAP,
        counts=torch.cat([m.counts for m in both]),
        starts=torch.cat([MAP.starts, both[1].starts + columns]),
        columns=torch.cat([m.columns for m in both]),
        mask_ids=torch.cat([MAP.mask_ids, torch.where(both[1].mask_ids < 0, -1, both[1].mask_ids + masks)]),
        mask_bits=torch.cat([m.mask_bits for m in both]),
        order=torch.cat([MAP.order, both[1].order + MAP.rows]),
    )
    out = run(q, k, v, block_map=joined)
    assert far(out, q, k, v, joined.to_dense().repeat_interleave(2, dim=0)[None]) <= 1
