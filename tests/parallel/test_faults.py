"""A rank that dies, hangs or fails ends the others within the time-out, and its name is in their error."""

import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rank_pool import rank_pool
from rank_work import cancelled, comes_late, fails_at_layer
from torch._subclasses import FakeTensorMode
from torch.distributed import HashStore, TCPStore

from happyhorse_fast.parallel import group
from happyhorse_fast.parallel.faults import Meeting, RankError
from happyhorse_fast.parallel.group import Ranks

TIMEOUT = 3.0


def errors(ranks, work, *args):
    with rank_pool(ranks) as pool:
        start = time.monotonic()
        for pipe in pool.pipes:
            pipe.send((work, (ranks, *args), {}))
        found = {rank: pool.answer(rank, 60) for rank in range(ranks) if rank != 1}
        return found, time.monotonic() - start


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("dies", "rank 1 died or hangs"),
        ("hangs", "rank 1 died or hangs"),
        ("raises", "rank 1 failed: MemoryError: no memory left"),
    ],
)
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_others_name_it(ranks, how, said):
    found, seconds = errors(ranks, fails_at_layer, 1, how, TIMEOUT)
    for rank, error in found.items():
        assert isinstance(error, RankError), error
        assert said in str(error)
        assert f"Seen by rank {rank} of {ranks}" in str(error)
    assert seconds < 60


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named():
    found, _ = errors(2, comes_late, 1, TIMEOUT)
    assert "rank 1 died or hangs, no answer within 3 s" in str(found[0])


def test_a_run_that_one_rank_ends_between_two_steps_ends_for_all(two):
    found = two(cancelled, 2, 1)
    assert isinstance(found[0], RankError)
    assert "rank 1 failed: InterruptedError: enough after step 1" in str(found[0])
    assert isinstance(found[1], InterruptedError)


def test_what_a_gpu_never_finishes_is_ended_by_the_host():
    # As a stream that waits for a dead rank: nothing raises, the event is never reached.
    meeting = Meeting(HashStore(), 2, 0, 0.2)
    with meeting.call(), pytest.raises(RankError, match=r"rank 1 died or hangs, no answer within 0\.2 s"):
        meeting.until(lambda: False)


def test_a_group_without_a_backends_name_is_watched_as_well(monkeypatch):
    # As init_device_mesh("cpu", ...) makes it where nobody called init_process_group.
    monkeypatch.setattr(dist, "get_backend", lambda of: "undefined")
    ranks = Ranks(None, Meeting(HashStore(), 2, 0, 0.2))
    work = SimpleNamespace(is_completed=lambda: False, wait=lambda: pytest.fail("waits for gloo's half an hour"))
    with ranks.meeting.call(), pytest.raises(RankError, match=r"rank 1 died or hangs, no answer within 0\.2 s"):
        ranks.arrived(work, torch.zeros(1))


def test_a_call_ends_when_the_gpu_of_its_inputs_has_ended(monkeypatch):
    # Of two GPUs; the current device is the other one.
    event, streams = mock.Mock(**{"query.side_effect": [False, True]}), []
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams.append(device))
    monkeypatch.setattr(group, "said_of", lambda value: "")
    with FakeTensorMode(), Ranks(None, Meeting(HashStore(), 1, 0, 60.0)).call(x=torch.empty(1, device="cuda:1")):
        assert not event.query.called
    assert streams == [torch.device("cuda:1")] and event.query.call_count == 2


def test_what_rank_0_says_may_be_larger_than_a_value_of_the_store():
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    here, there = Meeting(store, 2, 0, 60), Meeting(store, 2, 1, 60)
    keys, messages = store.num_keys(), (bytes(9 << 20), b"done", b"")
    for message in messages:
        here.from_first(message)
    assert all(there.from_first() == message for message in messages)
    assert store.num_keys() == keys, "what all have heard stays in the store"


def test_another_ranks_error_ends_the_wait_at_once():
    store = HashStore()
    here, there = Meeting(store, 2, 0, 60), Meeting(store, 2, 1, 60)
    with pytest.raises(MemoryError), there.call():
        raise MemoryError("no memory left")
    start = time.monotonic()
    with here.call(), pytest.raises(RankError, match="rank 1 failed: MemoryError: no memory left"):
        here.until(lambda: False)
    assert time.monotonic() - start < 20
