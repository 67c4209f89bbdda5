"""The QKV product: kernels in the exact interpreter and plain-torch references, against float64."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st
from qkv_cases import (
    ALIGNED,
    BACKENDS,
    KERNELS,
    NAMES,
    SHAPES,
    bf16_linear,
    bf16_problems,
    exact,
    fp8_linear,
    fp8_problems,
    int8_steps,
    make,
    published,
    steps,
    tail,
    without_scale,
)
from strict import strict
from triton.runtime.errors import InterpreterError

from happyhorse_fast import budgets
from happyhorse_fast.kernels.launch import LaunchConfig
from happyhorse_fast.kernels.numerics import to_int8
from happyhorse_fast.ops.qkv import op as ops
from happyhorse_fast.ops.qkv import triton as launcher
from happyhorse_fast.ops.quantize import SMALLEST_SCALE, token_order
from happyhorse_fast.ops.quantize import to_int8 as reference_int8


@pytest.mark.quick(6)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_bf16(name, backend):
    case = make(SHAPES[name])
    with strict(seed=2):
        result = bf16_linear(case, backend)
    assert bf16_problems(case, without_scale(result)) == []
    assert [s.shape for s in result[3:6]] == [(0,)] * 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALIGNED)
def test_fp8_in_every_output_kind(name, backend):
    case = make(SHAPES[name])
    truth = exact(case)
    n, (_, hkv) = len(case.x), case.heads
    with strict(seed=3):
        plain = fp8_linear(case, backend=backend)
        codes = fp8_linear(case, "fp8", backend)
    assert fp8_problems(without_scale(plain), truth) == []
    scale = torch.cat([case.qk_scale[e].expand(b - a, 2) for e, a, b in case.spans])
    for i in range(2):
        assert steps(codes[i], truth[i] / scale.double()[:, i, None, None]) <= 1
        assert torch.equal(codes[3 + i], scale[::128, i])
    assert torch.equal(codes[6], plain[6])
    v, v_scale = token_order(codes[2]), codes[5]
    assert v_scale.shape == (hkv, -(-n // 128))
    assert v[:, :, n:].float().eq(0).all(), "columns past N must be zero"
    for tile in range(v_scale.shape[1]):
        rows = slice(128 * tile, min(128 * tile + 128, n))
        want = truth[2][rows].permute(1, 2, 0)
        torch.testing.assert_close(v_scale[:, tile].double(), want.abs().amax((1, 2)) / 448, rtol=1e-5, atol=0)
        assert steps(v[:, :, rows], want / v_scale[:, tile, None, None].double()) <= 1


@pytest.mark.quick(8)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("x", ["bf16", "fp8"])
@pytest.mark.parametrize("name", ALIGNED)
def test_int8_queries_and_keys(name, x, backend):
    case = make(SHAPES[name])
    n, (hq, hkv) = len(case.x), case.heads
    with strict(seed=3):
        if x == "fp8":
            plain, codes = (fp8_linear(case, out, backend) for out in ("bf16", "int8_qk"))
            truth = exact(case)
        else:
            rows, _ = ops.rmsnorm_quantize(case.hidden, case.norm, case.row_tiles, backend="reference")
            arguments = (rows, None, case.weight, None, *tail(case))
            plain, codes = (ops.qkv_linear(*arguments, out, backend=backend) for out in ("bf16", "int8_qk"))
            truth = published(case, torch.float64)
    q, k, v, q_scale, k_scale, v_scale, gate = codes
    assert (q.dtype, k.dtype, v_scale.shape) == (torch.int8, torch.int8, (0,))
    assert torch.equal(v, plain[2]) and torch.equal(gate, plain[6])
    assert (q_scale.shape, k_scale.shape) == ((n, hq), (hkv, -(-n // 128)))
    if x == "fp8":  # with bf16 the product is rounded, and so a row's largest element and its scale
        torch.testing.assert_close(q_scale.double(), truth[0].abs().amax(2) / 127, rtol=1e-5, atol=0)
        assert int8_steps(q, truth[0] / q_scale.double()[..., None]) <= 1
    # Half a step of a code, and what rounding to bf16 does to the value that is compared with.
    assert q.abs().amax(2).eq(127).all()
    error = (q.double() * q_scale.double()[..., None] - plain[0].double()).abs()
    assert (error <= 0.5001 * q_scale.double()[..., None] + 2**-8 * plain[0].double().abs()).all()
    for tile in range(k_scale.shape[1]):
        rows = slice(128 * tile, min(128 * tile + 128, n))
        scale = k_scale[:, tile].double()
        if x == "fp8":
            torch.testing.assert_close(scale, truth[1][rows].abs().amax((0, 2)) / 127, rtol=1e-5, atol=0)
            assert int8_steps(k[rows], truth[1][rows] / scale[:, None]) <= 1
        assert k[rows].abs().amax((0, 2)).eq(127).all()
        near = plain[1][rows].double()
        error = (k[rows].double() * scale[:, None] - near).abs()
        assert (error <= 0.5001 * scale[:, None] + 2**-8 * near.abs()).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_zeros_have_the_smallest_int8_scales(backend):
    case = make(SHAPES["experts-aligned"])
    case.x = torch.zeros_like(case.x.float()).bfloat16()
    q, k, _, q_scale, k_scale, *_ = ops.qkv_linear(
        case.x, None, case.weight, None, *tail(case), "int8_qk", backend=backend
    )
    assert q_scale.eq(SMALLEST_SCALE).all() and k_scale.eq(SMALLEST_SCALE).all() and not q.any() and not k.any()


@triton.jit
def cast_kernel(x, codes, N: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(codes + place, to_int8(tl.load(x + place)))


def test_int8_codes_are_rounded_to_the_nearest_even_and_clamped():
    ties = torch.arange(-256, 256) / 2
    x = torch.cat([ties, ties.nextafter(torch.tensor(999.0)), ties.nextafter(torch.tensor(-999.0)), 5 * ties])
    codes = torch.empty(len(x), dtype=torch.int8)
    cast_kernel[(1,)](x, codes, N=len(x))
    wanted = [max(-127, min(127, round(value))) for value in x.tolist()]  # Python's round is to even, in double
    assert codes.tolist() == wanted == reference_int8(x).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_off_the_grid_in_fp8(backend):
    case = make(SHAPES["experts-off-grid"])
    assert fp8_problems(without_scale(fp8_linear(case, backend=backend)), exact(case)) == []
    if backend != "triton":
        for out in ("int8_qk", "fp8"):
            with pytest.raises(ValueError, match=r"row_tiles must start on multiples of 128 .* got 130"):
                fp8_linear(case, out, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_operands_with_fp8_outputs(backend):
    case = make(SHAPES["experts-aligned"])
    x, _ = ops.rmsnorm_quantize(case.hidden, case.norm, case.row_tiles, backend="reference")
    arguments = (x, None, case.weight, None, *tail(case))
    plain = ops.qkv_linear(*arguments, "bf16", backend=backend)
    codes = ops.qkv_linear(*arguments, "fp8", case.qk_scale, backend=backend)
    scale = torch.cat([case.qk_scale[e].expand(b - a, 2) for e, a, b in case.spans])
    for i in range(2):
        assert steps(codes[i], plain[i].double() / scale[:, i, None, None]) <= 1
    assert torch.equal(codes[6], plain[6])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALIGNED)
def test_of_both_formats_q_and_k_have_the_bits_of_one_and_v_those_of_the_other(name, backend):
    case = make(SHAPES[name])
    both, int8_qk, e4m3 = (fp8_linear(case, out, backend) for out in ("int8_qk_fp8_v", "int8_qk", "fp8"))
    q, k, v, q_scale, k_scale, v_scale, gate = both
    for found, wanted in zip((q, k, q_scale, k_scale, gate), (int8_qk[i] for i in (0, 1, 3, 4, 6)), strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(v.view(torch.uint8), e4m3[2].view(torch.uint8)) and torch.equal(v_scale, e4m3[5])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["bf16", "int8_qk", "fp8"])
def test_kernel_and_reference_agree_to_the_last_rounding(kind, kernel):
    # Only the order of float32 sums differs: a few values fall on the other side of a rounding boundary.
    case = make(SHAPES["experts-aligned"])
    results = [
        bf16_linear(case, backend) if kind == "bf16" else fp8_linear(case, kind, backend)
        for backend in (kernel, "reference")
    ]
    for got, want in zip(*results, strict=True):
        if got.dtype != torch.float32:
            assert float((got.float() != want.float()).float().mean()) < 0.01
        else:
            torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("name", ["tail-1-gqa5", "experts-off-grid"])
def test_the_reference_is_the_eager_model(name):
    # Same rounding points; sums in another order move a bf16 product to its neighbour now and then.
    case = make(SHAPES[name])
    result = bf16_linear(case, "reference")
    for got, want in zip(without_scale(result), published(case, torch.bfloat16), strict=True):
        if got.dtype == torch.bfloat16:
            assert float((got != want).float().mean()) < 1e-3
        # 2 ulp of bf16: one of the product, one of the result.
        torch.testing.assert_close(got.float(), want.float(), rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("name", ["experts-aligned", "d128-gqa5"])
def test_sparse_exact_inputs_give_exact_products(name, kind, backend):
    # 75 % zeros and powers of two: every sum is exact, so an index that is off by one shows as another number.
    case = make(SHAPES[name])
    g = torch.Generator().manual_seed(1)

    def sparse(size):
        kept = torch.rand(size, generator=g) < 0.25
        return torch.randint(-2, 3, size, generator=g).float() * kept

    x, w = sparse(case.x.shape), sparse(case.codes.shape)
    scales = {"x_scale": None, "weight": w.bfloat16(), "weight_scale": None}
    case.x = x.bfloat16()
    if kind == "fp8":
        case.x = x.to(torch.float8_e4m3fn)
        scales = {"x_scale": 2.0 ** torch.randint(-2, 3, (len(x),), generator=g).float()}
        scales |= {"weight": w.to(torch.float8_e4m3fn)}
        scales |= {"weight_scale": 2.0 ** torch.randint(-2, 3, w.shape[:2], generator=g).float()}
        x, w = x * scales["x_scale"][:, None], w * scales["weight_scale"][..., None]
    with strict(seed=4):
        result = fp8_linear(case, backend=backend, **scales)
    hq, hkv = case.heads
    product = torch.cat([x[a:b] @ w[e].T for e, a, b in case.spans]).unflatten(1, (-1, case.d))
    assert torch.equal(result[2].float(), product[:, hq + hkv : hq + 2 * hkv])
    gates = product[:, hq + 2 * hkv :].flatten(1)[:, :hq]
    torch.testing.assert_close(result[6], gates.sigmoid(), rtol=1e-6, atol=0)


def test_planted_bugs_are_caught():
    case = make(SHAPES["experts-aligned"])
    truth = exact(case)
    good = without_scale(fp8_linear(case))
    assert fp8_problems(good, truth) == []

    dropped = fp8_linear(case, x_scale=torch.ones_like(case.x_scale))
    assert {p[0] for p in fp8_problems(without_scale(dropped), truth)} >= {"v", "g"}
    shared = fp8_linear(case, weight_scale=case.weight_scale[:1].expand(3, -1).contiguous())
    assert {p[0] for p in fp8_problems(without_scale(shared), truth)} >= {"q", "k", "v"}
    for i, name in enumerate(NAMES[:3]):
        result = list(good)
        result[i] = good[i].clone()
        result[i][128:256] = 0
        assert fp8_problems(result, truth)[0].startswith(f"{name}: worst tile distance 1.000")
        result[i] = good[i] * 1.04
        assert any(p.startswith(f"{name}: worst tile slope") for p in fp8_problems(result, truth))
    bf16 = without_scale(bf16_linear(case))
    for factor in (1.04, 0):
        broken = [bf16[0] * factor, *bf16[1:]]
        assert any(p.startswith("q: mean") for p in bf16_problems(case, broken))


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["int8_qk", "fp8", "bf16"])
def test_the_order_of_programs_does_not_change_a_bit(kind):
    case = make(SHAPES["experts-aligned"])
    runs = []
    for seed in (1, 2):
        with strict(seed):
            runs.append(bf16_linear(case) if kind == "bf16" else fp8_linear(case, kind))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_descriptors_load_what_pointers_do(kind):
    case = make(SHAPES["experts-off-grid"])
    x, _ = ops.rmsnorm_quantize(case.hidden, case.norm, case.row_tiles)

    def run():
        if kind == "fp8":
            return fp8_linear(case)
        return ops.qkv_linear(x, None, case.weight, None, *tail(case), "bf16")

    pointers = run()
    used = mock.Mock(return_value=True)
    with mock.patch.multiple(launcher, architecture=lambda _: 90, descriptors_work=used), strict():
        for a, b in zip(run(), pointers, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=2**-7, atol=2**-9)
    used.assert_called_once()


@pytest.mark.quick(6)
@pytest.mark.parametrize("described", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("out", ["bf16", "int8_qk", "fp8"])
@pytest.mark.parametrize("name", ALIGNED)
def test_two_heads_a_tile_give_the_bits_of_one(name, out, described, monkeypatch):
    """Tiles of a q and a k head, of v and gates, half past the product's end, and half in the next expert."""
    case = make(SHAPES[name])
    monkeypatch.setattr(launcher, "descriptors_work", lambda *_: described)
    results = []
    for width in (128, 256):
        config = LaunchConfig(block_m=128, block_n=width, block_k=64, group_m=4, descriptors=described)
        monkeypatch.setattr(launcher, "config_for", lambda *_, config=config: config)
        with strict(seed=5):
            results.append(fp8_linear(case, out))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one.view(torch.uint8), two.view(torch.uint8))


@pytest.mark.parametrize("backend", KERNELS)
def test_strided_rows_and_offsets_past_2_31(backend):
    rows, c = 260, 64
    case = make(((rows,), c, 32, 1, 1))
    # 260 rows of 2^23 + 64 bytes: 2 GiB of addresses, of which only the rows are touched.
    wide = torch.empty_strided((rows, c), (2**23 + 64, 1), dtype=torch.float8_e4m3fn)
    wide.view(torch.uint8).copy_(case.x.view(torch.uint8))
    expected = fp8_linear(case, backend=backend)
    case.x = wide
    with strict():
        for a, b in zip(fp8_linear(case, backend=backend), expected, strict=True):
            assert torch.equal(a, b)


def test_a_row_table_that_leaves_the_tensor_is_seen_by_the_strict_interpreter():
    case = make(SHAPES["one-tile"])
    case.row_tiles = torch.tensor([[0, 0, 128], [0, 128, 140]], dtype=torch.int32)
    with strict(), pytest.raises(InterpreterError, match="load outside"):
        fp8_linear(case)


@examples(5)
@given(
    rows=st.lists(st.integers(1, 140), min_size=1, max_size=2),
    c=st.integers(2, 8).map(lambda i: 16 * i),
    d=st.sampled_from([32, 64]),
    hkv=st.integers(1, 2),
    group=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_any_shape(rows, c, d, hkv, group, seed):
    case = make((tuple(rows), c, d, hkv * group, hkv), seed)
    truth = exact(case)
    with strict(seed):
        bf16 = without_scale(bf16_linear(case))
        for backend in KERNELS:
            assert fp8_problems(without_scale(fp8_linear(case, backend=backend)), truth) == []
    # With a single value the budget's ratios to eager's error are luck; the error itself is 3e-3 of rounding to bf16.
    for got, want in zip(bf16, published(case, torch.float64), strict=True):
        assert budgets.measure(got, want).relative_l2 < 1e-2
