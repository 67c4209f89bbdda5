"""The residual epilogue where the memory adds: the bits of load, add and store, and when it is taken."""

import math
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import triton.runtime.interpreter as interp
from linear_cases import ROWS, Case, run_epilogue
from strict import permuted_grid, strict
from test_int8_products import int8_case

from bench.hopper import running
from happyhorse_fast.kernels.launch import config_for, illegal, table
from happyhorse_fast.ops.linear import op as ops
from happyhorse_fast.ops.linear import triton as launcher
from happyhorse_fast.ops.runtime import self_check
from happyhorse_fast.ops.runtime.triton.device import pretend

SIZES = ((130, 57, 1), (127,), (256,), ROWS[3])
"""Experts that end inside a tile, before another's rows and at N, and some that do not."""


@pytest.fixture
def descriptors(monkeypatch):
    """Launch through descriptors, which the interpreter takes, and count those that are made."""
    monkeypatch.setattr(launcher, "descriptors_work", lambda *_: True)
    made = mock.Mock(wraps=launcher.TensorDescriptor)
    monkeypatch.setattr(launcher, "TensorDescriptor", made)
    return made.from_tensor


def choose(monkeypatch, **fields):
    config = replace(config_for("linear", "fp8_residual", 90), block_k=64, hopper=False, **fields)
    monkeypatch.setattr(launcher, "config_of", lambda *_: config)


def both(case, monkeypatch):
    """(added by load, add and store; by the memory)."""
    results = []
    for reduce in (False, True):
        choose(monkeypatch, reduce=reduce)
        with strict(seed=3):
            results.append(run_epilogue(case, "residual"))
    return results


@pytest.mark.quick(7)
@pytest.mark.parametrize("fmt", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("width", [384, 200])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_memory_adds_the_same_bits(sizes, width, fmt, descriptors, monkeypatch):
    case = int8_case(sizes, width, 96) if fmt == "int8" else Case(sizes, width, 96, fmt == "fp8")
    for i, value in enumerate((-0.0, 0.0, math.inf, math.nan, 3e38, 1e-30)):
        case.hidden[i::11, ::7] = value
    loaded, added = both(case, monkeypatch)
    assert descriptors.call_count == 2 + 3
    assert torch.equal(loaded.view(torch.int32), added.view(torch.int32))


def test_rows_of_another_expert_keep_their_bits(descriptors, monkeypatch):
    """The first expert's last tile reaches over 126 rows that no tile of this launch writes."""
    case = Case((130, 200), 256, 64, fp8=True)
    case.hidden[130::2] = -0.0
    case.tiles = case.tiles[case.tiles[:, 0] == 0]
    choose(monkeypatch, reduce=True)
    hidden = run_epilogue(case, "residual")
    assert torch.equal(hidden[130:].view(torch.int32), case.hidden[130:].view(torch.int32))


def test_the_order_of_programs_changes_no_bit(descriptors, monkeypatch):
    case = Case((130, 57, 1), 384, 96, fp8=True)
    choose(monkeypatch, reduce=True)
    results = []
    for seed in range(3):
        with permuted_grid(seed):
            results.append(run_epilogue(case, "residual").view(torch.int32))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_wrong_reduction_is_seen(descriptors, monkeypatch):
    case = Case((130, 57), 384, 96, fp8=True)
    builder = interp.InterpreterBuilder
    right = builder.create_descriptor_reduce

    def stored(self, kind, desc, value, indices):
        self.create_descriptor_store(desc, value, indices)

    def twice(self, *given):
        right(self, *given)
        right(self, *given)

    def moved(self, kind, desc, value, indices):
        column = interp.TensorHandle(indices[1].data * 0, indices[1].dtype)
        right(self, kind, desc, value, [indices[0], column])

    for wrong in (stored, twice, moved):
        monkeypatch.setattr(builder, "create_descriptor_reduce", wrong)
        loaded, added = both(case, monkeypatch)
        assert not torch.equal(loaded, added), wrong.__name__


def test_no_other_reduction_is_known():
    with pytest.raises(NotImplementedError, match="does not know the reduction MAX"):
        interp.InterpreterBuilder.create_descriptor_reduce(None, "MAX", None, None, None)


@pytest.mark.parametrize("fmt", ["bf16", "fp8", "int8"])
def test_the_self_check_sees_what_reaches_another_experts_rows(fmt, descriptors, monkeypatch):
    choose(monkeypatch, reduce=True)

    def judged():
        return self_check._judge(self_check.CHECKS["fp8_linear_residual"]("triton", torch.device("cpu"), fmt))[0]

    assert judged()
    right = interp.InterpreterBuilder.create_descriptor_reduce

    def something(self, kind, desc, value, indices):
        nothing = (value.data == 0) & np.signbit(value.data)
        value = interp.TensorHandle(np.where(nothing, np.float32(0.1), value.data), value.dtype)
        right(self, kind, desc, value, indices)

    monkeypatch.setattr(interp.InterpreterBuilder, "create_descriptor_reduce", something)
    assert not judged()


@pytest.mark.parametrize(
    ("width", "offset", "made"), [(200, 0, 3), (200, 1, 2), (202, 0, 2)], ids=["aligned", "start", "stride"]
)
def test_residual_streams_off_16_bytes_are_loaded_and_stored(width, offset, made, monkeypatch):
    case = Case((130, 57), width, 96, fp8=True)
    buffer = torch.zeros(case.hidden.numel() + offset)
    hidden = buffer[offset:].view_as(case.hidden).copy_(case.hidden)
    counted = mock.Mock(wraps=launcher.TensorDescriptor)
    monkeypatch.setattr(launcher, "TensorDescriptor", counted)
    with pretend(90), running("triton"), strict():
        ops.fp8_linear_residual(*case.arguments, hidden)
    assert counted.from_tensor.call_count == made
    expected = run_epilogue(case, "residual", backend="reference")
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)


def test_only_architectures_with_descriptors_reduce():
    reducing = {(v, int(a)) for v, of in table("linear").items() for a, f in of.items() if f.get("reduce")}
    assert reducing == {(f"{fmt}_residual", arch) for fmt in ("bf16", "fp8") for arch in (90, 100)} | {
        ("int8_residual", 90)
    }
    config = config_for("linear", "fp8_residual", 90)
    assert illegal(config, 90, fp8=True, shared_bytes=229_408) is None
    wrong = replace(config, descriptors=False)
    assert (
        illegal(wrong, 90, fp8=True, shared_bytes=0) == "reduce goes through TMA descriptors, and descriptors is False"
    )
