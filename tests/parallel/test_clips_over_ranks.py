"""Clips dealt out to ranks, two of which may share one."""

from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from rank_pool import rank_pool
from rank_work import clips_of_pairs, config_of, model_of, sampled_by

import happyhorse_fast as hh
from happyhorse_fast.fast.config import FastConfig


def mesh(rank, ranks):
    return SimpleNamespace(ndim=1, get_local_rank=lambda: rank, size=lambda: ranks)


@pytest.mark.parametrize(("clips", "ranks"), [("", 2), ("abc", 1), ("abc", 2), ("abc", 8), ("abcdefgh", 3)])
def test_every_clip_is_made_once(clips, ranks):
    shares = [hh.clips_of_rank(clips, mesh(rank, ranks)) for rank in range(ranks)]
    assert sorted(chain(*shares)) == list(enumerate(clips))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_mesh_of_two_dimensions_is_refused():
    several = SimpleNamespace(ndim=2, mesh=np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"mesh must have one dimension, got 2: \[2, 4\]"):
        hh.clips_of_rank("abc", several)


@pytest.mark.slow
def test_two_pairs_of_ranks_make_three_clips():
    fast = FastConfig(backend="reference")
    alone = [sampled_by(model_of(config_of(2), fast), seed, "generator", False) for seed in (7, 8, 9)]
    with rank_pool(4) as pool:
        found = pool(clips_of_pairs, fast)
    assert [sorted(made) for made in found] == [[0, 2], [0, 2], [1], [1]]
    for made in found:
        assert all(all(map(np.array_equal, alone[place], latents)) for place, latents in made.items())
