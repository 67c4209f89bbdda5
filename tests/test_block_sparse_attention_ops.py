"""The ops of attention: torch's contract, arguments, and the two ways their Triton kernel loads."""

import pytest
import torch
from attention_cases import CUDA, FORMATS, FP8, MAP, inputs, problems
from strict import permuted_grid
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.tools.tensor_descriptor import TensorDescriptor

from happyhorse_fast.block_map import BlockMap
from happyhorse_fast.kernels import launch
from happyhorse_fast.ops.block_sparse_attention import block_sparse_attention
from happyhorse_fast.ops.triton import block_sparse_attention as launcher


@pytest.mark.parametrize("fmt", FORMATS)
def test_opcheck(fmt):
    given = inputs(fmt, 130, heads=(2, 1))
    rest = [given.get(x) for x in ("q_scale", "k_scale", "v_scale")]
    tensors = [given[x] for x in "qkv"] + list(BlockMap.dense(130, 130).tensors())
    for op in (
        torch.ops.happyhorse_fast.block_sparse_attention.default,
        torch.ops.happyhorse_fast.block_sparse_attention_reference.default,
    ):
        arguments = (*tensors, 0.2, *rest, torch.rand(130, 2), None, fmt == "fp8", True)
        checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        if fmt == "bf16":  # test_schema multiplies every input, which torch 2.13 does not do for e4m3 on the CPU
            checks.append("test_schema")
        torch.library.opcheck(op, arguments, test_utils=checks)


@pytest.mark.parametrize(
    ("fmt", "backend"), [*((f, b) for f in ("bf16", "fp8") for b in ("triton", "reference")), CUDA]
)
def test_compiles_as_one_graph(fmt, backend):
    given = inputs(fmt, 130, heads=(2, 1))
    block_map = BlockMap.dense(130, 130)
    gate = torch.rand(130, 2)

    def attention(given, block_map, gate):
        return block_sparse_attention(
            **given, block_map=block_map, scale=0.2, gate=gate, return_lse=True, backend=backend
        )

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(given, block_map, gate), attention(given, block_map, gate), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("fmt", "backend"), [*((f, b) for f in FORMATS for b in ("triton", "reference")), CUDA])
def test_fake_tensors_have_the_shapes_of_a_15b_layer(fmt, backend):
    with FakeTensorMode(), torch.device("cuda"):
        n, blocks = 64_256, 502
        dtype = torch.bfloat16 if fmt == "bf16" else FP8
        v = torch.empty(8, 128, n, dtype=FP8) if fmt == "fp8" else torch.empty(n, 8, 128, dtype=torch.bfloat16)
        block_map = BlockMap(
            torch.empty(1, blocks, 2, dtype=torch.int32),
            *(torch.empty(size, dtype=torch.int32) for size in ((1, blocks), (1000,), (1000,), (2, 128, 4), (blocks,))),
            queries=n,
            keys=n,
        )
        q, k = torch.empty(n, 40, 128, dtype=dtype), torch.empty(n, 8, 128, dtype=dtype)
        scales = [torch.empty(blocks), torch.empty(blocks), torch.empty(8, blocks)]
        names = {"bf16": [], "fp8_qk": ["q_scale", "k_scale"], "fp8": ["q_scale", "k_scale", "v_scale"]}[fmt]
        out, out_scale, lse = block_sparse_attention(
            q,
            k,
            v,
            block_map,
            scale=0.1,
            **dict(zip(names, scales, strict=False)),
            fp8_out=True,
            return_lse=True,
            backend=backend,
        )
    assert (out.shape, out.dtype, out.device.type) == ((n, 40, 128), FP8, "cuda")
    assert out_scale.shape == (n, 40) and lse.shape == (40, n)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(300, 4, 32)}, TypeError, "q must be bfloat16 or float8_e4m3fn, got torch.float32"),
        ({"k": torch.zeros(300, 2, 32).to(FP8)}, TypeError, "k must be of q's dtype"),
        ({"v": torch.zeros(2, 32, 384).to(FP8)}, TypeError, "v must be bfloat16 where q and k are"),
        ({"v": torch.zeros(299, 2, 32).bfloat16()}, ValueError, r"v must be \[300, 2, 32\]"),
        ({"q": torch.zeros(300, 4, 48).bfloat16()}, ValueError, "head dim of 32, 64, 128; got 48"),
        ({"k": torch.zeros(300, 3, 32).bfloat16()}, ValueError, "divisor of q's 4 heads"),
        ({"q": torch.zeros(4, 32).bfloat16()}, ValueError, "q must have 3 dimensions"),
        ({"block_map": BlockMap.dense(299, 300)}, ValueError, "300 queries and k's 300 keys, got 299 and 300"),
        ({"scale": 0.0}, ValueError, "scale must be positive and finite, got 0.0"),
        ({"q_scale": torch.ones(3)}, ValueError, "q_scale must be given exactly where q is float8_e4m3fn"),
        ({"gate": torch.ones(300, 3)}, ValueError, r"gate must be of shape \[300, 4\], got \[300, 3\]"),
        ({"k_mean": torch.ones(2, 32).half()}, TypeError, "k_mean must be torch.float32"),
        ({"backend": "numpy"}, ValueError, "backend must be 'triton' or 'cuda' or 'reference', got 'numpy'"),
        ({"q": torch.zeros(300, 4, 32, device="meta").bfloat16()}, ValueError, "on q's device meta"),
    ],
)
def test_what_the_kernel_cannot_take_is_named(change, error, message):
    with pytest.raises(error, match=message):
        block_sparse_attention(**({**inputs("bf16"), "block_map": MAP, "scale": 0.1} | change))


# Both ways to load --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("tile", [(128, 128), (64, 64)])
@pytest.mark.parametrize("descriptors", [False, True])
def test_descriptors_and_every_tile_give_the_answer(fmt, tile, descriptors, monkeypatch):
    config = launch.LaunchConfig(block_m=tile[0], block_n=tile[1], num_warps=8, num_stages=3, descriptors=descriptors)
    monkeypatch.setattr(launcher, "launch_config", lambda *_, **__: config)
    given = inputs(fmt, heads=(2, 1))
    with permuted_grid(0):
        out = block_sparse_attention(**given, block_map=MAP, scale=32**-0.5)[0]
    assert problems(given, MAP, out, 32**-0.5) == []


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
            wanted = [a for a in launch.ARCHITECTURES if fmt == "bf16" or (a >= launch.FP8_SINCE and a != 86)]
            assert sorted(map(int, table[f"{fmt}_d{d}"])) == wanted


def test_a_map_that_is_none_is_named():
    with pytest.raises(TypeError, match=r"block_map must be a BlockMap, such as .*; got NoneType"):
        block_sparse_attention(**inputs("bf16", 130, heads=(2, 1)), block_map=None, scale=0.2, backend="reference")
