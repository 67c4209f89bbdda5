"""Ops of the QKV product and its norm as torch.library sees them, arguments, packed weights, launch configurations."""

from __future__ import annotations

import pytest
import torch
import triton
import unpacking
from qkv_cases import BACKENDS, SHAPES, make, tail

import happyhorse_fast.ops
from happyhorse_fast import budgets
from happyhorse_fast.eager import qkv as eager
from happyhorse_fast.kernels.launch import ARCHITECTURES, config_for, illegal, shared_memory_bytes, table
from happyhorse_fast.ops.qkv import cuda as cuda_launcher  # noqa: F401  (registers its ops)
from happyhorse_fast.ops.qkv import op as ops
from happyhorse_fast.ops.qkv import packing
from happyhorse_fast.ops.qkv import triton as launcher
from happyhorse_fast.ops.qkv.contract import MAX_CHANNELS


def op_calls(case):
    x, _ = ops.rmsnorm_quantize(case.hidden, case.norm, case.row_tiles, backend="reference")
    heads = tail(case)
    for suffix in ("", "_reference"):
        yield f"rmsnorm_quantize{suffix}", (case.hidden, case.norm, case.row_tiles, case.branch, "int8")
        yield f"rmsnorm_quantize{suffix}", (case.hidden, case.norm, case.row_tiles)
        yield f"qkv_linear{suffix}", (x, None, case.weight, None, *heads, "bf16")
        fp8 = (case.x, case.x_scale, case.codes, case.weight_scale, *heads, "fp8", case.qk_scale)
        int8 = (x, None, case.weight, None, *heads, "int8_qk")
        yield f"qkv_linear{suffix}", fp8
        yield f"qkv_linear{suffix}", int8
    yield "qkv_linear_cuda", (x, None, case.weight, None, *heads, "bf16")
    yield "qkv_linear_cuda", fp8
    yield "qkv_linear_cuda", int8


@pytest.mark.quick(6)
@pytest.mark.parametrize("index", range(13))
def test_opcheck(index):
    name, arguments = list(op_calls(make(SHAPES["one-tile"])))[index]
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    # test_schema multiplies every input, which torch 2.13 does not do for e4m3 on the CPU.
    if not any(isinstance(a, torch.Tensor) and a.dtype == torch.float8_e4m3fn for a in arguments):
        checks.append("test_schema")
    torch.library.opcheck(getattr(torch.ops.happyhorse_fast, name).default, arguments, test_utils=checks)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_the_wrappers_compile_into_one_graph(backend, fp8):
    case = make(SHAPES["one-tile"])
    weights = (case.codes, case.weight_scale) if fp8 else (case.weight, None)

    def layer(hidden, branch):
        out = "fp8" if fp8 else "bf16"
        x, scale = ops.rmsnorm_quantize(hidden, case.norm, case.row_tiles, branch, out, backend=backend)
        arguments = (x, scale, *weights, *tail(case))
        if fp8:
            return ops.qkv_linear(*arguments, "fp8", case.qk_scale, backend=backend)
        return ops.qkv_linear(*arguments, "bf16", backend=backend)

    hidden, compiled_hidden = case.hidden.clone(), case.hidden.clone()
    expected = layer(hidden, case.branch)
    result = torch.compile(layer, fullgraph=True, backend="aot_eager")(compiled_hidden, case.branch)
    assert torch.equal(hidden, compiled_hidden)
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_cuda_tensors_have_the_real_shapes(backend):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        n, hq, hkv, d, c = 64256, 40, 8, 128, 5120
        options = {"device": "cuda"}
        hidden = torch.empty(n, c, **options)
        row_tiles = torch.empty(n // 128, 3, dtype=torch.int32, **options)
        x, scale = ops.rmsnorm_quantize(hidden, torch.empty(3, c, **options), row_tiles, out="fp8", backend=backend)
        weight = torch.empty(3, 57 * d, c, dtype=torch.float8_e4m3fn, **options)
        weight_scale, qk_norm = torch.empty(3, 57 * d, **options), torch.empty(3, 2, d, **options)
        cos_sin, qk_scale = torch.empty(n, d, **options), torch.empty(3, 2, **options)
        tables = (weight, weight_scale, qk_norm, cos_sin, row_tiles)
        results = ops.qkv_linear(x, scale, *tables, hq, hkv, "fp8", qk_scale, backend=backend)
        of_int8 = ops.qkv_linear(x, scale, *tables, hq, hkv, "int8_qk", backend=backend)
    blocks = n // 128
    fp8, bf16 = torch.float8_e4m3fn, torch.bfloat16
    assert [x.shape for x in results] == [
        (n, hq, d), (n, hkv, d), (hkv, d, n), (blocks,), (blocks,), (hkv, blocks), (n, hq)
    ]  # fmt: skip
    assert [x.shape for x in of_int8] == [
        (n, hq, d), (n, hkv, d), (n, hkv, d), (n, hq), (hkv, blocks), (0,), (n, hq)
    ]  # fmt: skip
    assert [x.dtype for x in (*results[:3], *of_int8[:3])] == [fp8] * 3 + [torch.int8] * 2 + [bf16]
    assert {x.device.type for x in (*results, *of_int8)} == {"cuda"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": 3}, AttributeError, "device"),
        ({"x_scale": None}, TypeError, r"x_scale must be a tensor of shape \[128\], got NoneType"),
        ({"weight": "weight"}, TypeError, r"weight must be torch.float8_e4m3fn, got torch.bfloat16"),
        ({"weight_scale": None}, TypeError, "weight_scale must be a tensor"),
        (
            {"num_heads_q": 3},
            ValueError,
            r"weight must be of size 192 in dimension 1 of \[E, 192, 160\], got \[1, 160, 160\]",
        ),
        ({"num_heads_kv": 3}, ValueError, "num_heads_q must be a multiple of num_heads_kv, got 2 and 3"),
        ({"out": "fp16"}, ValueError, "out must be one of 'bf16', 'int8_qk', 'int8_qk_fp8_v', 'fp8'; got 'fp16'"),
        ({"out": "bf16"}, ValueError, 'qk_scale must be None where out is "bf16"'),
        ({"out": "int8_qk"}, ValueError, 'qk_scale must be None where out is "int8_qk"'),
        ({"qk_scale": None}, TypeError, r"qk_scale must be a tensor of shape \[1, 2\]"),
        ({"backend": "cudnn"}, ValueError, "backend must be 'triton' or 'cuda' or 'reference', got 'cudnn'"),
    ],
)
def test_a_wrong_argument_is_named(change, error, message):
    case = make(SHAPES["one-tile"])
    arguments = {"x": case.x, "x_scale": case.x_scale, "weight": case.codes, "weight_scale": case.weight_scale}
    arguments |= {"qk_norm": case.qk_norm, "cos_sin": case.cos_sin, "row_tiles": case.row_tiles, "out": "fp8"}
    arguments |= {"num_heads_q": 2, "num_heads_kv": 1, "qk_scale": case.qk_scale}
    arguments |= {"weight": case.weight} if change == {"weight": "weight"} else change
    with pytest.raises(error, match=message):
        ops.qkv_linear(**arguments)


def test_e4m3_below_sm_89_is_refused(monkeypatch):
    monkeypatch.setattr(launcher, "architecture", lambda _: 86)
    case = make(SHAPES["one-tile"])
    with pytest.raises(ValueError, match='out="fp8" needs e4m3, from sm_89 on; cpu is sm_86'):
        ops.rmsnorm_quantize(case.hidden, case.norm, case.row_tiles, out="fp8")
    ops.rmsnorm_quantize(case.hidden, case.norm, case.row_tiles, out="int8")
    x, _ = ops.rmsnorm_quantize(case.hidden, case.norm, case.row_tiles)
    with pytest.raises(ValueError, match=r'out="fp8" of torch\.bfloat16 weights needs e4m3'):
        ops.qkv_linear(x, None, case.weight, None, *tail(case), "fp8", case.qk_scale)
    for out in ("bf16", "int8_qk"):
        ops.qkv_linear(x, None, case.weight, None, *tail(case), out)


def test_a_wrong_layout_is_named():
    case = make(SHAPES["one-tile"])
    with pytest.raises(ValueError, match="hidden must have contiguous rows"):
        ops.rmsnorm_quantize(case.hidden.T, case.norm, case.row_tiles)
    with pytest.raises(ValueError, match="norm_weight must be contiguous"):
        ops.rmsnorm_quantize(case.hidden, case.norm.T.contiguous().T.expand(2, -1), case.row_tiles)
    with pytest.raises(ValueError, match="hidden must have at most 8192 channels, got 8193"):
        ops.rmsnorm_quantize(torch.zeros(1, 8193), torch.zeros(1, 8193), case.row_tiles)
    with pytest.raises(ValueError, match="out must be one of 'bf16', 'int8', 'fp8'; got True"):
        ops.rmsnorm_quantize(case.hidden, case.norm, case.row_tiles, out=True)
    with pytest.raises(ValueError, match="x_scale must be None or empty where x is bf16"):
        ops.qkv_linear(case.x.bfloat16(), case.x_scale, case.weight, None, *tail(case), "bf16")
    with pytest.raises(ValueError, match=r"cos_sin must have D = 32, 64 or 128 columns"):
        ops.qkv_linear(
            case.x.bfloat16(), None, case.weight, None, case.qk_norm, torch.zeros(128, 48), case.row_tiles, 2, 1, "bf16"
        )


def test_the_single_kernel_that_is_gone_names_what_to_call():
    says = "the op rmsnorm_qkv is gone: call rmsnorm_quantize, then qkv_linear; one kernel for both took 19.2 ms"
    with pytest.raises(ImportError, match=says):
        from happyhorse_fast.ops import rmsnorm_qkv  # noqa: F401
    with pytest.raises(ImportError, match=says):
        from happyhorse_fast.ops.rmsnorm_qkv import rmsnorm_quantize  # noqa: F401
    assert not hasattr(happyhorse_fast.ops, "rmsnorm_kvq")
    assert not hasattr(torch.ops.happyhorse_fast, "rmsnorm_qkv")


@pytest.mark.parametrize("d", [32, 64, 128])
def test_packing_and_back_is_exact(d):
    case = make(((5, 6, 7), 48, d, 4, 2))
    sizes = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": d}
    assert torch.equal(unpacking.unpack_qkv_weight(case.weight, None, **sizes), case.published)
    codes = unpacking.unpack_qkv_weight(case.codes, case.weight_scale, **sizes)
    assert budgets.measure(codes, case.published.double()).relative_l2 < 0.04
    assert case.weight.shape == (3, 9 * d, 48)
    assert case.weight[:, 8 * d + 4 :].eq(0).all()
    assert all(map(torch.equal, unpacking.unpack_qk_norm(case.qk_norm), (case.q_norm, case.k_norm)))
    assert torch.equal(unpacking.unpack_cos_sin(case.cos_sin), case.phases)
    half = 3 * d // 8
    assert packing.rotary_permutation(d)[: 2 * half].tolist() == [i + j * half for i in range(half) for j in (0, 1)]
    with pytest.raises(ValueError, match=r"weight must have 3 x"):
        packing.pack_qkv_weight(case.published[1:], experts=3, **sizes)


def test_packing_parameters_keeps_no_graph():
    case, sizes = make(((5, 6, 7), 48, 32, 4, 2)), {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 32}
    weight, q_norm, k_norm = map(torch.nn.Parameter, (case.published, case.q_norm, case.k_norm))
    qk_norm = packing.pack_qk_norm(q_norm, k_norm, experts=3)
    packed = [*packing.pack_qkv_weight(weight, experts=3, to="fp8", **sizes), qk_norm, packing.static_qk_scale(qk_norm)]
    assert not any(x.requires_grad for x in [*packed, packing.static_qk_scale(torch.nn.Parameter(case.qk_norm))])


def test_no_normalised_q_or_k_leaves_its_static_scale():
    case = make(SHAPES["d128-gqa5"])
    # A product that points along the largest weight reaches the bound, but for eps.
    for e in range(3):
        worst = torch.zeros(1, 128)
        worst[0, (case.qk_norm[e, 0] + 1).abs().argmax()] = 1e3
        value = eager.rms_norm(worst, case.qk_norm[e, 0]).abs().max() / case.qk_scale[e, 0]
        assert float(value) == pytest.approx(448, rel=1e-6)


def test_committed_configurations_are_legal():
    bytes_of = {"rmsnorm_quantize": 0, "qkv_bf16": 2, "qkv_int8": 1, "qkv_fp8": 1}
    assert set(table("qkv")) == set(bytes_of)
    for variant, width in bytes_of.items():
        fp8 = variant == "qkv_fp8"
        for arch in [a for a in ARCHITECTURES if not fp8 or a >= 89]:
            config = config_for("qkv", variant, arch)
            shared = shared_memory_bytes(config, width)
            assert illegal(config, arch, fp8=fp8, shared_bytes=shared) is None
            assert config.block_m in (1, 128)
        assert set(table("qkv")[variant]) == {str(a) for a in ARCHITECTURES if not fp8 or a >= 89}
    assert config_for("qkv", "rmsnorm_quantize", 90).block_n == MAX_CHANNELS
    assert triton.next_power_of_2(5120) == 8192
