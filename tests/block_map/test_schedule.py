"""Schedules of a persistent grid: C++ against Python, Graham's bounds, and the kernel's own walk."""

import itertools
import re

import numpy as np
import pytest
import torch
from fuzz import examples
from hypothesis import example, given
from hypothesis import strategies as st

from happyhorse_fast.block_map import Layout
from happyhorse_fast.ops import plan_blocks

MOST = 2**31 - 1
PROGRAMS = 132  # multiprocessors of an H100


def same(a, b):
    return all(x.dtype == y.dtype == torch.int32 and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def loads(lengths, schedule, query_heads=1):
    """Blocks that every program computes."""
    work = np.repeat(np.asarray(lengths), query_heads)[schedule.items.numpy()]
    return np.array([work[a:b].sum() for a, b in itertools.pairwise(schedule.starts.tolist())])


@examples(200)
@given(
    st.lists(st.integers(0, 5) | st.integers(0, 5000) | st.sampled_from([MOST, MOST - 1]), max_size=60),
    st.integers(1, 9) | st.just(200),
    st.integers(1, 6),
)
@example([837], 200, 1)  # 837 / 200 + 199 / 200 * 837 is 837, in floats 836.9999999999999
def test_schedules_are_pythons_and_fair(lengths, programs, query_heads):
    made = plan_blocks.schedule(lengths, programs, query_heads, backend="cpp")
    python = plan_blocks.schedule(lengths, programs, query_heads, backend="python")
    assert same(made, python)
    assert sorted(made.items.tolist()) == list(range(len(lengths) * query_heads)), "every item once"
    assert made.order.tolist() == sorted(range(len(lengths)), key=lambda row: -lengths[row])
    counts = made.starts.diff()
    assert made.starts[0] == 0 and len(counts) == programs
    assert int((counts > 0).sum()) == min(programs, len(lengths) * query_heads), "nobody is idle while others have two"
    rank = {row: i for i, row in enumerate(made.order.tolist())}
    for first, end in itertools.pairwise(made.starts.tolist()):
        walk = [(rank[item // query_heads], item % query_heads) for item in made.items[first:end].tolist()]
        assert walk == sorted(walk), "longest first in every list too"
    work = loads(lengths, made, query_heads)
    # Largest <= total / programs + (1 - 1 / programs) longest, times programs: in floats equal sides differ.
    total, longest = sum(lengths) * query_heads, max(lengths, default=0)
    assert programs * int(work.max()) <= total + (programs - 1) * longest


@examples(40)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=7), st.integers(1, 3))
def test_the_longest_list_is_at_most_four_thirds_of_the_shortest_possible(lengths, programs):
    best = min(
        max(sum(n for n, p in zip(lengths, given, strict=True) if p == program) for program in range(programs))
        for given in itertools.product(range(programs), repeat=len(lengths))
    )
    made = plan_blocks.schedule(lengths, programs, backend="cpp")
    assert 3 * programs * int(loads(lengths, made).max()) <= (4 * programs - 1) * best


@pytest.mark.parametrize(
    "schedule",
    [
        lambda lengths, *rest: plan_blocks.schedule(lengths, *rest, backend="cpp"),
        lambda lengths, *rest: plan_blocks.schedule(lengths, *rest, backend="python"),
    ],
)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, -1], 1), f"lengths[1] must satisfy 0 <= length <= {MOST}, got -1"),
        (([2**31], 1), f"lengths[0] must satisfy 0 <= length <= {MOST}, got {2**31}"),
        (([-(2**63)], 1), f"lengths[0] must satisfy 0 <= length <= {MOST}, got {-(2**63)}"),
        (([1.0], 1), "lengths must be integers, got float64"),
        (([float("nan")], 1), "lengths must be integers, got float64"),
        (([1], 0), f"programs must satisfy 1 <= programs <= {2**20}, got 0"),
        (([1], 2**40), f"programs must satisfy 1 <= programs <= {2**20}, got {2**40}"),
        (([1, 2, 3], 1, 0), f"query_heads must be at least 1, and at most {MOST} / 3 rows, got 0"),
        (([1, 2, 3], 1, 2**30), f"query_heads must be at least 1, and at most {MOST} / 3 rows, got {2**30}"),
    ],
)
def test_bad_schedules_are_refused(schedule, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        schedule(*arguments)


def test_a_clips_schedule_is_even_and_no_longer_than_the_strided_walk():
    block_map = plan_blocks.frame_window(Layout(91, 2040, 361, 640), 11)
    lengths = block_map.counts[..., 1]
    made = plan_blocks.schedule(lengths, PROGRAMS, 40)
    assert torch.equal(made.order, block_map.order)
    work = loads(lengths.flatten(), made, 40)
    assert 1000 * PROGRAMS * int(work.max()) <= 1001 * 40 * int(lengths.sum())
    # The kernel's walk: program p takes every PROGRAMS-th item of the rows, longest first.
    walk = lengths.flatten()[block_map.order.long()].repeat_interleave(40)
    strided = max(int(walk[p::PROGRAMS].sum()) for p in range(PROGRAMS))
    assert work.max() <= strided
