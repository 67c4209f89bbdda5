"""The compiled host module against Python's version, bit for bit: block maps, sizes, threads, speed."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import torch
from fuzz import examples
from host_cases import (
    FAR,
    FORMS,
    LONGEST,
    any_ranges,
    arrays,
    good_ranges,
    in_form,
    int64,
    milliseconds,
    outcome,
    same,
    window_ranges,
)
from hypothesis import given
from hypothesis import strategies as st

from happyhorse_fast import _C  # a checkout is built with it, so these tests fail where it is missing
from happyhorse_fast.block_map import BlockMap, from_ranges
from happyhorse_fast.eager.sequence import Clip

MOST = 2**31 - 1


def python(*ranges):
    """The map as it is made where there is no compiled module."""
    with mock.patch.object(from_ranges, "host_module_obstacle", return_value="it is not asked"):
        return BlockMap.from_ranges(*ranges)


# Maps from ranges -----------------------------------------------------------------------------------------------------


@examples(300)
@given(good_ranges(), FORMS)
def test_maps_from_ranges_are_pythons(case, form):
    q, k, queries, keys = case
    expected = outcome(lambda: python(q, k, queries, keys))
    assert not isinstance(expected, str)
    assert same(outcome(lambda: _C.from_ranges(int64(q), int64(k), queries, keys)), expected)
    q, k = in_form(q, form), in_form(k, form)
    assert same(outcome(lambda: BlockMap.from_ranges(q, k, queries, keys)), expected)


@examples(200)
@given(any_ranges((*FAR, 2**63, 2**64, 10**30, 0.5, float("nan"), None, "1")), FORMS)
def test_errors_of_anything_are_pythons(case, form):
    q, k, queries, keys = case
    if all(isinstance(x, int) for row in (*q, *k) for x in row):
        q, k = in_form(q, form), in_form(k, form)
    expected = outcome(lambda: python(q, k, queries, keys))
    assert same(outcome(lambda: BlockMap.from_ranges(q, k, queries, keys)), expected)


@pytest.mark.parametrize(
    ("q", "k"),
    [
        ([], []),
        ([], [(0, 1)]),
        (np.zeros((2, 0)), [(0, 1), (0, 1)]),
        ([0, 10], [(0, 1)]),
        ([(0, 1, 2)], [(0, 1)]),
        ([(0.0, 10.0)], [(0, 1)]),
        (torch.tensor([[float("nan"), 1.0]]), [(0, 1)]),
        ([(0, 1), (0,)], [(0, 1)]),
        (torch.tensor([[True, True]]), [(0, 1)]),
        (np.zeros((1, 2), dtype=np.complex64), [(0, 1)]),
        (7, [(0, 1)]),
        (None, [(0, 1)]),
    ],
)
def test_odd_ranges_end_as_in_python(q, k):
    expected = outcome(lambda: python(q, k, 200, 300))
    assert same(outcome(lambda: BlockMap.from_ranges(q, k, 200, 300)), expected)


@pytest.mark.parametrize("ranges", [200, 2000])
def test_many_random_ranges(ranges):
    generator = np.random.default_rng(ranges)
    q, k = (generator.integers(0, 2900, (ranges, 1)) + generator.integers(0, 100, (ranges, 2)) for _ in range(2))
    q, k = np.sort(q, axis=1), np.sort(k, axis=1)
    k[::7, 1] = k[::7, 0]  # empty
    expected = outcome(lambda: python(q, k, 3000, 3000))
    assert len(expected[4]) > 100, "hardly two partial blocks are alike"
    assert same(outcome(lambda: _C.from_ranges(q, k, 3000, 3000)), expected)


def test_arrays_of_any_strides_and_alignment():
    ranges = np.array([[0, 200, 0], [128, 256, 0], [100, 300, 0]], dtype=np.int64)
    expected = outcome(lambda: python(ranges[:, :2], ranges[::-1, :2], 300, 300))
    odd = np.frombuffer(b"?" + ranges[:, :2].tobytes(), dtype=np.int64, offset=1).reshape(3, 2)
    assert not odd.flags.aligned
    for q in (ranges[:, :2], np.asfortranarray(ranges[:, :2]), odd):
        assert same(outcome(lambda q=q: BlockMap.from_ranges(q, ranges[::-1, :2], 300, 300)), expected)


# Maps of clips --------------------------------------------------------------------------------------------------------


CLIPS = st.builds(Clip, st.integers(1, 6), st.integers(1, 20), st.integers(1, 20), *[st.integers(2, 140)] * 2)


@examples(200)
@given(CLIPS, st.none() | st.integers(0, 7), st.booleans())
def test_maps_of_clips_are_pythons(clip, radius, padded):
    ranges = window_ranges(clip, radius, padded)
    assert same(outcome(lambda: BlockMap.from_ranges(*ranges)), outcome(lambda: python(*ranges)))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("radius", [11, None])
def test_186641_tokens_are_pythons(padded, radius):
    ranges = window_ranges(LONGEST, radius, padded)
    assert same(outcome(lambda: BlockMap.from_ranges(*ranges)), outcome(lambda: python(*ranges)))


# That the comparison can fail -----------------------------------------------------------------------------------------


def swapped_masks(counts, starts, columns, mask_ids, mask_bits, order):
    """The same map, its masks numbered in another order."""
    ids = torch.where(mask_ids >= 0, len(mask_bits) - 1 - mask_ids, mask_ids)
    return counts, starts, columns, ids, mask_bits.flip(0), order


def descending(counts, starts, columns, mask_ids, mask_bits, order):
    """The same map, a row's full blocks in falling order."""
    columns = columns.clone()
    columns[: counts[0, 0, 0]] = columns[: counts[0, 0, 0]].flip(0)
    return counts, starts, columns, mask_ids, mask_bits, order


def flipped_bit(counts, starts, columns, mask_ids, mask_bits, order):
    mask_bits = mask_bits.clone()
    mask_bits[-1, 127, 3] ^= 1 << 30
    return counts, starts, columns, mask_ids, mask_bits, order


def unstable(counts, starts, columns, mask_ids, mask_bits, order):
    lengths = counts[..., 1].flatten()[order.long()]
    tie = int((lengths[1:] == lengths[:-1]).nonzero()[0, 0])
    order = order.clone()
    order[[tie, tie + 1]] = order[[tie + 1, tie]]
    return counts, starts, columns, mask_ids, mask_bits, order


@pytest.mark.parametrize("plant", [swapped_masks, descending, flipped_bit, unstable])
def test_a_planted_difference_is_seen(plant):
    ranges = window_ranges(LONGEST, 11)
    expected = outcome(lambda: python(*ranges))
    assert same(outcome(lambda: BlockMap.from_ranges(*ranges)), expected)
    assert not same(plant(*outcome(lambda: BlockMap.from_ranges(*ranges))), expected)


@pytest.mark.parametrize("change", [(0, 1), (1, 1), (2, -1), (3, -1)])
def test_one_token_more_or_less_is_seen(change):
    column, by = change
    ranges = np.array([(0, 290, 128, 290), (5, 200, 10, 100)])
    expected = outcome(lambda: python(ranges[:, :2], ranges[:, 2:], 300, 300))
    for row in range(2):
        planted = ranges.copy()
        planted[row, column] += by
        q, k = planted[:, :2], planted[:, 2:]
        assert not same(outcome(lambda q=q, k=k: _C.from_ranges(q, k, 300, 300)), expected)


# Sizes and types ------------------------------------------------------------------------------------------------------

WHOLE = int64([(0, MOST)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BlockMap.from_ranges([], [], MOST + 1, 1), f"queries must be at most {MOST}, got {MOST + 1}"),
        (lambda: BlockMap.from_ranges([], [], 1, 2**62), f"keys must be at most {MOST}, got {2**62}"),
        (lambda: BlockMap.from_ranges([], [], 10**30, 1), f"queries must be at most {MOST}, got {10**30}"),
        (lambda: _C.from_ranges(WHOLE, WHOLE, MOST, MOST), f"at most {MOST} blocks in use, got at least 2814"),
        (lambda: _C.from_ranges(WHOLE, int64([(0, 20_000)]), MOST, MOST), f"at most {MOST} blocks in use"),
        (lambda: python([], [], MOST, MOST), f"at most {MOST} blocks in Python"),
    ],
)
def test_absurd_sizes_are_refused_before_memory_is_taken(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_a_long_sequence_costs_what_it_uses():
    # 16.8 million rows; a table of all its blocks would have 2.8e14.
    counts, starts, columns, mask_ids, mask_bits, order = _C.from_ranges(
        int64([(MOST - 130, MOST)]), int64([(MOST - 1, MOST)]), MOST, MOST
    )
    assert counts.sum() == 2 * 1 and len(columns) == 2, "the last two rows see the last block"
    assert columns.tolist() == [2**24 - 1] * 2 and mask_ids.tolist() == [0, 1] and len(mask_bits) == 2
    assert order[:2].tolist() == [2**24 - 2, 2**24 - 1] and starts[0, -1] == 1


# Threads --------------------------------------------------------------------------------------------------------------


def nested(ranges):
    """Staggered ranges over the same keys: a sweep of ranges^2 steps whose result is small."""
    first = np.arange(ranges, dtype=np.int64)
    return np.stack([first, first + ranges], axis=1), np.tile(int64([(0, 100)]), (ranges, 1)), 2 * ranges, 100


def ticks_during(work):
    """How often another thread ran, a millisecond apart, while ``work`` did; and its seconds and result."""
    box = []

    def timed():
        start = time.perf_counter()
        result = work()
        box.extend([time.perf_counter() - start, result])

    worker = threading.Thread(target=timed)
    worker.start()
    ticks = 0
    while worker.is_alive():
        time.sleep(0.001)
        ticks += 1
    return ticks, *box


def test_other_threads_run_meanwhile():
    size, seconds = 4000, 0.0
    while seconds < 0.3:
        size *= 2
        arguments = nested(size)
        ticks, seconds, result = ticks_during(lambda arguments=arguments: _C.from_ranges(*arguments))
    assert ticks >= 20, f"{ticks} ticks in {seconds:.2f} s"
    union = int64([(0, 2 * size - 1)]), int64([(0, 100)]), 2 * size, 100
    assert same(outcome(lambda: result), outcome(lambda: _C.from_ranges(*union)))


def test_the_ticks_see_a_call_that_keeps_the_gil():
    count, seconds = 10**6, 0.0
    while seconds < 0.3:
        count *= 4
        ticks, seconds, _ = ticks_during(lambda count=count: sum(range(count)))
    assert ticks < 20


def test_an_array_may_be_written_to_while_it_is_used():
    arguments = nested(8000)
    expected = outcome(lambda: _C.from_ranges(*arguments))
    with ThreadPoolExecutor(1) as pool:
        running = threading.Event()
        call = pool.submit(lambda: (running.set(), _C.from_ranges(*arguments))[1])
        running.wait()
        time.sleep(0.01)
        while not call.done():
            arguments[0][:] = 2**62
            arguments[1][:] = -1
    assert same(outcome(call.result), expected)


def test_calls_in_several_threads_do_not_disturb_each_other():
    radii = [*range(12), None] * 3
    windows = {radius: arrays(window_ranges(LONGEST, radius)) for radius in radii}
    expected = {radius: outcome(lambda w=window: _C.from_ranges(*w)) for radius, window in windows.items()}

    with ThreadPoolExecutor(4) as pool:
        for radius, call in [(radius, pool.submit(_C.from_ranges, *windows[radius])) for radius in radii]:
            assert same(outcome(call.result), expected[radius])


# Speed ----------------------------------------------------------------------------------------------------------------


def test_maps_of_8_heads_at_186641_tokens_take_less_than_50_milliseconds():
    """One key/value head's map takes 2 to 4 ms."""
    assert LONGEST.total == 186_641
    windows = [arrays(window_ranges(LONGEST, radius)) for radius in range(7, 15)]
    assert milliseconds(lambda: [_C.from_ranges(*window) for window in windows]) < 50


def test_67000_different_masks_take_less_than_2500_milliseconds():
    """0.6 s; 4.9 where the hash gave a quarter of all small rectangles the same value."""
    generator = np.random.default_rng(0)
    tokens = 560_000
    first, size = generator.integers(0, tokens - 100, (2, 40_000)), generator.integers(1, 100, (2, 40_000))
    q, k = np.stack([first, first + size], axis=-1)
    assert len(_C.from_ranges(q, k, tokens, tokens)[4]) > 60_000
    assert milliseconds(lambda: _C.from_ranges(q, k, tokens, tokens), rounds=2) < 2500
