"""The choice of blocks as an op: launches, tracing, shapes, errors."""

import pytest
import torch
import triton.runtime.interpreter as interp
from cuda_shim import SHIM
from select_cases import ALIGNED, FP8, KERNELS, SCORES, inputs, selector
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from happyhorse_fast.block_map import BLOCK, BlockMap, BlockSelector
from happyhorse_fast.fast.launches import LaunchCounter
from happyhorse_fast.ops import select_blocks
from happyhorse_fast.ops.block_selection import cuda as cuda_launcher
from happyhorse_fast.ops.block_selection import reference
from happyhorse_fast.ops.block_selection import triton as launcher
from happyhorse_fast.ops.block_selection.contract import LAUNCHES

# The op ---------------------------------------------------------------------------------------------------------------


class NoSync(TorchDispatchMode):
    """Fails on what waits for the device, or would: the value or the place of an element on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(n in str(func) for n in ("_local_scalar_dense", "nonzero", "masked_select", "unique")), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", [launcher.select_blocks, cuda_launcher.select_blocks, reference.select_blocks])
def test_no_wait_for_the_device(op):
    given, tensors = inputs(), selector().tensors()
    for amount in ((2, 0), (0, 2**19)):
        with NoSync():
            op._init_fn(*given.values(), *tensors, None, None, *amount, False)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        given["q"].sum().item()


@pytest.mark.parametrize("amount", [(2, 0), (0, 2**19)])
def test_the_op_launches_what_it_declares(amount, monkeypatch):
    launched = []
    # In place of running them, which copies every argument.
    monkeypatch.setattr(interp.GridExecutor, "__call__", lambda self, *_, **__: launched.append(self.fn.__name__))
    given, tensors = inputs(), selector().tensors()
    with LaunchCounter() as counter:
        launcher.select_blocks._init_fn(*given.values(), *tensors, None, None, *amount, False)
    assert counter.names == []
    assert len(set(launched)) == len(launched) == LAUNCHES["happyhorse_fast::select_blocks"]


@pytest.mark.parametrize("amount", [(2, 0), (0, 2**19)])
def test_the_cuda_op_launches_what_it_declares(amount, monkeypatch):
    monkeypatch.setattr(SHIM, "launches", [])
    given, tensors = inputs(), selector().tensors()
    with LaunchCounter() as counter:
        cuda_launcher.select_blocks._init_fn(*given.values(), *tensors, None, None, *amount, False)
    assert counter.names == []
    assert len(set(SHIM.launches)) == len(SHIM.launches) == LAUNCHES["happyhorse_fast::select_blocks_cuda"]


@pytest.mark.parametrize("fmt", SCORES)
def test_opcheck(fmt):
    given = inputs(fmt=fmt)
    scales = given.get("q_scale"), given.get("k_scale")
    arguments = (given["q"], given["k"], *selector().tensors(), *scales, 2, 0, False)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if fmt != "fp8":  # test_schema multiplies every input, which torch 2.13 does not do for e4m3 on the CPU
        checks.append("test_schema")
    for name in LAUNCHES:
        op = getattr(torch.ops.happyhorse_fast, name.removeprefix("happyhorse_fast::"))
        torch.library.opcheck(op.default, arguments, test_utils=checks)


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_compiles_as_one_graph(backend):
    chooser, given = selector(), inputs()

    def tensors(q, k):
        return select_blocks(q, k, chooser, mass=0.5, backend=backend).tensors()

    compiled = torch.compile(tensors, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(**given), tensors(**given), strict=True):
        assert torch.equal(a, b)


def unmade_selector(blocks):
    """A selector of shapes alone, dense, on the device that is current."""
    made = BlockSelector.__new__(BlockSelector)
    n, one = blocks * BLOCK, torch.empty(1, dtype=torch.int32)
    shapes = ((1, blocks, 2), (1, blocks), (blocks**2,), (blocks**2,), (1, BLOCK, 4), (blocks,))
    made.base = BlockMap(*(one.new_empty(s) for s in shapes), queries=n, keys=n)
    made.table, made.inverse = one.new_empty(blocks, blocks), torch.empty(blocks)
    made.prefix, made.live = torch.empty(blocks, dtype=torch.int8), torch.empty(n, dtype=torch.int8)
    return made


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
@pytest.mark.parametrize("fmt", SCORES)
def test_fake_tensors_have_the_shapes_of_a_15b_layer(fmt, backend):
    with FakeTensorMode(), torch.device("cuda"):
        blocks, dtype = 1464, {"bf16": torch.bfloat16, "int8_qk": torch.int8, "fp8": FP8}[fmt]
        q, k = (torch.empty(blocks * BLOCK, h, 128, dtype=dtype) for h in (40, 8))
        shapes = {"bf16": (), "int8_qk": ((blocks * BLOCK, 40), (8, blocks)), "fp8": ((blocks,), (blocks,))}[fmt]
        scales = dict(zip(("q_scale", "k_scale"), map(torch.empty, shapes), strict=False))
        made = select_blocks(q, k, unmade_selector(blocks), keep=300, **scales, backend=backend)
    assert made.counts.shape == (8, blocks, 2) and made.order.shape == (8 * blocks,)
    assert made.columns.shape == made.mask_ids.shape == (8 * blocks**2,)
    assert {t.dtype for t in made.tensors()} == {torch.int32} and made.device.type == "cuda"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(1024, 2, 32)}, TypeError, "q must be bfloat16, int8 or float8_e4m3fn, got torch.float32"),
        ({"k": torch.zeros(1024, 1, 32).to(FP8)}, TypeError, "k must be of q's dtype"),
        ({"q": torch.zeros(1023, 2, 32).bfloat16()}, ValueError, r"q must be \[1024, heads, D\], got \[1023, 2, 32\]"),
        ({"k": torch.zeros(1024, 4, 32).bfloat16()}, ValueError, "q must have a multiple of k's heads"),
        ({x: torch.zeros(1024, 1, 48).bfloat16() for x in "qk"}, ValueError, "head dim of 32, 64 or 128; got 48"),
        ({"q_scale": torch.ones(8)}, ValueError, "q_scale must be given exactly where"),
        ({"keep": 0}, ValueError, "keep must be at least 1, got 0"),
        ({"keep": None, "mass": 1.5}, ValueError, "0 < mass <= 1, got 1.5"),
        ({"mass": 0.5}, ValueError, "exactly one of keep and mass must be given, got keep=2 and mass=0.5"),
        ({"pool": "min"}, ValueError, 'pool must be "max" or "mean", got \'min\''),
        ({"backend": "cpu"}, ValueError, "backend must be 'triton' or 'cuda' or 'reference', got 'cpu'"),
        ({"q": torch.zeros(1024, 2, 32, device="meta").bfloat16()}, ValueError, "on q's device meta"),
    ],
)
def test_what_the_kernel_cannot_take_is_named(change, error, message):
    with pytest.raises(error, match=message):
        select_blocks(**({**inputs(), "selector": selector(), "keep": 2} | change))


def test_scales_of_another_size_and_too_many_blocks_are_named():
    given = inputs(fmt="fp8")
    with pytest.raises(ValueError, match=r"k_scale must be of size 8 in dimension 0 of \[8\], got \[7\]"):
        select_blocks(**given | {"k_scale": torch.ones(7)}, selector=selector(), keep=2)
    given = inputs(fmt="int8_qk")
    with pytest.raises(ValueError, match=r"q_scale must have 2 dimensions \[1024, 2\], got 1: \[8\]"):
        select_blocks(**given | {"q_scale": torch.ones(8)}, selector=selector(), keep=2)
    with pytest.raises(ValueError, match=r"k_scale must have 2 dimensions \[1, 8\], got 1: \[8\]"):
        select_blocks(**given | {"k_scale": torch.ones(8)}, selector=selector(), keep=2)
    with pytest.raises(ValueError, match=r"k_scale must be given exactly where k has 8 bits; .* got none"):
        select_blocks(**given | {"k_scale": None}, selector=selector(), keep=2)
    with FakeTensorMode():
        x, chooser = torch.empty(2049 * BLOCK, 1, 32, dtype=torch.bfloat16), unmade_selector(2049)
        with pytest.raises(ValueError, match=r"at most 2048 blocks and fewer than .* got 2049 blocks"):
            select_blocks(x, x, chooser, keep=2)


def test_a_selector_says_what_it_cannot_take():
    with pytest.raises(ValueError, match="one map for all heads, got one for each of 2"):
        BlockSelector(ALIGNED, select_blocks(**inputs(heads=(2, 2)), selector=selector(), keep=1), "cpu")
