"""Launches per layer: counted on a small clip, held against the budget, and the counter shown to see what it should."""

import pytest
import torch

from happyhorse_fast.block_map.dynamic import choose
from happyhorse_fast.fast import launches
from happyhorse_fast.fast.clip_state import SparsePolicy
from happyhorse_fast.fast.config import FastConfig, Tiles, TopK, TopP
from happyhorse_fast.fast.launches import LaunchCounter, launches_per_layer
from happyhorse_fast.ops.block_selection.contract import LAUNCHES

EXACT, DYNAMIC = 9, 15
# What fp8 has more: the largest of v and of the gate, and four launches that write one number each, for the scales of
# attention's output and of the activation's; 65 us of a layer's 120 ms, 50 of them for v (predicted).
SCALES = 6


def most(fast):
    return max(len(names) for names in launches_per_layer(fast))


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("sparsity", [None, Tiles(1, 1, 1)])
def test_exact_and_static_masks(precision, sparsity):
    scale = SCALES if precision == "fp8" else 0
    assert most(FastConfig(precision=precision, sparsity=sparsity)) - scale == 7 <= EXACT


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("sparsity", [TopK(0.5), TopP(0.5)])
def test_dynamic_masks(precision, sparsity):
    counts = launches_per_layer(FastConfig(precision=precision, sparsity=sparsity))
    scale = SCALES if precision == "fp8" else 0
    assert max(map(len, counts)) - scale == 7 + LAUNCHES["happyhorse_fast::select_blocks"] <= DYNAMIC
    for names in counts:
        first, last = (i for i, name in enumerate(names) if "qkv_linear" in name or "attention" in name)
        assert last - first - 1 - scale <= 8, "between the QKV product and attention"


def test_a_map_made_by_plain_torch_is_past_the_budget(monkeypatch):
    def plain(self, x, backend):
        return self.selector.base.within(choose(x.q, x.k, *self.selector.tensors(), x.q_scale, x.k_scale, 2, 0, False))

    monkeypatch.setattr(SparsePolicy, "map", plain)
    assert most(FastConfig(sparsity=TopK(0.5))) > DYNAMIC


def test_a_declared_number_counts(monkeypatch):
    monkeypatch.setitem(launches.LAUNCHES, "happyhorse_fast::select_blocks_reference", 9)
    assert most(FastConfig(sparsity=TopP(0.5))) == 16 > DYNAMIC


def test_views_and_allocations_are_free_and_arithmetic_is_not():
    counter = LaunchCounter()
    x = torch.ones(4, 4)
    with counter:
        torch.empty_like(x).view(16)[2:].unsqueeze(0)
        assert counter.names == []
        (x + 1).sum()
    assert counter.names == ["aten::add", "aten::sum"]
