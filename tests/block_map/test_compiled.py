"""The choice between the compiled host module and Python: what is chosen, and what is said about it."""

import re
import sys
import sysconfig
from importlib.machinery import PathFinder

import pytest
import torch
from logged import logs

import happyhorse_fast
from happyhorse_fast.block_map import BlockMap, from_ranges


def test_the_compiled_module_is_there():
    assert from_ranges.host_module_obstacle() is None


def test_python_takes_over_and_says_so_once(monkeypatch):
    monkeypatch.setattr(from_ranges, "host_module_obstacle", lambda: "it was sunny")
    from_ranges._say_once.cache_clear()
    ranges = [(0, 200), (30, 300)], [(3, 9), (100, 270)], 300, 280
    with logs("made in Python, .*: it was sunny"):
        block_map = BlockMap.from_ranges(*ranges)
    with logs(None):
        BlockMap.from_ranges([(0, 200)], [(3, 9)], 200, 10)
    monkeypatch.undo()
    assert all(map(torch.equal, block_map.tensors(), BlockMap.from_ranges(*ranges).tensors()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "^happyhorse_fast._C is not compiled: .* without a C\\+\\+ compiler$"),
        (b"not a shared object", "^happyhorse_fast._C cannot be loaded: .*(ELF|mach-o|file too short)"),
    ],
)
def test_the_obstacle_says_what_is_wrong(monkeypatch, tmp_path, content, message):
    if content is not None:
        (tmp_path / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(content)
    monkeypatch.setattr(happyhorse_fast, "__path__", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [PathFinder])  # an editable install has one that knows the checkout
    monkeypatch.delattr(happyhorse_fast, "_C", raising=False)
    monkeypatch.delitem(sys.modules, "happyhorse_fast._C", raising=False)
    assert re.search(message, from_ranges.host_module_obstacle.__wrapped__())
