"""An exact block map from ranges of queries and keys: 186,641 tokens in a fraction of a second, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from happyhorse_fast import ambient
from happyhorse_fast.arguments import require_whole
from happyhorse_fast.block_map.assemble import Fields, assemble
from happyhorse_fast.block_map.bits import BLOCK, WORDS

Ranges: TypeAlias = Sequence[Sequence[int]] | torch.Tensor
"""Rows of (start, end), half open: a list of pairs or an integer tensor [rows, 2]."""
Ints: TypeAlias = npt.NDArray[np.int64]
MOST_BLOCKS = 2**31 - 1
"""Blocks, used or not: tables hold all of them, and int32 numbers their places."""


@ambient.makes_tensors
def from_ranges(q_ranges: Ranges, k_ranges: Ranges, queries: int, keys: int) -> Fields:
    """See :meth:`BlockMap.from_ranges`.

    A row of blocks at a time; rows that the same ranges cut in the same places, as most of a frame's, are made once.
    """
    queries, keys = require_whole("queries", queries, 0), require_whole("keys", keys, 0)
    q, k = checked_ranges("q_ranges", q_ranges, queries), checked_ranges("k_ranges", k_ranges, keys)
    if len(q) != len(k):
        raise ValueError(f"q_ranges and k_ranges must have as many rows, got {len(q)} and {len(k)}")
    used = (q[:, 0] < q[:, 1]) & (k[:, 0] < k[:, 1])
    q, k = q[used], k[used]
    rows, width = -(-queries // BLOCK), -(-keys // BLOCK)
    if rows * width > MOST_BLOCKS:
        raise ValueError(f"queries x keys must be at most {MOST_BLOCKS} blocks in Python, got {rows} x {width}")
    full = np.zeros((1, rows, width), dtype=bool)
    ids = np.full((1, rows, width), -1, dtype=np.int32)
    masks: dict[bytes, int] = {}  # numbered as they first come
    made: dict[tuple[int, bytes, bytes], tuple[npt.NDArray[np.bool_], npt.NDArray[np.int32]]] = {}
    for row in range(rows):
        size = min(BLOCK, queries - row * BLOCK)
        inside = np.clip(q - row * BLOCK, 0, size)
        here = np.flatnonzero(inside[:, 0] < inside[:, 1])
        key = (size, here.tobytes(), inside[here].tobytes())
        if key not in made:
            made[key] = _row(inside[here], k[here], size, width, masks)
        full[0, row], ids[0, row] = made[key]
    bits = np.frombuffer(b"".join(masks), dtype=np.int32).reshape(-1, BLOCK, WORDS).copy()
    return assemble(torch.from_numpy(full), torch.from_numpy(ids), torch.from_numpy(bits), queries, keys)


def _row(
    q: Ints, k: Ints, size: int, width: int, masks: dict[bytes, int]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int32]]:
    """(whether full [S], mask id or -1 [S]) of a row's blocks; new masks are added to ``masks``.

    Queries and keys are cut where a range or a block starts or ends. Of a piece of both all pairs are seen, or none:
    the running sum of the ranges' corners counts how many ranges see it.

    Args:
        q: [ranges, 2]: the row's queries that each range has, not empty.
        k: [ranges, 2]: its keys, not empty.
        size: Queries of the row.
        width: Blocks of keys S.
        masks: Bits of a mask -> its number.
    """
    borders = np.arange(width + 1) * BLOCK
    q_cuts, k_cuts = np.unique([*q.ravel(), 0, size]), np.unique(np.concatenate([k.ravel(), borders]))
    (top, bottom), (left, right) = np.searchsorted(q_cuts, q).T, np.searchsorted(k_cuts, k).T
    seen_by = np.zeros((len(q_cuts), len(k_cuts)), dtype=np.int32)
    for queries, keys, change in ((top, left, 1), (bottom, right, 1), (top, right, -1), (bottom, left, -1)):
        np.add.at(seen_by, (queries, keys), change)
    seen = seen_by.cumsum(axis=0).cumsum(axis=1)[:-1, :-1] > 0
    first = np.searchsorted(k_cuts, borders)  # piece of each block
    full = np.logical_and.reduceat(seen.all(axis=0), first[:-1])
    some = np.logical_or.reduceat(seen.any(axis=0), first[:-1])
    ids = np.full(width, -1, dtype=np.int32)
    for block in np.flatnonzero(some & ~full):
        pieces = slice(first[block], first[block + 1])
        keys = np.diff(k_cuts[first[block] : first[block + 1] + 1])
        mask = np.zeros((BLOCK, BLOCK), dtype=bool)
        mask[:size] = seen[:, pieces].repeat(np.diff(q_cuts), axis=0).repeat(keys, axis=1)
        ids[block] = masks.setdefault(np.packbits(mask, axis=1, bitorder="little").tobytes(), len(masks))
    return full, ids


def checked_ranges(name: str, ranges: Any, total: int) -> Ints:
    """int64 [rows, 2] of an argument ``name`` over ``total`` tokens.

    Raises:
        ValueError: They are no integers of this shape, or a range is reversed or leaves its tokens.
    """
    array = np.asarray(ranges.detach().cpu() if isinstance(ranges, torch.Tensor) else ranges)
    if array.size == 0:
        return np.zeros((0 if array.ndim < 2 else len(array), 2), dtype=np.int64)
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers of shape [rows, 2], got {array.dtype} of shape {list(array.shape)}")
    array = array.astype(np.int64)
    bad = np.flatnonzero((array[:, 0] < 0) | (array[:, 0] > array[:, 1]) | (array[:, 1] > total))
    if len(bad):
        row = int(bad[0])
        raise ValueError(f"{name}[{row}] must satisfy 0 <= start <= end <= {total}, got {array[row].tolist()}")
    return array
