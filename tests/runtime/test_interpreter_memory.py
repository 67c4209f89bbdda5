"""Triton's interpreter remembers between steps what it would work out anew."""

from __future__ import annotations

import interpreter  # noqa: F401  (exact arithmetic)
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interp

from happyhorse_fast.ops.runtime.triton import interpreter_memory as memory


@triton.jit
def twice(x):
    return tl.zeros_like(x) + 2 * x


@triton.jit
def kernel(x_ptr, STEPS: tl.constexpr):
    at = tl.arange(0, 8)
    for _ in range(STEPS):
        tl.store(x_ptr + at, twice(tl.load(x_ptr + at)))


def described(made: object) -> dict[str, object]:
    """A type or a tensor in words, as its attributes are Triton's own."""
    return {name: repr(x) if name != "shape" else [repr(s) for s in x] for name, x in vars(made).items()}


@pytest.mark.parametrize("shape", [[1], [16], [4, 8], [tl.constexpr(4), 8], [2, 4, 8]], ids=str)
@pytest.mark.parametrize("container", [list, tl.tuple])
def test_types_and_tensors_are_as_shipped(container, shape):
    shape = container(shape)
    for element in (tl.float32, tl.bfloat16, tl.int1, tl.pointer_type(tl.float32)):
        wanted = tl.block_type.__new__(tl.block_type)
        memory._block_as_shipped(wanted, element, shape)
        for _ in range(2):  # the second is remembered
            made = tl.block_type(element, shape)
            assert described(made) == described(wanted)
            assert made == wanted
        handle = interp.TensorHandle(np.zeros(wanted.get_block_shapes().values, np.uint64), tl.pointer_type(tl.int8))
        tensor = tl.tensor.__new__(tl.tensor)
        memory._tensor_as_shipped(tensor, handle, wanted)
        for _ in range(2):
            assert described(tl.tensor(handle, made)) == described(tensor)


def test_shapes_are_still_checked():
    tl.block_type(tl.int32, [1, 2])
    bad = [([3], ValueError), ([1.0, 2], TypeError), ([2**21], ValueError), ([], TypeError), ((1, 2), AssertionError)]
    for shape, error in bad * 2:
        with pytest.raises(error):
            tl.block_type(tl.int32, shape)


def test_dtypes_are_as_shipped():
    names = (
        "int1 int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64 bfloat16 float8e5 float8e4nv"
    )
    elements = [*(getattr(tl, name) for name in names.split()), tl.pointer_type(tl.float32)]
    for a in elements:
        for made in (a, tl.block_type(a, [4])):
            assert [memory.np_dtype(made) for _ in range(2)] == [memory._np_dtype_as_shipped(made)] * 2


def test_the_language_is_searched_once_a_launch(monkeypatch):
    searched = []
    shipped = interp._patch_builtin
    monkeypatch.setattr(interp, "_patch_builtin", lambda *a: searched.append(a[0]) or shipped(*a))
    load = tl.load
    counts = []
    for steps in (1, 1, 6):  # the first one rewrites the functions, too
        searched.clear()
        x = torch.ones(8)
        kernel[(2,)](x, STEPS=steps)
        assert torch.equal(x, torch.full((8,), 4.0**steps))
        assert tl.load is load, "and put back"
        counts.append(len(searched))
    assert counts[1] == counts[2] > 0
