"""`activation_quantize`, the CUDA epilogue of an MLP's product: against its reference, and with planted bugs."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from cuda_mutants import mutant
from cuda_shim import SHIM, Shim
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st
from strict import poisoned_outputs
from torch._subclasses.fake_tensor import FakeTensorMode

from happyhorse_fast.eager.mlp import gelu7, swiglu7
from happyhorse_fast.ops.linear import cuda as linear_launcher
from happyhorse_fast.ops.linear import op
from happyhorse_fast.ops.runtime.cuda.launch import launch, use_runner

E4M3 = torch.float8_e4m3fn
FORMS = ("bf16", "float32")
ACTIVATIONS = ("swiglu7", "gelu7")


def inputs(sizes, features, form, seed=0):
    """(product, row_scale, column_scale, row_tiles): values past both limits, scales that differ everywhere."""
    g = torch.Generator().manual_seed(seed)
    n, experts = sum(sizes), len(sizes)
    product = torch.randn(n, features, generator=g) * 4
    tiles, start = [], 0
    for expert, size in enumerate(sizes):
        tiles += [(expert, start + at, start + min(at + 128, size)) for at in range(0, size, 128)]
        start += size
    row_tiles = torch.tensor(tiles, dtype=torch.int32)
    if form == "bf16":
        return product.bfloat16(), None, None, row_tiles
    scales = (torch.rand(shape, generator=g) + 0.5 for shape in ((n,), (experts, features)))
    return product, *scales, row_tiles


def same_bits(a, b):
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


def assert_agrees(arguments, activation, fp8):
    with poisoned_outputs():
        y, scale = op.activation_quantize(*arguments, activation, fp8)
        expected, expected_scale = op.activation_quantize(*arguments, activation, fp8, backend="reference")
    assert (y.dtype, y.shape, scale.shape) == (expected.dtype, expected.shape, expected_scale.shape)
    # The host's exp and torch's differ in the last bit: values fall to the other side of a rounding boundary.
    assert torch.equal(scale, expected_scale)
    assert float((y.float() != expected.float()).float().mean()) < 1e-3
    torch.testing.assert_close(y.float(), expected.float(), rtol=2**-3 if fp8 else 2**-7, atol=2**-9 if fp8 else 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_the_reference(activation, fp8, form):
    # Tiles of 128, 1, 2, 70 and 127 rows, off the grid; a block's 1024 or 2048 columns and 384 of the next.
    assert_agrees(inputs((129, 72, 255), 2048 + 384, form), activation, fp8)


@examples(10)
@given(
    sizes=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    columns=st.integers(1, 18),
    form=st.sampled_from(FORMS),
    activation=st.sampled_from(ACTIVATIONS),
    fp8=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_shape(sizes, columns, form, activation, fp8, seed):
    assert_agrees(inputs(tuple(sizes), 128 * columns, form, seed), activation, fp8)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_zeros_stay_zeros_and_a_nan_stays_one(activation):
    product, *_, row_tiles = inputs((3,), 256, "bf16")
    product[0] = 0
    product[1, 5] = torch.nan
    y, _ = op.activation_quantize(product, None, None, row_tiles, activation, True)
    assert y[0].float().eq(0).all()
    assert int(y.float().isnan().sum()) == 1 and y[1, 5 // (2 if activation == "swiglu7" else 1)].float().isnan()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fp8", [False, True])
def test_the_order_of_threads_and_blocks_changes_no_bit(form, fp8):
    arguments, results = inputs((130, 17), 1152, form), []
    for order in (0, 1, 2):
        with SHIM.order(order), poisoned_outputs():
            results.append(op.activation_quantize(*arguments, "swiglu7", fp8))
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


MUTANTS = {
    "last row of a tile left out": ("end = min(tile.end, first + ROWS)", "end = min(tile.end - 1, first + ROWS)"),
    "last row of a block left out": ("end = min(tile.end, first + ROWS)", "end = min(tile.end, first + ROWS - 1)"),
    "columns of the first block only": ("blockIdx.x * THREADS + threadIdx.x", "threadIdx.x"),
    "gate and linear swapped": ("swiglu7(x[2 * j], x[2 * j + 1])", "swiglu7(x[2 * j + 1], x[2 * j])"),
    "scales of expert 0": ("static_cast<i64>(tile.expert) * p.features", "i64{0} * p.features"),
    "the scale for its inverse": ("y[j] *= p.inverse_scale", "y[j] /= p.inverse_scale"),
    "no scale": ("y[j] *= p.inverse_scale", "y[j] *= 1.0f"),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("bug", MUTANTS)
def test_a_planted_bug_is_caught(bug, tmp_path):
    arguments = *inputs((130, 17), 1152, "float32"), "swiglu7", True
    good = op.activation_quantize(*arguments)
    broken = mutant(tmp_path, "activation_quantize", *MUTANTS[bug])
    with use_runner(broken), poisoned_outputs():
        result = op.activation_quantize(*arguments)
    assert broken.launches == ["activation_quantize"]
    assert not same_bits(result, good)


def test_offsets_past_2_31_elements():
    n, features = 78_650, 27_392  # 1080p at 5 s and its up projection: 2.15e9 elements, of which 20 rows are touched
    product = torch.empty(n, features, dtype=torch.bfloat16)
    small = inputs((20,), features, "bf16")[0]
    product[-20:] = small
    tiles = torch.tensor([[0, n - 20, n]], dtype=torch.int32), torch.tensor([[0, 0, 20]], dtype=torch.int32)
    y, scale = op.activation_quantize(product, None, None, tiles[0], "gelu7", True)
    assert y.numel() > 2**31
    expected = op.activation_quantize(small, None, None, tiles[1], "gelu7", True)
    assert same_bits((y[-20:], scale), expected)


@pytest.mark.parametrize("backend", ["cuda", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_opcheck_and_one_graph(backend, form):
    arguments = (*inputs((130,), 256, form), "swiglu7", True)
    registered = getattr(torch.ops.happyhorse_fast, f"activation_quantize_{backend}").default
    torch.library.opcheck(registered, arguments)

    def call(*arguments):
        return op.activation_quantize(*arguments, backend=backend)

    assert same_bits(torch.compile(call, fullgraph=True, backend="aot_eager")(*arguments), call(*arguments))


def test_opcheck_and_one_graph_with_the_library_product():
    x = torch.randn(130, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    arguments = x, None, x[None, :128].contiguous(), None, inputs((130,), 128, "bf16")[3], "gelu7", True
    torch.library.opcheck(linear_launcher.fp8_linear_activation, arguments)

    def call(*arguments):
        return op.fp8_linear_activation(*arguments, backend="cuda")

    assert same_bits(torch.compile(call, fullgraph=True, backend="aot_eager")(*arguments), call(*arguments))


@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_fake_tensors_at_1080p(backend):
    with FakeTensorMode(), torch.device("cuda"):
        n, f = 64_256, 27_392
        scales, tiles = (torch.empty(n), torch.empty(3, f)), torch.empty(502, 3, dtype=torch.int32)
        y, scale = op.activation_quantize(torch.empty(n, f), *scales, tiles, "swiglu7", True, backend=backend)
        assert (y.shape, y.dtype, y.device.type) == ((n, 13_696), E4M3, "cuda")
        assert (scale.shape, scale.dtype) == ((1,), torch.float32)
        x, weight = torch.empty(n, 5120, dtype=E4M3), torch.empty(3, f, 5120, dtype=E4M3)
        y, scale = op.fp8_linear_activation(x, scales[0], weight, scales[1], tiles, "gelu7", False, backend="cuda")
        assert (y.shape, y.dtype, scale.shape) == ((n, f), torch.bfloat16, (0,))


MISTAKES = {
    "dtype": ({"product": torch.zeros(4, 128).half()}, TypeError, "product must be torch.bfloat16 or torch.float32"),
    "columns": ({"product": torch.zeros(4, 64).bfloat16()}, ValueError, "product must have a multiple of 128 features"),
    "activation": ({"activation": "relu"}, ValueError, "activation must be one of 'swiglu7', 'gelu7'; got 'relu'"),
    "scale": ({"row_scale": torch.ones(4)}, ValueError, "row_scale must be None where product is bf16"),
    "no scale": (
        {"product": torch.zeros(4, 128)},
        TypeError,
        r"row_scale must be a tensor of shape \[4\], got NoneType",
    ),
    "backend": ({"backend": "triton"}, ValueError, "backend must be 'cuda' or 'reference', got 'triton'"),
    "vector": (
        {"product": torch.zeros(4, 132).bfloat16()[:, :128]},
        ValueError,
        "product must have rows of a multiple",
    ),
    "address": (
        {"product": torch.zeros(4, 136).bfloat16()[:, 4:132]},
        ValueError,
        "product must start on a multiple of",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_argument_is_named(change, error, message):
    arguments = {"product": torch.zeros(4, 128).bfloat16(), "row_scale": None, "column_scale": None}
    arguments |= {"row_tiles": torch.tensor([[0, 0, 4]], dtype=torch.int32), "activation": "gelu7", "fp8": True}
    with pytest.raises(error, match=message):
        op.activation_quantize(**(arguments | change))


ACTIVATION_TABLE = """
#include "activations.cuh"
struct TableParams { const float* x; const float* y; float* sigmoid; float* gelu; float* swiglu; int count; };
HH_KERNEL(activation_table, TableParams, 32) {
  for (int i = static_cast<int>(threadIdx.x); i < p.count; i += 32) {
    p.sigmoid[i] = sigmoid(p.x[i]);
    p.gelu[i] = gelu7(p.x[i]);
    p.swiglu[i] = swiglu7(p.x[i], p.y[i]);
  }
}
"""


class TableParams(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "y", "sigmoid", "gelu", "swiglu")]
    _fields_.append(("count", ctypes.c_int))


def test_the_activations_on_the_host(tmp_path):
    limits = torch.tensor([7.0, -7.0]).repeat(2)
    edges = torch.cat(
        [limits.nextafter(torch.tensor([0.0, 0.0, 99.0, -99.0])), limits, torch.tensor([0.0, -88.8, 1e30])]
    )
    x = torch.cat([torch.linspace(-20, 20, 4001), edges, torch.tensor([-torch.inf, torch.inf, torch.nan])])
    y = torch.cat([x[1::2], x[::2]])
    results = [torch.empty_like(x) for _ in range(3)]
    params = TableParams(*(t.data_ptr() for t in (x, y, *results)), len(x))
    (tmp_path / "table.cu").write_text(ACTIVATION_TABLE)
    with use_runner(Shim([tmp_path / "table.cu"])):
        launch("table", "activation_table", params, (1, 1, 1), 32, 0, x)
    truth = x.double().sigmoid(), gelu7(x.double()), swiglu7(torch.stack([x, y], dim=1).double().flatten())
    for got, want in zip(results, truth, strict=True):
        # Six roundings of half an ulp, and one of 1.702 a that the sigmoid's slope makes |a| times as large.
        torch.testing.assert_close(got.double(), want, rtol=4e-6, atol=1e-37, equal_nan=True)
    assert results[1][-2] == results[1][x == 7].max() and math.isnan(results[1][-1])


def test_what_the_library_product_cannot_take_is_named():
    tiles = torch.tensor([[0, 0, 4]], dtype=torch.int32)
    x, weight = torch.zeros(4, 128).to(E4M3), torch.zeros(1, 128, 128).to(E4M3)
    rest = weight, torch.ones(1, 128), tiles, "gelu7", True
    x, weight = torch.zeros(4, 24).to(E4M3), torch.zeros(1, 128, 24).to(E4M3)
    with pytest.raises(ValueError, match="x must have rows of a multiple of 16 elements"):
        op.fp8_linear_activation(x, torch.ones(4), weight, *rest[1:], backend="cuda")
    for op_without in (op.fp8_linear, op.fp8_linear_residual):
        hidden = (torch.zeros(4, 128),) if op_without is op.fp8_linear_residual else ()
        with pytest.raises(ValueError, match="backend must be 'triton' or 'reference', got 'cuda'"):
            op_without(x, torch.ones(4), weight, torch.ones(1, 128), tiles, *hidden, backend="cuda")
