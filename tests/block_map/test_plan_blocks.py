"""The choice between the compiled host module and Python: what is chosen, and what is said about it."""

import re
import sys
import sysconfig
import warnings
from importlib.machinery import PathFinder

import pytest
import torch

import happyhorse_fast
from happyhorse_fast.block_map import Layout
from happyhorse_fast.ops import plan_blocks


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_compiled_module_is_there():
    assert plan_blocks.host_module_obstacle() is None


def test_python_takes_over_and_says_so_once(monkeypatch):
    monkeypatch.setattr(plan_blocks, "host_module_obstacle", lambda: "it was sunny")
    plan_blocks._say_once.cache_clear()
    clip = Layout(3, 70, 5, 9)
    with pytest.warns(UserWarning, match="made in Python, .*: it was sunny"):
        block_map = plan_blocks.frame_window(clip, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = plan_blocks.from_ranges([(0, 200)], [(3, 9)], 200, 10)
        schedule = plan_blocks.schedule(block_map.counts[..., 1], 2, 3)
        plan_blocks.frame_window(clip, 1, backend="python")
    monkeypatch.undo()
    assert same(block_map.tensors(), plan_blocks.frame_window(clip, 1, backend="cpp").tensors())
    assert same(again.tensors(), plan_blocks.from_ranges([(0, 200)], [(3, 9)], 200, 10, backend="cpp").tensors())
    assert same(schedule, plan_blocks.schedule(block_map.counts[..., 1], 2, 3, backend="cpp"))


def test_cpp_by_name_is_no_wish(monkeypatch):
    monkeypatch.setattr(plan_blocks, "host_module_obstacle", lambda: "it was sunny")
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot run: it was sunny"):
        plan_blocks.frame_window(Layout(3, 70, 5, 9), 1, backend="cpp")


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
    assert re.search(message, plan_blocks.host_module_obstacle.__wrapped__())
