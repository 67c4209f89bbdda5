"""The ops of attention: torch's contract, arguments, and the two ways their Triton kernel loads."""

import math

import pytest
import torch
from attention_cases import FORMATS, FP8, MAP, inputs, problems
from strict import permuted_grid
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.tools.tensor_descriptor import TensorDescriptor

from happyhorse_fast.block_map import BlockMap
from happyhorse_fast.kernels import launch
from happyhorse_fast.ops import block_sparse_attention
from happyhorse_fast.ops.attention import triton as launcher
from happyhorse_fast.ops.attention.score_bound import LIMIT
from happyhorse_fast.ops.quantize import ATTENTION
from happyhorse_fast.ops.runtime.formats import uses_e4m3
from happyhorse_fast.ops.runtime.triton.device import pretend

BACKENDS = [*((f, b) for f in FORMATS for b in ("triton", "reference")), ("bf16", "cuda")]
BOUNDS = pytest.mark.parametrize("bound", [LIMIT, math.inf, None], ids=["bounded", "running", "found"])


@pytest.mark.parametrize("flag", [None, torch.ones(1, dtype=torch.int32)], ids=["told", "flag"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_opcheck(fmt, flag):
    if flag is not None and fmt != "bf16":
        flag = None  # which takes none
    given = inputs(fmt, 130, heads=(2, 1))
    rest = [given.get(x) for x in ("q_scale", "k_scale", "v_scale")]
    tensors = [given[x] for x in "qkv"] + list(BlockMap.dense(130, 130).tensors())
    for op in (
        torch.ops.happyhorse_fast.block_sparse_attention.default,
        torch.ops.happyhorse_fast.block_sparse_attention_reference.default,
    ):
        fp8_v = uses_e4m3(fmt)
        out_scale = torch.full((1,), 0.01) if fp8_v else None
        arguments = (*tensors, 0.2, not fp8_v, flag, *rest, torch.rand(130, 2), out_scale, True)
        checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        if fmt == "bf16":  # test_schema multiplies every input, which torch 2.13 does not do for e4m3 on the CPU
            checks.append("test_schema")
        torch.library.opcheck(op, arguments, test_utils=checks)


@pytest.mark.quick(6)
@BOUNDS
@pytest.mark.parametrize(("fmt", "backend"), BACKENDS)
def test_compiles_as_one_graph(fmt, backend, bound):
    given = inputs(fmt, 130, heads=(2, 1))
    block_map = BlockMap.dense(130, 130)
    gate = torch.rand(130, 2)

    def attention(given, block_map, gate):
        return block_sparse_attention(
            **given, block_map=block_map, scale=0.2, bound=bound, gate=gate, return_lse=True, backend=backend
        )

    torch._dynamo.reset()  # the other cases' graphs count towards its limit of one function's
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(given, block_map, gate), attention(given, block_map, gate), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("fmt", "backend"), BACKENDS)
def test_fake_tensors_have_the_shapes_of_a_15b_layer(fmt, backend):
    with FakeTensorMode(), torch.device("cuda"):
        n, blocks = 64_256, 502
        dtype, of_v = ATTENTION[fmt]
        v = torch.empty((8, 128, n) if of_v == FP8 else (n, 8, 128), dtype=of_v)
        block_map = BlockMap(
            torch.empty(1, blocks, 2, dtype=torch.int32),
            *(torch.empty(size, dtype=torch.int32) for size in ((1, blocks), (1000,), (1000,), (2, 128, 4), (blocks,))),
            queries=n,
            keys=n,
        )
        q, k = torch.empty(n, 40, 128, dtype=dtype), torch.empty(n, 8, 128, dtype=dtype)
        sizes = {torch.bfloat16: [], torch.int8: [(n, 40), (8, blocks)], FP8: [(blocks,), (blocks,)]}[dtype]
        sizes += [(8, blocks)] if of_v == FP8 else []
        scales = dict(zip(("q_scale", "k_scale", "v_scale"), map(torch.empty, sizes), strict=False))
        out, out_scale, lse = block_sparse_attention(
            q,
            k,
            v,
            block_map,
            scale=0.1,
            **scales,
            fp8_out=True,
            return_lse=True,
            backend=backend,
        )
    assert (out.shape, out.dtype, out.device.type) == ((n, 40, 128), FP8, "cuda")
    assert out_scale.shape == (1,) and lse.shape == (40, n)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(300, 4, 32)}, TypeError, "q must be bfloat16 or int8 or float8_e4m3fn, got torch.float32"),
        ({"v": torch.zeros(300, 2, 32).char()}, TypeError, "v must be bfloat16 or float8_e4m3fn, got torch.int8"),
        ({"k": torch.zeros(300, 2, 32).to(FP8)}, TypeError, "k must be of q's dtype"),
        ({"v": torch.zeros(2, 32, 384).to(FP8)}, TypeError, "v must be bfloat16 where q is torch.bfloat16"),
        ({x: torch.zeros(300, h, 32).to(FP8) for x, h in (("q", 4), ("k", 2))}, TypeError, r"for 8-bit .* v .*: int8"),
        ({"bound": -1.0}, ValueError, "bound must be None or at least 0, in powers of two, got -1.0"),
        ({"bound": math.nan}, ValueError, "bound must be None or at least 0, in powers of two, got nan"),
        ({"v": torch.zeros(299, 2, 32).bfloat16()}, ValueError, r"v must be \[300, 2, 32\]"),
        ({"q": torch.zeros(300, 4, 48).bfloat16()}, ValueError, "head dim of 32, 64, 128; got 48"),
        ({"k": torch.zeros(300, 3, 32).bfloat16()}, ValueError, "divisor of q's 4 heads"),
        ({"q": torch.zeros(4, 32).bfloat16()}, ValueError, "q must have 3 dimensions"),
        ({"block_map": BlockMap.dense(299, 300)}, ValueError, "300 queries and k's 300 keys, got 299 and 300"),
        ({"scale": 0.0}, ValueError, "scale must be positive and finite, got 0.0"),
        (
            {"q_scale": torch.ones(3)},
            ValueError,
            "q_scale must be given exactly where q has 8 bits; q is torch.bfloat16",
        ),
        (
            {"gate": torch.ones(300, 3)},
            ValueError,
            r"gate must be of size 4 in dimension 1 of \[300, 4\], got \[300, 3\]",
        ),
        ({"backend": "numpy"}, ValueError, "backend must be 'triton' or 'cuda' or 'reference', got 'numpy'"),
        ({"q": torch.zeros(300, 4, 32, device="meta").bfloat16()}, ValueError, "on q's device meta"),
    ],
)
def test_what_the_kernel_cannot_take_is_named(change, error, message):
    with pytest.raises(error, match=message):
        block_sparse_attention(**({**inputs("bf16"), "block_map": MAP, "scale": 0.1} | change))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q_scale", (3,), r"q_scale must have 2 dimensions \[300, 4\], got 1: \[3\]"),
        ("k_scale", (3,), r"k_scale must have 2 dimensions \[2, 3\], got 1: \[3\]"),
    ],
)
def test_scales_of_int8_are_by_head(name, shape, message):
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**inputs("int8_qk") | {name: torch.ones(shape)}, block_map=MAP, scale=0.1)


# Both ways to load --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("tile", [(128, 128), (64, 64)])
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("bound", [LIMIT, math.inf], ids=["bounded", "running"])
def test_descriptors_and_every_tile_give_the_answer(fmt, tile, descriptors, bound, monkeypatch):
    config = launch.LaunchConfig(block_m=tile[0], block_n=tile[1], num_warps=8, num_stages=3, descriptors=descriptors)
    monkeypatch.setattr(launcher, "launch_config", lambda *_, **__: config)
    given = inputs(fmt, heads=(2, 1))
    with permuted_grid(0):
        out = block_sparse_attention(**given, block_map=MAP, scale=32**-0.5, bound=bound)[0]
    assert problems(given, MAP, out, 32**-0.5, backend="triton bounded" if bound == LIMIT else "triton") == []


def test_descriptors_are_only_made_where_the_hardware_can_read_them():
    x = torch.empty(10, 2, 32, dtype=torch.bfloat16)
    assert not launcher.describable(x), "on the CPU"
    packed = torch.empty(10, 5, 32, dtype=torch.bfloat16)[:, 1:3]
    codes = torch.empty(2, 32, 128, dtype=FP8)  # v in e4m3, transposed
    _, k, v = launcher.matrices(packed, packed, codes)
    made = launcher.described(k, (64, 32))
    assert isinstance(made, TensorDescriptor)
    assert (list(made.shape), list(made.strides)) == ([10, 64], [160, 1])
    assert k.data_ptr() == packed.data_ptr() and v.data_ptr() == codes.data_ptr(), "views"
    assert (list(v.shape), list(v.stride())) == ([64, 128], [128, 1])


def test_every_variant_has_a_configuration_for_each_architecture_that_can():
    table = launch.table(launcher.STEM)
    for fmt in FORMATS:
        for d in (32, 64, 128):
            wanted = [a for a in launch.ARCHITECTURES if not uses_e4m3(fmt) or a >= launch.FP8_SINCE]
            assert sorted(map(int, table[f"{fmt}_d{d}"])) == wanted


def test_a_bounded_softmax_with_an_lse_reads_through_pointers():
    """Through descriptors it spills in the plain kernel."""
    x = torch.empty(256, 2, 128, dtype=torch.bfloat16, device="meta")
    with pretend(100):
        assert launcher.launch_config(x, x, x, bounded=True).descriptors
        assert launcher.launch_config(x, x, x, lse=True).descriptors
        assert not launcher.launch_config(x, x, x, bounded=True, lse=True).descriptors


def test_a_map_that_is_none_is_named():
    with pytest.raises(TypeError, match=r"block_map must be a BlockMap, such as .*; got NoneType"):
        block_sparse_attention(**inputs("bf16", 130, heads=(2, 1)), block_map=None, scale=0.2, backend="reference")


def test_a_scale_that_more_heads_share_is_taken_as_it_is():
    q, k, v = (torch.randn(128, 2, 64).bfloat16() for _ in range(3))
    dense, how = BlockMap.dense(128, 128), {"scale": 0.125, "backend": "reference"}
    wider = torch.tensor([0.5])
    out, scale, _ = block_sparse_attention(q, k, v, dense, fp8_out=True, out_scale=wider, **how)
    wide, _, _ = block_sparse_attention(q, k, v, dense, **how)
    assert scale is wider
    assert (out.float() * 0.5 - wide.float()).abs().max() <= wide.float().abs().max() * 2**-4 + 2**-10
    with pytest.raises(ValueError, match="out_scale must be None without fp8_out"):
        block_sparse_attention(q, k, v, dense, out_scale=wider, **how)
    with pytest.raises(ValueError, match="out_scale must be of size 1"):
        block_sparse_attention(q, k, v, dense, fp8_out=True, out_scale=torch.ones(2), **how)
