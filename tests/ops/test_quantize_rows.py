"""`quantize_rows`: the kernel in the exact interpreter and the reference, against float64 and each other."""

from __future__ import annotations

import pytest
import torch
from strict import strict

from happyhorse_fast.kernels.launch import ARCHITECTURES, config_for, table
from happyhorse_fast.ops import quantize_rows
from happyhorse_fast.ops.quantize import SMALLEST_SCALE, hadamard, int8_rows
from happyhorse_fast.ops.row_quantization import triton as launcher
from happyhorse_fast.ops.row_quantization.contract import MAX_CHANNELS
from happyhorse_fast.ops.runtime import op_checks, self_check

BACKENDS = ("triton", "reference")
# Below and above a power of two, the 15B model's own among them; multiples of 64, which a Hadamard wants, and others.
WIDTHS = (64, 640, 4096, 4160, 13696)
ODD = (1, 63, 100, 4097)


def draw(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.randn(shape[0], 1, generator=generator).exp()).bfloat16()


def wanted(x: torch.Tensor, through: bool) -> torch.Tensor:
    """Values that are quantised, float64."""
    return hadamard(x.double()) if through else x.double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("channels", "through"), [*((w, h) for w in WIDTHS for h in (False, True)), *((w, False) for w in ODD)]
)
def test_codes_are_the_nearest_to_the_values(channels, through, backend):
    x = draw(0, 9, channels)
    with strict(seed=1):
        codes, scale = quantize_rows(x, through, backend=backend)
    truth = wanted(x, through)
    torch.testing.assert_close(scale.double(), truth.abs().amax(1) / 127, rtol=1e-6, atol=0)
    assert codes.abs().amax(1).eq(127).all()
    assert ((codes.double() - truth / scale.double()[:, None]).abs() <= 0.5 + 127 * 1e-6).all()


@pytest.mark.parametrize("channels", [640, 13696])
def test_the_error_is_that_of_uniform_steps(channels):
    """step / sqrt(12), the step the row's largest value / 127: 3.4 to 4.2 times its RMS in normal rows so wide."""
    x = draw(1, 64, channels)
    for through in (False, True):
        codes, scale = quantize_rows(x, through, backend="reference")
        truth = wanted(x, through)
        error = float((codes.double() * scale.double()[:, None] - truth).norm() / truth.norm())
        step = scale.double() * 12**-0.5
        assert error == pytest.approx(float(step.norm() * channels**0.5 / truth.norm()), rel=0.02)
        assert 0.006 < error < 0.011


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_outlier_takes_the_scale_of_its_row_alone_and_the_hadamard_shares_it_out(backend):
    x = torch.ones(3, 640).bfloat16()
    x[1, 70] = 1e4
    codes, scale = quantize_rows(x, False, backend=backend)
    assert codes[0].eq(127).all() and codes[2].eq(127).all()
    assert codes[1].nonzero().tolist() == [[70]], "of ones beside 1e4 nothing is left"
    codes, scale = quantize_rows(x, True, backend=backend)
    back = hadamard(codes[1].double() * scale[1].double())
    # The largest of the row is now 9984 / 8 and the sum of its group's ones: steps of 9.9, of which 64 average out.
    assert float(scale[1]) == pytest.approx((9984 + 63) / 8 / 127)
    assert float(back[70]) == pytest.approx(9984, abs=float(scale[1]) * 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("through", [False, True])
def test_rows_of_zeros_tiny_rows_and_minus_zero(through, backend):
    x = torch.zeros(4, 128).bfloat16()
    x[1] = -0.0
    x[2] = 1e-39  # below half a step of the smallest scale
    x[3, :64] = 3e-38  # far below half a step of their own row
    x[3, 64] = 1.0
    codes, scale = quantize_rows(x, through, backend=backend)
    assert scale[:3].tolist() == [SMALLEST_SCALE] * 3 and not codes[:3].any()
    assert float(scale[3]) == pytest.approx((0.125 if through else 1) / 127)
    assert codes[3].abs().max() == 127


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_row_saturates_and_never_wraps(backend):
    x = torch.full((2, 64), torch.finfo(torch.bfloat16).max).bfloat16()
    x[1, ::2] *= -1
    codes, scale = quantize_rows(x, False, backend=backend)
    assert codes.int().tolist() == [[127] * 64, [-127, 127] * 32] and scale.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(bad, through, backend):
    x = draw(2, 4, 128)
    x[2, 5] = bad
    codes, scale = quantize_rows(x, through, backend=backend)
    values = codes.double() * scale.double()[:, None]
    assert values.isfinite().all(1).tolist() == [True, True, False, True]


@pytest.mark.parametrize("through", [False, True])
def test_kernel_and_reference_agree_in_any_order_of_programs(through):
    x = draw(3, 33, 4160)
    expected = quantize_rows(x, through, backend="reference")
    for seed in (0, 1):
        with strict(seed=seed):
            codes, scale = quantize_rows(x, through)
        assert torch.equal(scale, expected[1]) or through
        # The Hadamard's sums have another order: a last bit of float32, and a code that is at a boundary.
        assert (codes.int() - expected[0].int()).abs().max() <= int(through)
        assert (codes != expected[0]).float().mean() < 1e-4


def test_strided_rows_are_read_where_they_are():
    wide = draw(4, 5, 1000)
    for backend in BACKENDS:
        apart = quantize_rows(wide[:, :640], True, backend=backend)
        together = quantize_rows(wide[:, :640].contiguous(), True, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))
        assert apart[0].is_contiguous()


def test_rows_past_2_31_elements():
    x = draw(5, 130, 64)
    far = torch.empty_strided((130, 64), (2**24 - 64, 1), dtype=torch.bfloat16)  # untouched pages cost nothing
    far[:] = x
    assert (len(far) - 1) * far.stride(0) > 2**31
    with strict(seed=0):
        codes, _ = quantize_rows(far, False)
    assert torch.equal(codes, quantize_rows(x, False, backend="reference")[0])


def test_a_product_is_as_it_was_where_both_operands_went_through_a_hadamard():
    x, weight = draw(6, 8, 192).double(), draw(7, 16, 192).double()
    torch.testing.assert_close(hadamard(x) @ hadamard(weight).T, x @ weight.T)
    torch.testing.assert_close(hadamard(hadamard(x)), x)
    codes, scale = int8_rows(hadamard(weight.float())[None])
    y = hadamard(x) @ (codes[0].double() * scale[0].double()[:, None]).T
    assert float((y - x @ weight.T).norm() / (x @ weight.T).norm()) < 0.01
    with pytest.raises(ValueError, match="x must have a multiple of 64 channels K, got 100"):
        hadamard(torch.zeros(2, 100))


@pytest.mark.parametrize(
    ("x", "through", "backend", "error", "message"),
    [
        (torch.zeros(2, 64), False, "triton", TypeError, "x must be torch.bfloat16, got torch.float32"),
        (torch.zeros(2, 2, 2).bfloat16(), False, "triton", ValueError, r"x must have 2 dimensions \[N, K\], got 3"),
        (torch.zeros(64, 2).bfloat16().T, False, "triton", ValueError, "x must have contiguous rows"),
        (torch.zeros(2, 32769).bfloat16(), False, "triton", ValueError, "at most 32768 channels, got 32769"),
        (torch.zeros(2, 96).bfloat16(), True, "triton", ValueError, "multiple of 64 channels where hadamard is True"),
        (torch.zeros(2, 64).bfloat16(), True, "cuda", ValueError, "must be 'triton' or 'reference', got 'cuda'"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(x, through, backend, error, message):
    with pytest.raises(error, match=message):
        quantize_rows(x, through, backend=backend)


@pytest.mark.parametrize("name", ["quantize_rows", "quantize_rows_reference"])
def test_opcheck(name):
    op = getattr(torch.ops.happyhorse_fast, name).default
    torch.library.opcheck(op, (draw(8, 5, 128), True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_into_one_graph(backend):
    x = draw(9, 5, 128)
    compiled = torch.compile(lambda x: quantize_rows(x, True, backend=backend), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(x), quantize_rows(x, True, backend=backend), strict=True))


def test_every_width_has_a_configuration_on_every_architecture():
    assert {launcher.variant_of(k) for k in (1, 4096, 4097, 13696, MAX_CHANNELS)} == set(table("row_quantization"))
    for variant, known in table("row_quantization").items():
        assert sorted(map(int, known)) == list(ARCHITECTURES)
        for arch in ARCHITECTURES:
            config = config_for("row_quantization", variant, arch)
            assert f"columns_{config.block_k}" == variant
            assert config.block_k / (32 * config.num_warps) <= 128, "values a thread holds"


def planted(change):
    def wrong(x, hadamard, *, backend="triton"):
        codes, scale = quantize_rows(x, hadamard, backend="reference")
        return change(codes, scale) if backend == "triton" else (codes, scale)

    return wrong


@pytest.mark.parametrize(
    "change",
    [
        lambda codes, scale: (codes, scale * 1.04),
        lambda codes, scale: (codes.roll(1, 0), scale),
        lambda codes, scale: (codes.index_fill(1, torch.arange(128, 256), 0), scale),
        lambda codes, scale: (codes, scale.index_fill(0, torch.tensor(3), torch.nan)),
    ],
)
def test_the_self_check_finds_a_kernel_planted_wrong(change, monkeypatch):
    monkeypatch.setattr(self_check, "CHECKS", {"quantize_rows": self_check.CHECKS["quantize_rows"]})
    monkeypatch.setattr(op_checks, "quantize_rows", planted(change))
    cpu = torch.device("cpu")
    (check,) = self_check.run_checks("triton", cpu, fp8=False)
    assert not check.passed, check
    monkeypatch.setattr(op_checks, "quantize_rows", planted(lambda *results: results))
    (check,) = self_check.run_checks("triton", cpu, fp8=False)
    assert check.passed and (check.op, check.variant) == ("quantize_rows", "int8"), check
