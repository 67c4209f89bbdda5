"""Numbers as arguments: numpy's and torch's count as Python's; what is no number is refused by its type."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_denoiser import Toy, clip

import happyhorse_fast as hh
from happyhorse_fast.arguments import plain_number, real_number, whole_number
from happyhorse_fast.block_map import BlockMap, Layout
from happyhorse_fast.block_map.dynamic import amount
from happyhorse_fast.block_map.tiles import tile_order

TINY = hh.ModelConfig.preset("tiny")
WHOLE: dict[str, Callable[[int], Any]] = {
    "int": int,
    "np.int64": np.int64,
    "np.uint8": np.uint8,
    "np 0-d": np.array,
    "torch 0-d": torch.tensor,
}
REAL: dict[str, Callable[[float], Any]] = {
    "np.float32": np.float32,
    "np.float64": np.float64,
    "np.float16": np.float16,
    "np 0-d": np.array,
    "torch 0-d": torch.tensor,
}
NEITHER = (True, np.True_, torch.tensor(True), "3", None, [3], np.array([3]), torch.tensor([3]), 3 + 0j, Fraction(3))


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_number_of_any_kind_is_an_int(kind: str, tmp_path: Path) -> None:
    n = WHOLE[kind]
    size = hh.tokens_for("256p", seconds=n(5), fps=n(24))
    assert size == hh.tokens_for("256p", seconds=5, fps=24) and all(type(x) is int for x in size)
    config = TINY.replace(num_layers=n(2), hidden_size=n(64), mm_layers=[n(0)], local_attn_layers=[n(1)])
    assert config == TINY.replace(num_layers=2, hidden_size=64, mm_layers=[0], local_attn_layers=[1])
    assert json.loads(json.dumps(config.to_dict()))["num_layers"] == 2
    fast = hh.FastConfig(exact_first_steps=n(2), mlp_rows=n(128), sparsity=hh.Tiles(n(1), n(2), n(3)))
    assert fast == hh.FastConfig(exact_first_steps=2, mlp_rows=128, sparsity=hh.Tiles(1, 2, 3))
    assert type(fast.mlp_rows) is int and type(fast.sparsity.rows) is int  # type: ignore[union-attr]
    model = Toy()
    hh.sample(model, *clip(), steps=n(3), progress=False)
    assert len(model.calls) == 3
    video = hh.super_resolve(Toy(), *clip(), (n(6), n(8)), steps=n(2), noise_index=n(20), progress=False)
    assert video.shape[3:] == (6, 8)
    hh.save_checkpoint({"a": torch.zeros(8)}, tmp_path, max_shard_bytes=n(16))


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, torch.tensor])
def test_a_clip_of_whole_floats_has_whole_sizes(kind: Callable[[float], Any]) -> None:
    size = hh.tokens_for("256p", seconds=kind(5.0), fps=kind(25.0))
    assert size == (32, 16, 28, 126) and all(type(x) is int for x in size)


@pytest.mark.parametrize("kind", WHOLE)
def test_block_maps_take_whole_numbers_of_any_kind(kind: str) -> None:
    n = WHOLE[kind]
    layout = Layout(n(3), n(100), n(20), n(30))
    assert layout == Layout(3, 100, 20, 30) and type(layout.slots) is int
    made = (
        BlockMap.frame_window(layout, n(1)),
        BlockMap.from_ranges([(0, 100)], [(0, 150)], n(200), n(200)),
        BlockMap.tile_window(layout, n(10), (n(1), n(5), n(5)), (n(1), n(1), n(1))),
    )
    wanted = (
        BlockMap.frame_window(Layout(3, 100, 20, 30), 1),
        BlockMap.from_ranges([(0, 100)], [(0, 150)], 200, 200),
        BlockMap.tile_window(layout, 10, (1, 5, 5), (1, 1, 1)),
    )
    for found, expected in zip(made, wanted, strict=True):
        assert type(found.queries) is int
        assert all(map(torch.equal, found.tensors(), expected.tensors()))
    assert tile_order(n(2), n(3), n(4), (n(1), n(2), n(2))).equal(tile_order(2, 3, 4, (1, 2, 2)))
    q = torch.randn(layout.slots, 1, 8)
    assert amount(q, q, len(q), n(2), None, "max") == (2, 0)


@pytest.mark.parametrize("kind", REAL)
def test_a_real_number_of_any_kind_is_a_float(kind: str) -> None:
    x = REAL[kind]
    assert hh.TopK(x(0.25)) == hh.TopK(0.25) and type(hh.TopK(x(0.25)).keep) is float
    assert hh.TopP(x(0.5)) == hh.TopP(0.5) and repr(hh.TopP(x(0.5))) == "TopP(mass=0.5)"
    inputs = clip()
    found, expected = (
        hh.sample(Toy(), *inputs, steps=2, shift=shift, noise=lambda _, s: torch.ones(s), progress=False)
        for shift in (x(2.5), 2.5)
    )
    assert all(map(torch.equal, found, expected))
    hh.super_resolve(Toy(), *inputs, (6, 8), steps=1, audio_noise=x(0.5), progress=False)
    q = torch.randn(128, 1, 8)
    assert amount(q, q, len(q), None, x(0.5), "max") == (0, 2**19)


@pytest.mark.parametrize("value", [*NEITHER, 2.0, 2.5, np.float32(2), float("inf"), float("nan")], ids=repr)
def test_what_is_no_whole_number_is_refused(value: Any) -> None:
    assert whole_number(value) is None
    with pytest.raises((TypeError, ValueError), match="fps must be one of 24, 25"):
        hh.tokens_for("256p", fps=value)
    with pytest.raises(TypeError, match=rf"num_layers must be an integer, .*{type(value).__name__}"):
        TINY.replace(num_layers=value)
    if value is not None:  # the default number of steps
        with pytest.raises(TypeError, match=rf"steps must be an integer, .* of type {type(value).__name__}"):
            hh.sample(Toy(), *clip(), steps=value, progress=False)


@pytest.mark.parametrize("value", NEITHER, ids=repr)
def test_what_is_no_number_is_refused(value: Any) -> None:
    assert real_number(value) is None
    with pytest.raises(ValueError, match="keep must be above 0 and at most 1"):
        hh.TopK(value)
    with pytest.raises(TypeError, match="shift must be a number"):
        hh.sample(Toy(), *clip(), shift=value, progress=False)


def test_a_number_without_a_value_stays_what_it_is() -> None:
    meta = torch.zeros((), device="meta")
    assert plain_number(meta) is meta and whole_number(meta) is None
