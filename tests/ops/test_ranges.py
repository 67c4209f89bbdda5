"""NVTX ranges around the ops: none unless asked for, and then one for every op."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch

from happyhorse_fast import ops
from happyhorse_fast.ops.runtime import ranges


def product(x, y=1):
    if y == 0:
        raise ZeroDivisionError
    return x * y


@pytest.fixture
def pushed(monkeypatch):
    """Ranges as they open and close."""
    seen = []
    monkeypatch.setenv(ranges.VARIABLE, "1")
    monkeypatch.setattr(ranges.nvtx, "range_push", seen.append)
    monkeypatch.setattr(ranges.nvtx, "range_pop", lambda: seen.append("pop"))
    ranges._has_nvtx.cache_clear()
    yield seen
    ranges._has_nvtx.cache_clear()


def test_without_the_variable_an_op_is_itself(monkeypatch):
    for value in (None, "", "0"):
        monkeypatch.delenv(ranges.VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(ranges.VARIABLE, value)
        assert ranges.ranged(product) is product
    monkeypatch.setenv(ranges.VARIABLE, "yes")
    with pytest.raises(ValueError, match="HAPPYHORSE_FAST_NVTX must be 0 or 1, got 'yes'"):
        ranges.ranged(product)


def test_with_it_a_call_is_a_range_that_closes(pushed):
    op = ranges.ranged(product)
    pushed.clear()
    assert torch.equal(op(torch.ones(2, 3), y=2), torch.full((2, 3), 2.0))
    with pytest.raises(ZeroDivisionError):
        op(torch.ones(1), y=0)
    assert pushed == ["happyhorse_fast::product [2, 3]", "pop", "happyhorse_fast::product [1]", "pop"]


def test_a_torch_without_nvtx_is_told_once(monkeypatch, caplog):
    def missing(message):
        raise RuntimeError("NVTX functions not installed")

    monkeypatch.setenv(ranges.VARIABLE, "1")
    monkeypatch.setattr(ranges.nvtx, "range_push", missing)
    ranges._has_nvtx.cache_clear()
    with caplog.at_level(logging.WARNING, logger="happyhorse_fast"):
        assert ranges.ranged(product) is product and ranges.ranged(product) is product
    ranges._has_nvtx.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "HAPPYHORSE_FAST_NVTX is set, and there are no ranges: NVTX functions not installed"
    ]


def test_every_op_has_one():
    code = """
import importlib, json, pkgutil
from happyhorse_fast.ops.runtime import ranges
made, ranged = [], ranges.ranged
ranges.ranged = lambda implementation: made.append(implementation.__name__) or ranged(implementation)
from happyhorse_fast import ops
for module in pkgutil.walk_packages(ops.__path__, "happyhorse_fast.ops."):
    importlib.import_module(module.name)
import torch
registered = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("happyhorse_fast::")]
print(json.dumps([made, registered]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    made, registered = json.loads(done.stdout)
    registered.remove("happyhorse_fast::float32_product")  # the eager model's
    assert len(made) == len(registered)
    assert set(made) == {name for name, module in ops._WHERE.items() if module.endswith(".op")}


def test_a_compiled_graph_has_them_too():
    code = """
import torch
from torch.cuda import nvtx
seen = []
nvtx.range_push, nvtx.range_pop = seen.append, lambda: None
from happyhorse_fast import ops
def call(x):
    return ops.quantize_rows(x, False, backend="reference")
call(torch.ones(2, 64, dtype=torch.bfloat16))
torch.compile(call, backend="eager", fullgraph=True)(torch.ones(3, 64, dtype=torch.bfloat16))
print(seen)
"""
    environment = os.environ | {ranges.VARIABLE: "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    named = [f"happyhorse_fast::quantize_rows [{rows}, 64]" for rows in (2, 3)]
    assert done.stdout == f"{['happyhorse_fast', *named]}\n"
