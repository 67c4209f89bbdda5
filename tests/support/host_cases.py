"""Ranges, results and times for the tests of the compiled host module."""

import time

import numpy as np
import torch
from hypothesis import strategies as st

from happyhorse_fast.block_map import BLOCK, BlockMap
from happyhorse_fast.eager.sequence import Clip, dense_ranges, local_ranges
from happyhorse_fast.fast.padded_rows import PaddedRows
from happyhorse_fast.tokens import tokens_for

SIZE = tokens_for("1080p", seconds=15, fps=24)
LONGEST = Clip(SIZE.T, SIZE.H // 2, SIZE.W // 2, SIZE.audio, 640)


def outcome(make):
    """Tensors, or the text of the ValueError."""
    try:
        made = make()
    except ValueError as error:
        return str(error)
    return made.tensors() if isinstance(made, BlockMap) else tuple(torch.as_tensor(x) for x in made)


def same(a, b):
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    return len(a) == len(b) and all(
        x.dtype == y.dtype == torch.int32 and x.shape == y.shape and x.is_contiguous() and torch.equal(x, y)
        for x, y in zip(a, b, strict=True)
    )


def int64(ranges):
    return np.array(ranges, dtype=np.int64).reshape(-1, 2)


@st.composite
def good_ranges(draw):
    """Ranges between few points, so that they overlap, touch, repeat and end on blocks more often than by chance."""
    sizes = draw(st.tuples(*[st.integers(0, 700) | st.integers(0, 5).map(lambda n: n * BLOCK)] * 2))
    points = []
    for n in sizes:
        point = st.integers(0, n) | st.integers(0, n // BLOCK).map(lambda i: i * BLOCK) | st.just(n)
        points.append(draw(st.lists(point, min_size=2, max_size=7)))
    span = [st.tuples(st.sampled_from(p), st.sampled_from(p)).map(sorted) for p in points]
    rows = draw(st.lists(st.tuples(*span), max_size=12))
    return [q for q, _ in rows], [k for _, k in rows], *sizes


FAR = (-(2**63), -(2**31), 2**31 - 1, 2**31, 2**62, 2**63 - 1)


@st.composite
def any_ranges(draw, far=FAR):
    """What a caller may get wrong: reversed and negative ranges, ranges past the end, lists of different lengths."""
    sizes = draw(st.tuples(*[st.integers(-1, 300)] * 2))
    lists = []
    for n in sizes:
        value = st.integers(-2, max(n, 0) + 2) | st.sampled_from(far)
        lists.append(draw(st.lists(st.tuples(value, value), max_size=3)))
    return *lists, *sizes


def in_form(ranges, form):
    """The same ranges as another caller would write them; a list where the form cannot hold them."""
    if form is list or not ranges:
        return ranges
    info = torch.iinfo(form) if isinstance(form, torch.dtype) else np.iinfo(form)
    if any(not info.min <= x <= info.max for row in ranges for x in row):
        return ranges
    return torch.tensor(ranges, dtype=form) if isinstance(form, torch.dtype) else np.array(ranges, dtype=form)


FORMS = st.sampled_from([list, torch.int64, torch.int32, torch.uint8, np.int64, np.int16, np.uint16, np.uint64, ">i8"])


def window_ranges(clip, radius, padded=False):
    """(q_ranges, k_ranges, queries, keys) of a clip's layers with a window of frames, or without one."""
    ranges = dense_ranges(clip) if radius is None else local_ranges(clip, radius)
    if padded:
        rows = PaddedRows.of(clip, windowed=radius is not None)
        return *rows.to_rows(ranges), rows.slots, rows.slots
    table = torch.tensor(ranges)
    return table[:, :2], table[:, 2:], clip.total, clip.total


def arrays(ranges):
    """The same as the compiled module takes it."""
    q, k, queries, keys = ranges
    return q.numpy(), k.numpy(), queries, keys


def milliseconds(work, rounds=5):
    """Of one core, at best: what else the machine does is not counted."""
    taken = []
    for _ in range(rounds):
        start = time.thread_time()
        work()
        taken.append(1000 * (time.thread_time() - start))
    return min(taken)
