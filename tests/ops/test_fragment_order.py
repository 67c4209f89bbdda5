"""The order of e4m3 v's tokens, written out by hand, against the two functions that make and undo it."""

import pytest
import torch

from happyhorse_fast.ops.qkv.reference import quantize_v
from happyhorse_fast.ops.quantize import fragment_order, token_order

PLACES = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
"""Which of 16 tokens is at each place."""


def accumulator(thread):
    """Columns that a thread of a quad holds of 16 columns of a result (PTX ISA, wgmma D fragment)."""
    return [8 * i + 2 * thread + b for i in (0, 1) for b in (0, 1)]


def operand(thread):
    """Columns that a thread of a quad gives of 16 columns of an 8-bit operand (PTX ISA, wgmma A fragment)."""
    return [4 * thread + i for i in range(4)]


def test_places_are_what_a_thread_holds():
    for thread in range(4):
        assert [PLACES[place] for place in operand(thread)] == accumulator(thread)
    assert torch.arange(16)[PLACES].equal(fragment_order(torch.arange(16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_there_and_back(dtype):
    v = torch.randn(2, 32, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    there = fragment_order(v)
    assert there.shape == v.shape and there.is_contiguous()
    for group in range(16):
        for place, token in enumerate(PLACES):
            assert torch.equal(there[..., 16 * group + place].float(), v[..., 16 * group + token].float())
    assert torch.equal(token_order(there).float(), v.float())
    assert torch.equal(fragment_order(token_order(v)).float(), v.float())


def test_codes_of_v_are_in_it():
    v = torch.randn(200, 2, 32, generator=torch.Generator().manual_seed(1))
    codes, scale = quantize_v(v)
    values = token_order(codes).float() * scale.repeat_interleave(128, dim=1)[:, None]
    assert (values.permute(2, 0, 1)[:200] - v).abs().max() <= v.abs().max() / 16
    assert (values[:, :, 200:] == 0).all()
