"""The ops of `fp8_linear`: torch's contract, arguments, launch tables, and the packing of weights."""

import pytest
import torch
from linear_cases import E4M3, EPILOGUES, Case, row_tiles, run_epilogue
from strict import strict
from unpacking import unpack_linear

from happyhorse_fast.budgets import measure
from happyhorse_fast.kernels.launch import ARCHITECTURES, FP8_SINCE, LaunchConfig, illegal, shared_memory_bytes, table
from happyhorse_fast.ops.linear import op as ops
from happyhorse_fast.ops.linear import reference
from happyhorse_fast.ops.linear import triton as launcher
from happyhorse_fast.ops.linear.packing import pack_linear
from happyhorse_fast.ops.quantize import (
    SMALLEST_SCALE,
    code_scale,
    dequantize,
    e4m3_rows,
    hadamard,
    int8_rows,
    quantize_static,
)

# The sigmoid of a large negative number: exp overflows to infinity, and 1 / (1 + inf) is the right 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@pytest.mark.parametrize(("fp8", "static"), [(False, False), (True, False), (True, True)])
def test_opcheck(fp8, static):
    case = Case((130,), 128, 64, fp8, static)
    # torch's own schema check multiplies its arguments, which e4m3 tensors on the CPU cannot.
    tests = (
        "test_faketensor",
        "test_aot_dispatch_dynamic",
        *(() if fp8 else ("test_schema", "test_autograd_registration")),
    )
    for op in (launcher.fp8_linear, reference.fp8_linear):
        torch.library.opcheck(op, case.arguments, test_utils=tests)
    for op in (launcher.fp8_linear_residual, reference.fp8_linear_residual):
        torch.library.opcheck(op, (*case.arguments, case.hidden), test_utils=tests)
    for op in (launcher.fp8_linear_activation, reference.fp8_linear_activation):
        torch.library.opcheck(op, (*case.arguments, "swiglu7", False), test_utils=tests)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiled_without_a_graph_break(backend):
    case = Case((130, 20), 128, 64, fp8=True)

    def layer(x, x_scale, weight, weight_scale, tiles, hidden):
        y, scale = ops.fp8_linear_activation(x, x_scale, weight, weight_scale, tiles, "gelu7", True, backend=backend)
        down = weight.repeat(1, 1, 2)  # [E, 128, 128]
        ops.fp8_linear_residual(y, scale, down, weight_scale, tiles, hidden, backend=backend)
        return ops.fp8_linear(y, scale, down, weight_scale, tiles, backend=backend) + hidden.bfloat16()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    hiddens = case.hidden.clone(), case.hidden.clone()
    expected = layer(*case.arguments, hiddens[0])
    assert torch.equal(compiled(*case.arguments, hiddens[1]), expected)
    assert torch.equal(*hiddens)


def test_fake_shapes_at_1080p():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        n = 64_256
        tiles = torch.empty(502, 3, dtype=torch.int32, device="cuda")
        x = torch.empty(n, 5120, dtype=E4M3, device="cuda")
        weight = torch.empty(3, 27_392, 5120, dtype=E4M3, device="cuda")
        scales = torch.empty(n, device="cuda"), torch.empty(3, 27_392, device="cuda")
        for backend in ("triton", "reference"):
            arguments = (x, scales[0], weight, scales[1], tiles)
            y, y_scale = ops.fp8_linear_activation(*arguments, "swiglu7", True, backend=backend)
            assert (y.shape, y.dtype, y.device.type) == ((n, 13_696), E4M3, "cuda")
            assert (y_scale.shape, y_scale.dtype, y_scale.device.type) == ((1,), torch.float32, "cuda")
            y, y_scale = ops.fp8_linear_activation(*arguments, "gelu7", False, backend=backend)
            assert (y.shape, y.dtype, y_scale.shape) == ((n, 27_392), torch.bfloat16, (0,))
            assert ops.fp8_linear(*arguments, backend=backend).shape == (n, 27_392)


MISTAKES = {
    "x dtype": (
        {"x": torch.zeros(4, 64)},
        TypeError,
        "x must be torch.bfloat16 or torch.int8 or torch.float8_e4m3fn, got torch.float32",
    ),
    "x strides": ({"x": torch.zeros(64, 4).to(E4M3).T}, ValueError, "x must be contiguous, got strides"),
    "weight inputs": (
        {"weight": torch.zeros(1, 128, 32).to(E4M3)},
        ValueError,
        r"weight must be of size 64 in dimension 2 of \[E, F, 64\]",
    ),
    "weight dtype": ({"weight": torch.zeros(1, 128, 64).bfloat16()}, TypeError, "weight must be torch.float8_e4m3fn"),
    "no x_scale": ({"x_scale": None}, TypeError, r"x_scale must be a tensor of shape \[4 or 1\], got NoneType"),
    "groups": (
        {"x_scale": torch.ones(4, 4)},
        ValueError,
        r"x_scale must have 1 dimensions \[4 or 1\], got 2: \[4, 4\]",
    ),
    "scales": (
        {"x_scale": torch.ones(3)},
        ValueError,
        r"x_scale must be of shape \[4 or 1\], one per row .* got \[3\]",
    ),
    "weight_scale": ({"weight_scale": torch.ones(128)}, ValueError, r"weight_scale must have 2 dimensions \[1, 128\]"),
    "row_tiles": ({"row_tiles": torch.zeros(1, 3)}, TypeError, "row_tiles must be torch.int32"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be 'triton' or 'reference', got 'cuda'"),
    "hidden": (
        {"hidden": torch.zeros(4, 64)},
        ValueError,
        r"hidden must be of size 128 in dimension 1 of \[4, 128\], got \[4, 64\]",
    ),
    "activation": ({"activation": "relu"}, ValueError, "activation must be one of 'swiglu7', 'gelu7'; got 'relu'"),
    "bf16 scale": (
        {"x": torch.zeros(4, 64).bfloat16(), "weight": torch.zeros(1, 128, 64).bfloat16()},
        ValueError,
        "x_scale must be None or empty where x is bf16",
    ),
}


@pytest.mark.parametrize(("change", "kind", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_argument_is_named(change, kind, message):
    arguments = {
        "x": torch.zeros(4, 64).to(E4M3),
        "x_scale": torch.ones(4),
        "weight": torch.zeros(1, 128, 64).to(E4M3),
        "weight_scale": torch.ones(1, 128),
        "row_tiles": torch.tensor([[0, 0, 4]], dtype=torch.int32),
    } | change
    op, extra = ops.fp8_linear, {}
    if "hidden" in change:
        op = ops.fp8_linear_residual
    elif "activation" in change:
        op, extra = ops.fp8_linear_activation, {"fp8": True}
    with pytest.raises(kind, match=message):
        op(**arguments, **extra)


def test_an_activation_needs_whole_tiles():
    case = Case((4,), 64, 64, fp8=False)
    with pytest.raises(ValueError, match="weight must have a multiple of 128 features F before an activation, got 64"):
        run_epilogue(case, "gelu7")


def test_a_gpu_without_e4m3_is_named(monkeypatch):
    case = Case((4,), 128, 64, fp8=False)
    monkeypatch.setattr(launcher, "architecture", lambda _: 86)
    with pytest.raises(ValueError, match="fp8 must be False on sm_86: it has no casts to e4m3"):
        run_epilogue(case, "gelu7", out_fp8=True)
    case = Case((4,), 128, 64, fp8=True)
    with pytest.raises(LookupError, match="linear 'fp8_plain' has no configuration for sm_86"):
        run_epilogue(case, "plain")


# --- configurations and packing ---------------------------------------------------------------------------------------


def test_every_committed_configuration_is_legal_and_none_is_missing():
    for variant, archs in table("linear").items():
        fp8 = variant.startswith("fp8")
        assert set(archs) == {str(a) for a in ARCHITECTURES if not fp8 or a >= FP8_SINCE}, variant
        for arch, fields in archs.items():
            config = LaunchConfig(**fields)
            needed = shared_memory_bytes(config, element_bytes=2 if variant.startswith("bf16") else 1)
            assert illegal(config, int(arch), fp8=fp8, shared_bytes=needed) is None, (variant, arch)
    assert set(table("linear")) == {f"{f}_{e}" for f in ("bf16", "int8", "fp8") for e in EPILOGUES}


@pytest.mark.parametrize("experts", [1, 3])
def test_packing_pads_and_unpacks_exactly(experts):
    weight = torch.randn(experts * 40, 52).bfloat16()
    packed, scale = pack_linear(weight, experts, pad_k_to=64)
    assert packed.shape == (experts, 128, 64) and scale is None
    assert packed[:, 40:].eq(0).all() and packed[:, :, 52:].eq(0).all()
    assert torch.equal(unpack_linear(packed, None, features=40, inputs=52), weight)
    codes, scale = pack_linear(weight, experts, "fp8", pad_k_to=64)
    expected, expected_scale = e4m3_rows(weight.unflatten(0, (experts, 40)))
    assert torch.equal(codes[:, :40, :52].view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale[:, :40], expected_scale) and scale[:, 40:].eq(1).all()
    restored = unpack_linear(codes, scale, features=40, inputs=52)
    torch.testing.assert_close(restored, weight, rtol=2**-3, atol=1e-2)
    for through in (False, True):
        codes, scale = pack_linear(weight, experts, "int8", pad_k_to=64, through_hadamard=through)
        padded = torch.nn.functional.pad(weight.float().unflatten(0, (experts, 40)), (0, 12))
        expected, expected_scale = int8_rows(hadamard(padded) if through else padded)
        assert torch.equal(codes[:, :40], expected) and torch.equal(scale[:, :40], expected_scale)
        assert not codes[:, 40:].any() and scale[:, 40:].eq(1).all()
        restored = unpack_linear(codes, scale, features=40, inputs=52, through_hadamard=through)
        # Half a step of the largest of 64 values; the Hadamard adds up 64 such errors over 8.
        assert float((restored - weight).norm() / weight.norm()) < 0.01


@pytest.mark.parametrize("to", ["bf16", "int8", "fp8"])
def test_packing_a_parameter_keeps_no_graph(to):
    """A graph would hold float32 copies of the weight: 576 MiB beside the 64 of 8192 x 8192 in fp8."""
    packed = pack_linear(torch.nn.Parameter(torch.randn(80, 52)), 2, to)
    assert not any(x.requires_grad for x in packed if x is not None)


def test_padding_is_exact_through_an_mlp():
    gen = torch.Generator().manual_seed(3)
    up, down = torch.randn(2 * 2 * 100, 96, generator=gen) / 8, torch.randn(2 * 96, 100, generator=gen) / 8
    x, hidden, tiles = torch.randn(150, 96, generator=gen).bfloat16(), torch.zeros(150, 96), row_tiles((100, 50))
    up_packed, _ = pack_linear(up, 2)
    down_packed, _ = pack_linear(down, 2, pad_f_to=1, pad_k_to=64)
    assert up_packed.shape == (2, 256, 96) and down_packed.shape == (2, 96, 128)
    with strict():
        y, _ = ops.fp8_linear_activation(x, None, up_packed, None, tiles, "swiglu7", False)
        ops.fp8_linear_residual(y, None, down_packed, None, tiles, hidden)
    assert y[:, 100:].eq(0).all()
    unpadded = torch.zeros(150, 96)
    reference.fp8_linear_residual(
        y[:, :100].contiguous(), None, down.bfloat16().unflatten(0, (2, 96)), None, tiles, unpadded
    )
    torch.testing.assert_close(hidden, unpadded, rtol=2**-7, atol=2**-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": 3}, "experts must divide the 4 rows of weight, got 3"),
        ({"experts": 1, "pad_f_to": 0}, "pad_f_to must be at least 1, got 0"),
        ({"experts": 1, "pad_k_to": -1}, "pad_k_to must be at least 1, got -1"),
        ({"experts": 1, "to": "int4"}, "to must be one of 'bf16', 'int8', 'fp8'; got 'int4'"),
        ({"experts": 1, "to": "fp8", "through_hadamard": True}, 'through_hadamard must be False unless to is "int8"'),
        ({"experts": 1, "to": "int8", "through_hadamard": True}, "a multiple of 64 channels K, got 4"),
    ],
)
def test_packing_names_a_wrong_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack_linear(torch.zeros(4, 4), **arguments)


def test_quantising_names_a_wrong_argument():
    with pytest.raises(ValueError, match=r"scale must be \[1\] or \[2\] for codes \[2, 96\], got \[3\]"):
        dequantize(torch.zeros(2, 96).to(E4M3), torch.ones(3))


def test_one_scale_keeps_ones_beside_an_outlier():
    x = torch.ones(3, 64)
    x[0, 5], x[0, 6], x[1], x[2, 7], x[2, 8] = 1e4, -1e4, 0, -0.0, 3e4
    scale = code_scale(torch.tensor([1e4]), 448.0)
    codes = quantize_static(x, scale)
    value = dequantize(codes, scale)
    assert codes[0, 5:7].tolist() == [448, -448] and codes[2, 8] == 448, "past the scale's end it saturates"
    assert (value[1] == 0).all() and value[2, 7] == 0
    assert ((value[0, 7:] - 1).abs() <= 2**-4).all(), "floating point: an outlier costs its neighbours nothing"


@pytest.mark.parametrize("size", [100.0, 10.0, 0.1, 0.022, 0.015])
def test_the_error_of_codes_is_their_mantissas_down_to_a_20000th_of_the_bound(size):
    """Normal values with an RMS of ``size`` scales: the derivation of docs/OPS.md, and where its budget ends."""
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)) * (size / 8)
    scale = torch.full((1,), 1 / 8)
    error = measure(dequantize(quantize_static(x, scale), scale), x.double())
    assert error.tile_distance < 0.5 * (0.0265**2 + (2**-10 / 3**0.5 / size) ** 2) * 1.02
    assert size < 0.1 or error.tile_distance > 3.3e-4
    assert (error.tile_distance < 5e-4) == (size >= 0.022)


def test_scales_of_zeros_and_of_the_largest():
    x = torch.zeros(3, 64)
    x[1, 5], x[2, 7] = 1e-44, -3e38
    codes, scale = e4m3_rows(x)
    assert scale[:2].tolist() == [SMALLEST_SCALE] * 2
    assert codes.float().isfinite().all() and codes[2, 7].float() == -448
