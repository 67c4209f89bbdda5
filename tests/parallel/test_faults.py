"""A rank that dies, hangs or fails ends the others within the time-out, and its name is in their error."""

import time

import pytest
from rank_pool import rank_pool
from rank_work import cancelled, comes_late, fails_at_layer
from torch.distributed import HashStore, TCPStore

from happyhorse_fast.parallel.faults import Meeting, RankError

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
