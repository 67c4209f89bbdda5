"""`fp8_linear`: the kernel against float64, its reference and eager bf16, by the project's own budgets."""

import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from strict import checked_memory, checked_overflow, permuted_grid, poisoned_outputs, strict
from torch.nn.functional import linear

from happyhorse_fast.budgets import bf16_violations, measure, violations
from happyhorse_fast.kernels import fp8_linear as kernels
from happyhorse_fast.kernels.launch import ARCHITECTURES, FP8_SINCE, LaunchConfig, illegal, shared_memory_bytes, table
from happyhorse_fast.ops import fp8_linear as ops
from happyhorse_fast.ops.packing import pack_linear, unpack_linear
from happyhorse_fast.ops.triton import fp8_linear as launcher
from happyhorse_fast.reference import fp8_linear as reference
from happyhorse_fast.reference.mlp import gelu7, swiglu7
from happyhorse_fast.reference.quantize import dequantize, quantize_channels, quantize_groups, quantize_rows

# The sigmoid of a large negative number: exp overflows to infinity, and 1 / (1 + inf) is the right 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

E4M3 = torch.float8_e4m3fn
# Rows of video, audio and text: every remainder by 128 that is special, boundaries off the 128 grid.
ROWS = {1: (257,), 3: (128, 129, 127)}
EPILOGUES = ("plain", "residual", "swiglu7", "gelu7")
KERNELS = ("triton", "cuda")
# (epilogue, backend): the CUDA kernels have the activations only.
IMPLEMENTED = [(e, b) for e in EPILOGUES for b in (*KERNELS, "reference") if b != "cuda" or e in reference.ACTIVATIONS]


def row_tiles(sizes) -> torch.Tensor:
    tiles, start = [], 0
    for expert, size in enumerate(sizes):
        tiles += [(expert, start + at, start + min(at + 128, size)) for at in range(0, size, 128)]
        start += size
    return torch.tensor(tiles, dtype=torch.int32)


class Case:
    """Inputs of an op, quantised where fp8, and what they stand for in float64."""

    def __init__(self, sizes, f, k, fp8, group=0, seed=0):
        gen = torch.Generator().manual_seed(seed)
        n, experts = sum(sizes), len(sizes)
        # Rows, channels and experts of different size, so that a scale read from the wrong place shows.
        x = torch.randn(n, k, generator=gen) * torch.rand(n, 1, generator=gen).mul(4).exp2()
        weight = torch.randn(experts, f, k, generator=gen) / math.sqrt(k)
        weight *= torch.rand(experts, f, 1, generator=gen).add(0.5) * torch.arange(1, experts + 1)[:, None, None]
        self.hidden = torch.randn(n, f, generator=gen)
        self.tiles = row_tiles(sizes)
        self.expert = torch.repeat_interleave(torch.arange(experts), torch.tensor(sizes))
        if fp8:
            self.x, self.x_scale = quantize_groups(x, group) if group else quantize_rows(x)
            self.weight, self.weight_scale = quantize_channels(weight)
            self.wide_x = dequantize(self.x, self.x_scale, torch.float64)
            self.wide_weight = dequantize(self.weight, self.weight_scale, torch.float64)
        else:
            self.x, self.x_scale = x.bfloat16(), None
            self.weight, self.weight_scale = weight.bfloat16(), None
            self.wide_x, self.wide_weight = self.x.double(), self.weight.double()
        self.sizes = sizes

    @property
    def arguments(self):
        return self.x, self.x_scale, self.weight, self.weight_scale, self.tiles

    def exact(self) -> torch.Tensor:
        """[N, F] float64."""
        return torch.cat([x @ w.T for x, w in zip(self.wide_x.split(self.sizes), self.wide_weight, strict=True)])

    def eager(self) -> torch.Tensor:
        """[N, F] bf16, as torch computes it."""
        return torch.cat([linear(x, w) for x, w in zip(self.x.split(self.sizes), self.weight, strict=True)])


def check(result, exact, case, eager=None):
    # Rounding a good fp8 product to bf16 costs 1.4e-6 of the budget's distance of 1e-5.
    error = measure(result, exact)
    assert (bf16_violations(error, measure(eager, exact)) if case.x_scale is None else violations(error)) == []


def run_epilogue(case, epilogue, out_fp8=False, backend="triton"):
    if epilogue == "plain":
        return ops.fp8_linear(*case.arguments, backend=backend)
    if epilogue == "residual":
        hidden = case.hidden.clone()
        assert ops.fp8_linear_residual(*case.arguments, hidden, backend=backend) is None
        return hidden
    return ops.fp8_linear_activation(*case.arguments, epilogue, out_fp8, backend=backend)


def assert_close_to_float64(case, epilogue, backend="triton"):
    exact = case.exact()
    eager = case.eager() if case.x_scale is None else None
    if epilogue == "plain":
        check(run_epilogue(case, epilogue, backend=backend), exact, case, eager)
    elif epilogue == "residual":
        hidden = run_epilogue(case, epilogue, backend=backend)
        # The product alone: beside a large residual its errors would be hidden.
        check(hidden.double() - case.hidden.double(), exact, case, eager)
    else:
        function = {"swiglu7": swiglu7, "gelu7": gelu7}[epilogue]
        y, scale = run_epilogue(case, epilogue, False, backend)
        assert scale.shape == (0,)
        check(y, function(exact), case, None if eager is None else function(eager.float()).bfloat16())


def one_step_apart(a, b) -> torch.Tensor:
    """Distance of e4m3 codes in steps of the format: their bits, ordered by value."""
    ordered = [
        torch.where(t.view(torch.uint8) < 128, t.view(torch.uint8).int(), 128 - t.view(torch.uint8).int())
        for t in (a, b)
    ]
    return (ordered[0] - ordered[1]).abs()


@pytest.mark.parametrize(("epilogue", "backend"), IMPLEMENTED)
@pytest.mark.parametrize(("experts", "k"), [(1, 160), (3, 448)])
def test_bf16_within_twice_eager(epilogue, experts, k, backend):
    with strict(seed=k):
        assert_close_to_float64(Case(ROWS[experts], 256, k, fp8=False), epilogue, backend)


@pytest.mark.parametrize(
    ("experts", "k", "group", "epilogue", "backend"),
    [
        (experts, k, group, epilogue, backend)
        for experts, k, group in ((3, 160, 0), (1, 424, 0), (3, 160, 32), (3, 448, 64), (3, 256, 128))
        for epilogue, backend in IMPLEMENTED
        # What backend "cuda" refuses: tests/test_cuda_activation_quantize.py.
        if backend != "cuda" or (group == 0 and k % 16 == 0)
    ],
)
def test_fp8_within_the_gemm_budget(experts, k, group, epilogue, backend):
    with strict(seed=k):
        assert_close_to_float64(Case(ROWS[experts], 256, k, fp8=True, group=group), epilogue, backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("activation", "group"), [("swiglu7", 64), ("gelu7", 128)])
def test_requantised_codes_are_within_one_step(activation, group, fp8, backend):
    case = Case(ROWS[3], 384, 160, fp8)
    with strict():
        codes, scale = run_epilogue(case, activation, out_fp8=True, backend=backend)
        expected, expected_scale = run_epilogue(case, activation, out_fp8=True, backend="reference")
        held, _ = run_epilogue(case, activation, out_fp8=False, backend=backend)
    assert codes.dtype == E4M3 and scale.shape == (codes.shape[0], codes.shape[1] // group)
    assert int(one_step_apart(codes, expected).max()) <= 1
    torch.testing.assert_close(scale, expected_scale, rtol=1e-2 if not fp8 else 1e-5, atol=0)
    # An e4m3 value is off by 2^-4 of itself at most, or by half the smallest code.
    error = (dequantize(codes, scale) - held.float()).abs()
    bound = held.float().abs() * (2**-4 + 2**-8) + 2**-10 * scale.repeat_interleave(group, dim=1)
    assert bool((error <= bound).all())


def distinct_configs():
    """(variant, configuration) of the committed table, each tile shape once: schedules do not matter here."""
    seen = {}
    for variant, archs in table("fp8_linear").items():
        for fields in archs.values():
            config = LaunchConfig(**fields)
            seen[variant, config.block_m, config.block_n, config.block_k] = (
                variant,
                replace(config, descriptors=False),
            )
    return list(seen.values())


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize(("variant", "config"), distinct_configs())
def test_every_committed_tile_shape(variant, config, described, monkeypatch):
    precision, *middle, epilogue = variant.split("_")
    group = int(middle[0].removeprefix("group")) if middle else 0
    # 384 columns end in the middle of a tile of 256; 130 rows and 1 leave tiles nearly empty.
    case = Case((130, 1), 384, 256, precision == "fp8", group)
    if described:
        # The interpreter takes host-made descriptors; the launcher makes them on GPUs alone.
        monkeypatch.setattr(launcher, "descriptors_work", lambda *_: True)
        config = replace(config, descriptors=True)
    monkeypatch.setattr(launcher, "config_of", lambda *_: config)
    with strict():
        assert_close_to_float64(case, epilogue)


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_parts_of_a_row_tile(epilogue, monkeypatch):
    config = LaunchConfig(block_m=32, block_n=128, block_k=64, group_m=4)
    monkeypatch.setattr(launcher, "config_of", lambda *_: config)
    with strict():
        assert_close_to_float64(Case((130, 1, 40), 256, 160, fp8=True), epilogue)


def test_plain_and_residual_take_any_width():
    case = Case((70,), 200, 96, fp8=True, group=32)
    with strict():
        for epilogue in ("plain", "residual"):
            assert_close_to_float64(case, epilogue)


@pytest.mark.parametrize("fp8", [False, True])
def test_the_order_of_programs_changes_no_bit(fp8):
    case = Case(ROWS[3], 256, 160, fp8)
    results = []
    for seed in range(2):
        with permuted_grid(seed):
            results.append([run_epilogue(case, "residual"), *run_epilogue(case, "swiglu7", out_fp8=fp8)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("fp8", [False, True])
def test_sparse_representable_inputs_are_exact(fp8):
    gen = torch.Generator().manual_seed(0)
    sizes, f, k = (130, 61), 256, 160

    def small(*shape):
        values = torch.randint(-2, 3, shape, generator=gen)
        return (values * (torch.rand(shape, generator=gen) < 0.25)).to(E4M3 if fp8 else torch.bfloat16)

    x, weight, tiles = small(sum(sizes), k), small(2, f, k), row_tiles(sizes)
    # Powers of two, so that the scaled product is exact as well; sums of 160 products of at most 4 stay below 256.
    scales = [torch.randint(-3, 4, shape, generator=gen).float().exp2() for shape in ((sum(sizes),), (2, f))]
    x_scale, weight_scale = scales if fp8 else (None, None)
    wide = x.double() if x_scale is None else x.double() * x_scale[:, None]
    wide_weight = weight.double() if weight_scale is None else weight.double() * weight_scale[:, :, None]
    exact = torch.cat([a @ b.T for a, b in zip(wide.split(sizes), wide_weight, strict=True)])
    with strict():
        y = ops.fp8_linear(x, x_scale, weight, weight_scale, tiles)
    assert exact.abs().max() > 4
    assert torch.equal(y.double(), exact)


def test_offsets_past_2_31_elements():
    rows, f, k = 78_650, 27_392, 32  # 1080p at 5 s and its up projection: 2.15e9 elements, of which one tile is touched
    x = torch.empty(rows, k, dtype=torch.bfloat16)
    case = Case((128,), f, k, fp8=False)
    x[-128:] = case.x
    tiles = torch.tensor([[0, rows - 128, rows]], dtype=torch.int32)
    with checked_memory(), checked_overflow():
        y = ops.fp8_linear(x, None, case.weight, None, tiles)
    assert y.numel() > 2**31
    assert bf16_violations(measure(y[-128:], case.exact()), measure(case.eager(), case.exact())) == []


def test_inputs_past_2_31_elements():
    rows, k = 186_880, 13_696  # 1080p at 15 s and its down projection
    case = Case((100,), 128, k, fp8=True, group=64)
    x, x_scale = torch.empty(rows, k, dtype=E4M3), torch.empty(rows, k // 64)
    x[-100:], x_scale[-100:] = case.x, case.x_scale
    tiles = torch.tensor([[0, rows - 100, rows]], dtype=torch.int32)
    with checked_memory(), checked_overflow():
        y = ops.fp8_linear(x, x_scale, case.weight, case.weight_scale, tiles)
    assert violations(measure(y[-100:], case.exact())) == []


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    f=st.integers(1, 3),
    k=st.integers(1, 5),
    group=st.sampled_from([None, 0, 32, 64, 128]),
    epilogue=st.sampled_from(EPILOGUES),
    seed=st.integers(0, 9),
)
def test_any_shape(sizes, f, k, group, epilogue, seed):
    k = k * (group or 8)
    case = Case(tuple(sizes), 128 * f, k, group is not None, group or 0, seed)
    with strict(seed):
        y = run_epilogue(case, epilogue)
        expected = run_epilogue(case, epilogue, backend="reference")
    for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (y, expected)), strict=True):
        # Both round at the same places; sums differ in their order, so a bf16 value may fall on its neighbour.
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6)


# --- the budgets catch what they are for ------------------------------------------------------------------------------


def test_the_budget_catches_planted_bugs():
    case = Case((256, 256), 512, 256, fp8=True)
    exact, good = case.exact(), ops.fp8_linear(*case.arguments, backend="reference")
    x, x_scale, weight, weight_scale, tiles = case.arguments
    dropped = good.clone()
    dropped[128:256, 256:384] = 0
    wrong = {
        "tile dropped": dropped,
        "scale": good.float() * 1.04,
        "one expert's scale for all": ops.fp8_linear(
            x, x_scale, weight, weight_scale[:1].expand(2, -1).contiguous(), tiles, backend="reference"
        ),
        "row scale for weight scale": ops.fp8_linear(
            x, weight_scale[0], weight, x_scale.expand(2, -1).contiguous(), tiles, backend="reference"
        ),
    }
    assert violations(measure(good, exact)) == []
    for name, result in wrong.items():
        assert violations(measure(result, exact)), name
    bf16 = Case((256, 256), 512, 256, fp8=False)
    eager = measure(bf16.eager(), bf16.exact())
    for result in (bf16.eager().index_fill(0, torch.arange(128), 0), bf16.eager().float() * 1.04):
        assert bf16_violations(measure(result, bf16.exact()), eager)


@triton.jit
def unclamped(x):
    return x.to(tl.float8e4nv)


@triton.jit
def too_small_scale(amax):
    return amax * (1.0 / 600.0)


@pytest.mark.parametrize("clamped", [True, False])
def test_a_missing_clamp_gives_nan(clamped, monkeypatch):
    case = Case((128,), 256, 96, fp8=True)
    # The right scale leaves the clamp nothing to do but rounding, so the plant needs a wrong one to show.
    monkeypatch.setattr(kernels, "scale_of", too_small_scale)
    if not clamped:
        monkeypatch.setattr(kernels, "to_e4m3", unclamped)
    codes, _ = run_epilogue(case, "swiglu7", out_fp8=True)
    assert bool(codes.float().isfinite().all()) is clamped


def test_an_unwritten_row_is_nan():
    case = Case((256,), 128, 64, fp8=False)
    with poisoned_outputs():
        y = ops.fp8_linear(case.x, None, case.weight, None, case.tiles[:1])
    assert y[:128].isfinite().all() and y[128:].isnan().all()


# --- the ops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fp8", [False, True])
def test_opcheck(fp8):
    case = Case((130,), 128, 64, fp8, group=32 if fp8 else 0)
    # torch's own schema check multiplies its arguments, which e4m3 tensors on the CPU cannot.
    tests = (
        "test_faketensor",
        "test_aot_dispatch_dynamic",
        *(() if fp8 else ("test_schema", "test_autograd_registration")),
    )
    for op in (launcher.fp8_linear, ops._reference):
        torch.library.opcheck(op, case.arguments, test_utils=tests)
    for op in (launcher.fp8_linear_residual, ops._residual_reference):
        torch.library.opcheck(op, (*case.arguments, case.hidden), test_utils=tests)
    for op in (launcher.fp8_linear_activation, ops._activation_reference):
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
            assert (y_scale.shape, y_scale.dtype) == ((n, 214), torch.float32)
            y, y_scale = ops.fp8_linear_activation(*arguments, "gelu7", False, backend=backend)
            assert (y.shape, y.dtype, y_scale.shape) == ((n, 27_392), torch.bfloat16, (0,))
            assert ops.fp8_linear(*arguments, backend=backend).shape == (n, 27_392)


MISTAKES = {
    "x dtype": (
        {"x": torch.zeros(4, 64)},
        TypeError,
        "x must be torch.bfloat16 or torch.float8_e4m3fn, got torch.float32",
    ),
    "x strides": ({"x": torch.zeros(64, 4).to(E4M3).T}, ValueError, "x must be contiguous, got strides"),
    "weight inputs": (
        {"weight": torch.zeros(1, 128, 32).to(E4M3)},
        ValueError,
        r"weight must be of shape \[E, F, 64\]",
    ),
    "weight dtype": ({"weight": torch.zeros(1, 128, 64).bfloat16()}, TypeError, "weight must be torch.float8_e4m3fn"),
    "no x_scale": ({"x_scale": None}, TypeError, r"x_scale must be a tensor of shape \[4\], got NoneType"),
    "group": ({"x_scale": torch.ones(4, 4)}, ValueError, "group 32, 64 or 128; got"),
    "weight_scale": ({"weight_scale": torch.ones(128)}, ValueError, r"weight_scale must be of shape \[1, 128\]"),
    "row_tiles": ({"row_tiles": torch.zeros(1, 3)}, TypeError, "row_tiles must be torch.int32"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be 'triton' or 'reference', got 'cuda'"),
    "hidden": ({"hidden": torch.zeros(4, 64)}, ValueError, r"hidden must be of shape \[4, 128\], got \[4, 64\]"),
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
    with pytest.raises(LookupError, match="fp8_linear 'fp8_plain' has no configuration for sm_86"):
        run_epilogue(case, "plain")


# --- configurations and packing ---------------------------------------------------------------------------------------


def test_every_committed_configuration_is_legal_and_none_is_missing():
    for variant, archs in table("fp8_linear").items():
        fp8 = variant.startswith("fp8")
        assert set(archs) == {str(a) for a in ARCHITECTURES if not fp8 or a >= FP8_SINCE}, variant
        for arch, fields in archs.items():
            config = LaunchConfig(**fields)
            needed = shared_memory_bytes(config, element_bytes=1 if fp8 else 2)
            assert illegal(config, int(arch), fp8=fp8, shared_bytes=needed) is None, (variant, arch)
    formats = ["bf16", "fp8", *(f"fp8_group{g}" for g in (32, 64, 128))]
    assert set(table("fp8_linear")) == {f"{f}_{e}" for f in formats for e in EPILOGUES}


@pytest.mark.parametrize("experts", [1, 3])
def test_packing_pads_and_unpacks_exactly(experts):
    weight = torch.randn(experts * 40, 52).bfloat16()
    packed, scale = pack_linear(weight, experts, fp8=False, pad_k_to=64)
    assert packed.shape == (experts, 128, 64) and scale is None
    assert packed[:, 40:].eq(0).all() and packed[:, :, 52:].eq(0).all()
    assert torch.equal(unpack_linear(packed, None, features=40, inputs=52), weight)
    codes, scale = pack_linear(weight, experts, fp8=True, pad_k_to=64)
    expected, expected_scale = quantize_channels(weight.unflatten(0, (experts, 40)))
    assert torch.equal(codes[:, :40, :52].view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale[:, :40], expected_scale) and scale[:, 40:].eq(1).all()
    restored = unpack_linear(codes, scale, features=40, inputs=52)
    torch.testing.assert_close(restored, weight, rtol=2**-3, atol=1e-2)


def test_padding_is_exact_through_an_mlp():
    gen = torch.Generator().manual_seed(3)
    up, down = torch.randn(2 * 2 * 100, 96, generator=gen) / 8, torch.randn(2 * 96, 100, generator=gen) / 8
    x, hidden, tiles = torch.randn(150, 96, generator=gen).bfloat16(), torch.zeros(150, 96), row_tiles((100, 50))
    up_packed, _ = pack_linear(up, 2, fp8=False)
    down_packed, _ = pack_linear(down, 2, fp8=False, pad_f_to=1, pad_k_to=64)
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
    ],
)
def test_packing_names_a_wrong_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack_linear(torch.zeros(4, 4), fp8=False, **arguments)


def test_quantising_names_a_wrong_argument():
    with pytest.raises(ValueError, match="group must be one of 32, 64, 128; got 16"):
        quantize_groups(torch.zeros(2, 64), 16)
    with pytest.raises(ValueError, match="group must divide the 96 channels of x, got 64"):
        quantize_groups(torch.zeros(2, 96), 64)
    with pytest.raises(ValueError, match=r"scale must be \[2\] or \[2, 'K / group'\] for codes \[2, 96\], got \[3\]"):
        dequantize(torch.zeros(2, 96).to(E4M3), torch.ones(3))


def test_scales_of_zeros_and_of_the_largest():
    x = torch.zeros(3, 64)
    x[1, 5], x[2, 7] = 1e-44, -3e38
    codes, scale = quantize_rows(x)
    assert scale[:2].tolist() == [1.0, 1.0]
    assert codes.float().isfinite().all() and codes[2, 7].float() == -448
