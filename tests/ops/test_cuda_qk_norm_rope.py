"""`qk_norm_rope`, the CUDA epilogue of a qkv product: against its reference, in any order, with planted bugs."""

from __future__ import annotations

import pytest
import torch
from cuda_mutants import mutant
from cuda_shim import SHIM, ShimError
from qkv_cases import ALIGNED, SHAPES, fp8_linear, make, steps, tail
from strict import poisoned_outputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear

from happyhorse_fast.ops.qkv import op
from happyhorse_fast.ops.runtime.cuda.launch import use_runner

E4M3 = torch.float8_e4m3fn
FORMS = ("bf16", "float32")
OUTPUTS = ("bf16", "int8_qk", "int8_qk_fp8_v", "fp8")
# More heads and gates than a warp takes at once, two experts, a tile of 57 rows.
WIDE = ((128, 57), 64, 32, 36, 12)


def product_of(case, form):
    """(product, row_scale, column_scale), as a GEMM per expert gives it."""
    if form == "bf16":
        x, _ = op.rmsnorm_quantize(case.hidden, case.norm, case.row_tiles, backend="reference")
        return torch.cat([linear(x[a:b], case.weight[e]) for e, a, b in case.spans]), None, None
    product = torch.cat([case.x[a:b].float() @ case.codes[e].float().T for e, a, b in case.spans])
    return product, case.x_scale, case.weight_scale


def run(case, form, out, backend="cuda", product=None):
    product, *scales = product_of(case, form) if product is None else (product, None, None)
    qk_scale = case.qk_scale if out == "fp8" else None
    return op.qk_norm_rope(product, *scales, *tail(case), out, qk_scale, backend=backend)


def same_bits(a, b):
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("name", [*ALIGNED, "experts-off-grid", "d128-gqa5"])
def test_against_the_reference(name, out, form):
    if name not in ALIGNED:
        out = "bf16"
    case = make(SHAPES[name])
    with poisoned_outputs():
        result = run(case, form, out)
        expected = run(case, form, out, "reference")
    for got, want in zip(result[:2], expected[:2], strict=True):
        assert got.dtype == want.dtype
        # Sums in another order: now and then a value falls on the other side of a rounding boundary.
        assert float((got.float() != want.float()).float().mean()) < 1e-3
        if got.dtype == torch.int8:
            assert int((got.int() - want.int()).abs().max()) <= 1
        elif got.dtype == E4M3:
            assert steps(got, want.float()) <= 1
        else:
            torch.testing.assert_close(got.float(), want.float(), rtol=2**-7, atol=0)
    # v is copied or divided by the largest of it: nothing is summed.
    assert same_bits((result[2], result[5]), (expected[2], expected[5]))
    for i in (3, 4, 6):
        torch.testing.assert_close(result[i], expected[i], rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("out", OUTPUTS)
def test_it_is_what_qkv_linear_makes_of_its_own_product(out, form):
    case = make(SHAPES["experts-aligned"])
    if form == "float32":
        expected = fp8_linear(case, out, "cuda")
    else:
        x, _ = op.rmsnorm_quantize(case.hidden, case.norm, case.row_tiles, backend="reference")
        qk_scale = case.qk_scale if out == "fp8" else None
        expected = op.qkv_linear(x, None, case.weight, None, *tail(case), out, qk_scale, backend="cuda")
    assert same_bits(run(case, form, out), expected)


@pytest.mark.parametrize("out", OUTPUTS[1:])
@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_threads_and_blocks_changes_no_bit(form, out):
    for shape in (WIDE, SHAPES["tail-127-mha"]):
        case, results = make(shape), []
        for order in (0, 1, 2):
            with SHIM.order(order), poisoned_outputs():
                results.append(run(case, form, out))
        assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


MUTANTS = {
    "no barrier before the largest": ("  __syncthreads();\n  return join(", "  return join("),
    "a lane off in the sum of squares": (
        "#pragma unroll\n  for (int step = LANES / 2; step > 0; step /= 2) x +=",
        "#pragma unroll\n  for (int step = LANES; step > 1; step /= 2) x +=",
    ),
    "last row of a tile left out": ("if (row >= tile.end) return;", "if (row + 1 >= tile.end) return;"),
    "no barrier behind the rows' scales": ("    __syncthreads();\n  }\n", "  }\n"),
    "no wait for the copies": ("  wait_for_copies();\n\n", "\n"),
    "last row of v left out": ("at / LANES < rows ? 16", "at / LANES + 1 < rows ? 16"),
    "every second batch of heads": ("start += TOGETHER * IN_FLIGHT", "start += 2 * TOGETHER * IN_FLIGHT"),
    "gates of one warp only": ("head < p.heads_q; head += WARP", "head < WARP; head += WARP"),
    "norm of expert 0": ("p.qk_norm + (2 * expert + kind) * D", "p.qk_norm + (0 * expert + kind) * D"),
    "scales of q and k swapped": (
        "p.q_scale[block] = p.qk_scale[2 * tile.expert];",
        "p.q_scale[block] = p.qk_scale[1];",
    ),
}
INT8_MUTANTS = {
    "scale of another row": ("p.q_scale[row * p.heads_q + head] = scale", "p.q_scale[head] = scale"),
    "largest of fewer lanes": ("lanes_max<LANES>(largest_of(x))", "lanes_max<LANES / 2>(largest_of(x))"),
    "largest of one warp": (
        "block_max(largest, scratch)",
        "0.0f * block_max(largest, scratch) + lanes_max<WARP>(largest)",
    ),
    "last row of k left out": ("const bool inside = row < tile.end;", "const bool inside = row + 1 < tile.end;"),
    "norm of q": ("normalise_and_rotate(x, inverse, true)", "normalise_and_rotate(x, inverse, false)"),
    "scale of head 0": ("p.k_scale[head * p.blocks", "p.k_scale[0 * p.blocks"),
    "truncated": ("return bits_of(x + 12582912.0f) & 0xffu;", "return static_cast<u32>(static_cast<int>(x)) & 0xffu;"),
}
ALL_MUTANTS = {bug: (edit, "fp8") for bug, edit in MUTANTS.items()}
ALL_MUTANTS |= {bug: (edit, "int8_qk") for bug, edit in INT8_MUTANTS.items()}


@pytest.mark.quick(1)
@pytest.mark.parametrize("bug", ALL_MUTANTS)
def test_a_planted_bug_is_caught(bug, tmp_path):
    case = make(WIDE)
    edit, out = ALL_MUTANTS[bug]
    good = run(case, "float32", out)
    broken = mutant(tmp_path, "qk_norm_rope", *edit)

    def caught(order):
        try:
            with use_runner(broken), poisoned_outputs(), broken.order(order):
                return not same_bits(run(case, "float32", out), good)
        except ShimError:
            return True

    assert caught(0) or caught(1)
    assert broken.launches[:2] == ["qk_norm_rope", "quantize_v" if out == "fp8" else "quantize_k"]


def test_offsets_past_2_31_elements():
    # 2.35e9 elements of product and 2.15e9 of q, of which the last tile is touched.
    n, heads, d = 524_800, (32, 1), 128
    small = make(((128,), 64, d, *heads))
    product, cos_sin = torch.empty(n, 35 * d, dtype=torch.bfloat16), torch.empty(n, d)
    part = product_of(small, "bf16")[0]
    product[-128:], cos_sin[-128:] = part, small.cos_sin
    row_tiles = torch.tensor([[0, n - 128, n]], dtype=torch.int32)
    arguments = (None, None, small.qk_norm, cos_sin, row_tiles, *heads, "bf16")
    result = op.qk_norm_rope(product, *arguments)
    assert result[0].numel() > 2**31
    expected = run(small, "bf16", "bf16", product=part)
    assert all(torch.equal(a[-128:], b) for a, b in zip(result[:3], expected[:3], strict=True))
    # v transposed: a channel's codes are n apart.
    _, _, v, _, _, v_scale, _ = op.qk_norm_rope(product, *arguments[:-1], "fp8", small.qk_scale)
    codes = run(small, "bf16", "fp8", product=part)
    assert torch.equal(v[:, :, -128:].float(), codes[2].float()) and torch.equal(v_scale[:, -1:], codes[5])
    q, k, _, q_scale, k_scale, *_ = op.qk_norm_rope(product, *arguments[:-1], "int8_qk")
    codes = run(small, "bf16", "int8_qk", product=part)
    assert torch.equal(q[-128:], codes[0]) and torch.equal(k[-128:], codes[1])
    assert torch.equal(q_scale[-128:], codes[3]) and torch.equal(k_scale[:, -1:], codes[4])


def test_rows_of_the_product_may_be_apart():
    case = make(SHAPES["experts-aligned"])
    product, row_scale, column_scale = product_of(case, "float32")
    wide = torch.full((len(product), product.shape[1] + 12), torch.nan)
    wide[:, 4:-8] = product
    arguments = (row_scale, column_scale, *tail(case), "fp8", case.qk_scale)
    assert same_bits(op.qk_norm_rope(wide[:, 4:-8], *arguments), op.qk_norm_rope(product, *arguments))


@pytest.mark.parametrize("backend", ["cuda", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_opcheck_and_one_graph(backend, form):
    case = make(SHAPES["one-tile"])
    arguments = (*product_of(case, form), *tail(case), "fp8", case.qk_scale)
    registered = getattr(torch.ops.happyhorse_fast, f"qk_norm_rope_{backend}").default
    torch.library.opcheck(registered, arguments)

    def call(*arguments):
        return op.qk_norm_rope(*arguments, backend=backend)

    assert same_bits(torch.compile(call, fullgraph=True, backend="aot_eager")(*arguments), call(*arguments))


@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_fake_tensors_at_1080p(backend):
    with FakeTensorMode(), torch.device("cuda"):
        n, hq, hkv, d = 64_256, 40, 8, 128
        scales = torch.empty(n), torch.empty(3, 57 * d)
        tables = torch.empty(3, 2, d), torch.empty(n, d), torch.empty(502, 3, dtype=torch.int32)
        q, k, v, q_scale, k_scale, v_scale, gate = op.qk_norm_rope(
            torch.empty(n, 57 * d), *scales, *tables, hq, hkv, "fp8", torch.empty(3, 2), backend=backend
        )
    assert (q.shape, k.shape, v.shape, q.dtype, v.dtype) == ((n, hq, d), (n, hkv, d), (hkv, d, n), E4M3, E4M3)
    assert (q_scale.shape, k_scale.shape, v_scale.shape) == ((502,), (502,), (hkv, 502))
    assert (gate.shape, q.device.type) == ((n, hq), "cuda")


MISTAKES = {
    "dtype": ({"product": torch.zeros(128, 160).half()}, TypeError, "product must be torch.bfloat16 or torch.float32"),
    "columns": (
        {"num_heads_q": 3, "num_heads_kv": 3},
        ValueError,
        r"product must be of size 320 in dimension 1 of \[128, 320\], got",
    ),
    "no row_scale": ({"row_scale": None}, TypeError, r"row_scale must be a tensor of shape \[128\], got NoneType"),
    "experts": (
        {"column_scale": torch.ones(2, 160)},
        ValueError,
        r"column_scale must be of size 1 in dimension 0 of \[1, 160\]",
    ),
    "bf16 scale": (
        {"product": torch.zeros(128, 160).bfloat16()},
        ValueError,
        "row_scale must be None where product is",
    ),
    "qk_scale": ({"qk_scale": None}, TypeError, r"qk_scale must be a tensor of shape \[1, 2\]"),
    "out": ({"out": "fp4"}, ValueError, "out must be one of 'bf16', 'int8_qk', 'int8_qk_fp8_v', 'fp8'; got 'fp4'"),
    "backend": ({"backend": "triton"}, ValueError, "backend must be 'cuda' or 'reference', got 'triton'"),
    "vector": ({"product": torch.zeros(128, 162)[:, :160]}, ValueError, "product must have rows of a multiple of 4 el"),
    "address": (
        {"product": torch.zeros(128, 164)[:, 1:161]},
        ValueError,
        "product must start on a multiple of 16 byte",
    ),
    "phase address": (
        {"cos_sin": torch.zeros(128 * 32 + 1)[1:].view(128, 32)},
        ValueError,
        "cos_sin must start on a multiple of 16 bytes",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_argument_is_named(change, error, message):
    case = make(SHAPES["one-tile"])
    names = ("product", "row_scale", "column_scale", "qk_norm", "cos_sin", "row_tiles", "num_heads_q", "num_heads_kv")
    arguments = dict(zip(names, (*product_of(case, "float32"), *tail(case)), strict=True))
    with pytest.raises(error, match=message):
        op.qk_norm_rope(**(arguments | {"out": "fp8", "qk_scale": case.qk_scale} | change))
