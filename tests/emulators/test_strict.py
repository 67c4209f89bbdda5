"""Each check of the strict interpreter catches the bug it is for, and passes the same kernel without it."""

import contextlib

import pytest
import torch
import triton
import triton.language as tl
from strict import checked_memory, checked_overflow, permuted_grid, poisoned_outputs, strict
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK = 16


@triton.jit
def copy(x_ptr, y_ptr, n, LOAD_MASK: tl.constexpr, STORE_MASK: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=(at < n) & (n > 0), other=0.0) if LOAD_MASK else tl.load(x_ptr + at)
    if STORE_MASK:
        tl.store(y_ptr + at, x, mask=at < n)
    else:
        tl.store(y_ptr + at, x)


@triton.jit
def last_writer(y_ptr):
    tl.store(y_ptr, tl.program_id(0) * 100 + tl.program_id(1) * 10 + tl.program_id(2))


@triton.jit
def count(y_ptr):
    at = y_ptr + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    tl.store(at, tl.load(at) + 1)


@triton.jit
def copy_rows(x_ptr, y_ptr, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    column = tl.arange(0, BLOCK)
    tl.store(y_ptr + tl.program_id(0) * BLOCK + column, tl.load(x_ptr + row * stride + column))


@triton.jit
def copy_described(x, y_ptr, n, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK), x.load([n]))


@triton.jit
def add_and_swap(y_ptr, at):
    tl.atomic_add(y_ptr + at, 1)
    tl.atomic_cas(y_ptr + at, 1, 5)


def run_copy(x, y, *, load_mask=True, store_mask=True):
    copy[triton.cdiv(y.numel(), BLOCK),](x, y, y.numel(), load_mask, store_mask, BLOCK)


@pytest.mark.parametrize("bug", [None, "load_mask", "store_mask"])
def test_an_access_past_an_argument_is_caught(bug):
    x, y = torch.randn(2, 20), torch.empty(20)
    masks = {} if bug is None else {bug: False}
    with contextlib.ExitStack() as stack:
        if bug:
            stack.enter_context(pytest.raises(InterpreterError, match=rf"{bug.partition('_')[0]} outside .*float32"))
        with checked_memory():
            # A view, so that its storage goes on behind it.
            run_copy(x[0], y, **masks)
    if bug is None:
        torch.testing.assert_close(y, x[0], rtol=0, atol=0)


def test_an_argument_is_told_from_its_neighbour_in_memory():
    both = torch.zeros(2 * BLOCK)
    with checked_memory(), pytest.raises(InterpreterError, match="load outside"):
        run_copy(both[:8], both[8 : 8 + BLOCK])


def test_atomics_are_checked():
    y = torch.zeros(3, dtype=torch.int32)
    with checked_memory():
        add_and_swap[1,](y, 2)
        assert y.tolist() == [0, 0, 5]
        with pytest.raises(InterpreterError, match="atomic outside"):
            add_and_swap[1,](y, 3)


def test_strided_and_described_arguments_pass():
    y = torch.empty(2, BLOCK)
    x = torch.randn(2, 3 * BLOCK)[:, :BLOCK]
    with strict():
        copy_rows[2,](x, y, x.stride(0), True, BLOCK)
        torch.testing.assert_close(y, x, rtol=0, atol=0)
        vector = torch.randn(40)
        # 8 elements are left of the descriptor at 32: it gives zeros past its shape, which is no access.
        copy_described[1,](TensorDescriptor(vector, [40], [1], [BLOCK]), y[0], 32, BLOCK)
    torch.testing.assert_close(y[0], torch.nn.functional.pad(vector[32:], (0, 8)), rtol=0, atol=0)


def test_the_order_of_programs_is_permuted_and_complete():
    seen = set()
    for seed in range(4):
        y, counts = torch.zeros(1, dtype=torch.int32), torch.zeros(2, 3, 4, dtype=torch.int32)
        with permuted_grid(seed):
            last_writer[2, 3, 4](y)
            count[2, 3, 4](counts)
        assert counts.eq(1).all()
        seen.add(int(y))
    assert len(seen) > 1, "a race on one element looks the same in every order"
    last_writer[2, 3, 4](y)
    assert int(y) == 123, "the order is not restored"


@pytest.mark.parametrize("wide", [True, False])
def test_an_int32_offset_past_2_31_is_caught(wide):
    stride = 2**31 - 8  # two rows take 4 GiB of addresses, of which two pages are touched
    x = torch.empty_strided((3, BLOCK), (stride, 1), dtype=torch.uint8)
    x[2] = 7
    y = torch.empty(3, BLOCK, dtype=torch.uint8)
    with contextlib.nullcontext() if wide else pytest.raises(InterpreterError, match="overflow"), checked_overflow():
        copy_rows[3,](x, y, stride, wide, BLOCK)
    if wide:
        assert y[2].eq(7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_an_unwritten_output_is_nan(dtype):
    x = torch.ones(BLOCK)
    with poisoned_outputs():
        outputs = [torch.empty(2 * BLOCK, dtype=dtype), x.new_empty(2 * BLOCK, dtype=dtype)]
        outputs.append(torch.empty_like(outputs[0]))
        assert int(torch.empty(1, dtype=torch.int32)) == 2**31 - 1
    for y in outputs:
        y[:BLOCK] = x.to(dtype)
        assert y.float()[:BLOCK].eq(1).all()
        assert y.float()[BLOCK:].isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
