"""What ``parallelize`` refuses, on every rank and before anything is sent, and that ``restore`` undoes it."""

from unittest import mock

import pytest
import torch
from over_ranks import SIX_TILES
from rank_work import called_again, config_of, layers_seen, model_of, refusal, restored
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import HashStore

import happyhorse_fast as hh
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.parallel.faults import Meeting
from happyhorse_fast.parallel.group import Ranks
from happyhorse_fast.parallel.rows import RowShare

REFUSALS = {
    "heads": "a sequence can be shared by a number of ranks that divides the 1 key/value heads (1), got 2",
    "config": "config.frame_receptive_field must be the same on all 2 ranks, got 1 on rank 0 and 2 on rank 1",
    "acceleration": "fast must be the same on all 2 ranks, got FastConfig(",
    "weights": "weights must be the same on all 2 ranks, got ",
    "shares": "shard_weights must be the same on all 2 ranks, got False on rank 0 and True on rank 1",
    "version": "happyhorse_fast must be the same on all 2 ranks, got 1.0 on rank 0 and 0.0 on rank 1",
    "twice": "model is parallelized already; call restore(model) first",
    "mesh": "mesh must have one dimension, got 2: [1, 2]",
    "accelerate": "model is parallelized already; call restore(model), accelerate(model), then parallelize it",
    "pickle": "a parallelized model does not pickle",
    "compile": "a parallelized model runs as it is, got a call that torch.compile or export traces",
    "shape": "video must be the same on all 2 ranks, got float32 [1, 48, 2, 4, 8]",
    "step": "step must be the same on all 2 ranks, got step 0 of 8 on rank 0 and step 1 of 8 on rank 1",
    "ranges": "local_attn_handler.k_ranges must be the same on all 2 ranks, got ",
    "noise": "video must be the same on all 2 ranks, got float32 [1, 48, 2, 4, 8] with bits that add up to",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_every_rank_refuses(two, what):
    for error in two(refusal, 2, what):
        assert isinstance(error, (ValueError, TypeError)) or what == "compile", error
        assert REFUSALS[what] in str(error)


def test_a_refused_call_is_forgotten(two):
    for said, answered in two(called_again, 2):
        assert "video must be the same on all 2 ranks" in said
        assert answered


@pytest.mark.parametrize("accelerated", [False, True])
def test_restore_undoes_it(two, accelerated):
    assert two(restored, 2, accelerated) == [(True, True)] * 2


@pytest.mark.parametrize("fast", [None, FastConfig(backend="reference")])
def test_on_layer_sees_all_ranks_rows(two, fast):
    for apart in two(layers_seen, 2, fast):
        assert len(apart) == 2
        assert max(apart) <= (0 if fast else 4e-3)


def test_the_capture_of_a_cuda_graph_is_refused():
    with FakeTensorMode():
        video = torch.empty(1, device="cuda")
    ranks = Ranks(None, Meeting(HashStore(), 2, 0, 1.0))
    with (
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
        pytest.raises(ValueError, match="a parallelized model runs as it is, got a call in the capture of a CUDA gr"),
        ranks.call(video=video),
    ):
        raise AssertionError("it ran")


def test_what_is_no_model_and_no_mesh():
    with pytest.raises(TypeError, match=r"model must be a HappyHorse or an accelerated model, got Linear"):
        hh.parallelize(torch.nn.Linear(1, 1), None)
    with pytest.raises(TypeError, match=r"mesh must be a DeviceMesh, .*; got int"):
        hh.parallelize(model_of(config_of(), None), 2)


@pytest.mark.parametrize("total", [1, 5, 128, 769, 6 * 128])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_shares_cover_every_row_once(total, ranks):
    shares = [RowShare(total, 1, ranks, rank) for rank in range(ranks)]
    rows = [row for share in shares for row in range(share.first, share.end) if row < total]
    assert rows == list(range(total))
    assert [min(share.end, total) - min(share.first, total) for share in shares] == list(shares[0].held())
    assert len({share.count for share in shares}) == 1


def test_a_tile_is_not_split():
    assert RowShare(SIX_TILES[0] * 128 + 256, 128, 4, 3).held() == (256, 256, 256, 0)
