"""What the host prepares before attention is launched: exact block maps, and who computes which rows of them.

The compiled module ``happyhorse_fast._C`` (csrc/host/) makes them where there is one, Python where not: the same
tensors bit for bit, of a map of 186,641 tokens in 1 to 2 ms rather than 60 to 380.
"""

from __future__ import annotations

import functools
import heapq
import importlib.util
import itertools
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from happyhorse_fast import ambient
from happyhorse_fast.arguments import require_whole
from happyhorse_fast.block_map import BLOCK, BlockMap, Layout
from happyhorse_fast.block_map.from_ranges import Ranges
from happyhorse_fast.optional import said

Backend: TypeAlias = Literal["auto", "cpp", "python"]
MOST = 2**31 - 1
"""Tokens, blocks in use and work items that int32 numbers."""
MOST_PROGRAMS = 2**20


class Schedule(NamedTuple):
    """Who computes what in a persistent grid; int32 tensors on the CPU.

    Attributes:
        order: [rows]: rows by falling length; equal lengths keep their order. What :attr:`BlockMap.order` is.
        starts: [programs + 1]: program p computes ``items[starts[p] : starts[p + 1]]``, in this order.
        items: [rows * query_heads]: row * query_heads + head, every one once.
    """

    order: torch.Tensor
    starts: torch.Tensor
    items: torch.Tensor


@ambient.makes_tensors
def from_ranges(q_ranges: Ranges, k_ranges: Ranges, queries: int, keys: int, *, backend: Backend = "auto") -> BlockMap:
    """:meth:`BlockMap.from_ranges`, compiled.

    Args:
        q_ranges: [rows, 2] of (start, end), half open, in any order.
        k_ranges: [rows, 2], paired with ``q_ranges``.
        queries: Query tokens N, at most 2^31 - 1.
        keys: Key tokens M, at most 2^31 - 1.
        backend: ``"cpp"``, ``"python"``, or ``"auto"`` for C++ where it is compiled.

    Raises:
        ValueError: A range is reversed or leaves its tokens (the message names the row), the lengths differ, or the map
            would have more blocks than int32 numbers.
        RuntimeError: ``"cpp"`` where the module is not compiled.
    """
    queries, keys = require_whole("queries", queries, 0), require_whole("keys", keys, 0)
    _check_size("queries", queries)
    _check_size("keys", keys)
    if _in_python(backend):
        _check_python(queries, keys)
        return BlockMap.from_ranges(q_ranges, k_ranges, queries, keys)
    q, k = _int64(q_ranges), _int64(k_ranges)
    if q is None or k is None:  # Python says what is wrong with them
        return BlockMap.from_ranges(q_ranges, k_ranges, queries, keys)
    from happyhorse_fast import _C

    return _block_map(_C.from_ranges(q, k, queries, keys), queries, keys)


@ambient.makes_tensors
def frame_window(
    layouts: Layout | Sequence[Layout], receptive_field: int | None, *, backend: Backend = "auto"
) -> BlockMap:
    """:meth:`BlockMap.frame_window`, compiled.

    Args:
        layouts: Where each clip's tokens lie; clips follow each other in one sequence of at most 2^31 - 1 slots.
        receptive_field: R >= 0, or None for no window.
        backend: As for :func:`from_ranges`.

    Raises:
        ValueError: R is negative, there is no layout, or one is too large.
        RuntimeError: As for :func:`from_ranges`.
    """
    if receptive_field is not None:
        receptive_field = require_whole("receptive_field", receptive_field, 0)
    clips = [layouts] if isinstance(layouts, Layout) else list(layouts)
    for clip in clips:
        for name in ("frames", "frame_tokens", "audio", "text"):
            _check_size(name, getattr(clip, name))
    slots = sum(clip.slots for clip in clips)
    if slots > MOST:
        raise ValueError(f"layouts must have at most {MOST} slots, got {slots}")
    if _in_python(backend):
        _check_python(slots, slots)
        return BlockMap.frame_window(clips, receptive_field)
    if not clips:  # Python says what is wrong
        return BlockMap.frame_window(clips, receptive_field)
    from happyhorse_fast import _C

    fields = [(c.frames, c.frame_tokens, c.audio, c.text, c.align_frames, c.align_modalities) for c in clips]
    reach = None if receptive_field is None else min(receptive_field, MOST)
    return _block_map(_C.frame_window(np.array(fields, dtype=np.int64), reach), slots, slots)


@ambient.makes_tensors
def schedule(
    lengths: torch.Tensor | npt.ArrayLike, programs: int, query_heads: int = 1, *, backend: Backend = "auto"
) -> Schedule:
    """Give every (row, query head) to one program of a persistent grid: longest row first, to who has least to do.

    Of programs with equal work it goes to the one with fewest items, then to the first. The heads of a row follow each
    other, so that they run side by side and read k and v from L2. The longest list is at most 4/3 of the shortest
    possible (Graham, Bounds on Multiprocessing Timing Anomalies, 1969), and no more than one row above an even share.

    Args:
        lengths: Integers of any shape, [Hm, R]: blocks of keys per row, such as ``block_map.counts[..., 1]``.
        programs: Programs of the grid, 1 to 2^20.
        query_heads: Query heads that walk each row: query heads / Hm.
        backend: As for :func:`from_ranges`.

    Raises:
        ValueError: An argument is out of range, or lengths are no integers.
        RuntimeError: As for :func:`from_ranges`.
    """
    array = np.asarray(lengths.detach().cpu() if isinstance(lengths, torch.Tensor) else lengths)
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"lengths must be integers, got {array.dtype}")
    blocks = array.reshape(-1).astype(np.int64)
    if _in_python(backend):
        made = _python_schedule(blocks, programs, query_heads)
    else:
        from happyhorse_fast import _C

        made = _C.schedule(blocks, programs, query_heads)
    return Schedule(*map(torch.from_numpy, made))


@functools.cache
def host_module_obstacle() -> str | None:
    """Why block maps and schedules are made in Python; None where the compiled module makes them."""
    try:
        from happyhorse_fast import _C  # noqa: F401
    except Exception as error:  # built for another Python, or broken
        if importlib.util.find_spec("happyhorse_fast._C") is None:
            return "happyhorse_fast._C is not compiled: the package was installed without a C++ compiler"
        return f"happyhorse_fast._C cannot be loaded: {said(error)}"
    return None


def _in_python(backend: Backend) -> bool:
    """Whether Python's version runs; where it has to stand in for C++, that is said once."""
    if backend not in ("auto", "cpp", "python"):
        raise ValueError(f'backend must be "auto", "cpp" or "python", got {backend!r}')
    obstacle = None if backend == "python" else host_module_obstacle()
    if obstacle is not None:
        if backend == "cpp":
            raise RuntimeError(f"backend 'cpp' cannot run: {obstacle}")
        _say_once(obstacle)
    return backend == "python" or obstacle is not None


@functools.cache
def _say_once(obstacle: str) -> None:
    line = f"block maps are made in Python, at 1080p and 15 s in up to 0.4 s rather than 2 ms: {obstacle}"
    warnings.warn(line, stacklevel=4)


def _check_size(name: str, size: int) -> None:
    if size > MOST:
        raise ValueError(f"{name} must be at most {MOST}, got {size}")


def _check_python(queries: int, keys: int) -> None:
    rows, width = -(-queries // BLOCK), -(-keys // BLOCK)
    if rows * width > MOST:  # it makes tables of all blocks, used or not, whose places it numbers in int32
        raise ValueError(f"queries x keys must be at most {MOST} blocks in Python, got {rows} x {width}")


def _int64(ranges: Ranges) -> npt.NDArray[np.int64] | None:
    """[rows, 2], or None where they are no integers of this shape."""
    array = np.asarray(ranges.detach().cpu() if isinstance(ranges, torch.Tensor) else ranges)
    if array.size == 0:
        return np.zeros((len(array) if array.ndim > 1 else 0, 2), dtype=np.int64)
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu":
        return None
    return array.astype(np.int64)


def _block_map(arrays: Sequence[npt.NDArray[np.int32]], queries: int, keys: int) -> BlockMap:
    counts, starts, columns, mask_ids, mask_bits, order = map(torch.from_numpy, arrays)
    return BlockMap(counts, starts, columns, mask_ids, mask_bits, order, queries, keys)


def _python_schedule(
    lengths: npt.NDArray[np.int64], programs: int, query_heads: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """(order, starts, items) of :class:`Schedule` from int64 [rows]."""
    bad = np.flatnonzero((lengths < 0) | (lengths > MOST))
    if len(bad):
        raise ValueError(f"lengths[{bad[0]}] must satisfy 0 <= length <= {MOST}, got {lengths[bad[0]]}")
    if not 1 <= programs <= MOST_PROGRAMS:
        raise ValueError(f"programs must satisfy 1 <= programs <= {MOST_PROGRAMS}, got {programs}")
    if not 1 <= query_heads <= MOST // max(len(lengths), 1):
        raise ValueError(f"query_heads must be at least 1, and at most {MOST} / {len(lengths)} rows, got {query_heads}")
    order = np.argsort(-lengths, kind="stable")
    loads = [(0, 0, p) for p in range(programs)]  # work, items, program: sorted, so a heap
    lists: list[list[int]] = [[] for _ in range(programs)]
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        for head in range(query_heads):
            work, count, program = loads[0]
            lists[program].append(row * query_heads + head)
            heapq.heapreplace(loads, (work + length, count + 1, program))
    starts = np.cumsum([0, *map(len, lists)])
    items = np.fromiter(itertools.chain.from_iterable(lists), dtype=np.int32, count=len(lengths) * query_heads)
    return order.astype(np.int32), starts.astype(np.int32), items
