"""An exact block map from ranges of queries and keys: 186,641 tokens in a fraction of a second, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from happyhorse_fast import ambient
from happyhorse_fast.arguments import require_whole
from happyhorse_fast.block_map.assemble import Rows, assemble
from happyhorse_fast.block_map.bits import BLOCK, WORDS

Ranges: TypeAlias = Sequence[Sequence[int]] | torch.Tensor
"""Rows of (start, end), half open: a list of pairs or an integer tensor [rows, 2]."""
Ints: TypeAlias = npt.NDArray[np.int64]
MOST_BLOCKS = 2**31 - 1
"""Blocks, used or not: tables hold all of them, and int32 numbers their places."""
# Masks of 2 KiB that are built at a time: 8 MiB, whatever the number of partial blocks.
MASK_CHUNK = 4096


@ambient.makes_tensors
def from_ranges(q_ranges: Ranges, k_ranges: Ranges, queries: int, keys: int) -> Rows:
    """See :meth:`BlockMap.from_ranges`.

    Queries are cut where a range or a block starts or ends; the key ranges of each piece are merged. A block is full
    where the pieces that cover all its keys add up to all its queries. All of it in array operations; only the masks
    of partial blocks are looked up one by one, to keep one copy of each.
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
    cuts = np.unique(np.concatenate([q.ravel(), np.arange(0, queries, BLOCK), [queries]]))
    piece, lo, hi = _merged(np.searchsorted(cuts, q), k)
    row, size = cuts[piece] // BLOCK, cuts[piece + 1] - cuts[piece]

    covered = _spread(row, -(-lo // BLOCK), hi // BLOCK, size, rows, width)  # queries that see all 128 keys
    touched = _spread(row, lo // BLOCK, -(-hi // BLOCK), size, rows, width)  # queries that see some, with repeats
    in_block = np.minimum(queries - np.arange(rows) * BLOCK, BLOCK)
    full = covered == in_block[:, None]
    partial = (touched > 0) & ~full

    place = np.flatnonzero(partial)
    first = np.searchsorted(place, row * width + lo // BLOCK)
    last = np.searchsorted(place, row * width + (hi - 1) // BLOCK, side="right")
    source, block = _expand(first, last)
    column = place[block] % width
    begin = cuts[piece[source]] % BLOCK
    bits = _Rectangles(
        block,
        begin,
        begin + size[source],
        np.clip(lo[source] - column * BLOCK, 0, BLOCK),
        np.clip(hi[source] - column * BLOCK, 0, BLOCK),
    )
    ids = np.full(rows * width, -1, dtype=np.int32)
    ids[place], masks = bits.distinct(len(place))
    shape = (1, rows, width)
    return assemble(
        torch.from_numpy(full).view(shape), torch.from_numpy(ids).view(shape), torch.from_numpy(masks), queries, keys
    )


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


def _expand(first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """(i, j) for every j in first[i]..last[i]-1, one after another."""
    counts = last - first
    source = np.repeat(np.arange(len(first)), counts)
    return source, np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts) + first[source]


def _merged(pieces: Ints, k: Ints) -> tuple[Ints, Ints, Ints]:
    """Merged key ranges of every piece: (piece, start, end), disjoint and not touching within a piece.

    Args:
        pieces: [ranges, 2]: first and past-the-last piece of every range.
        k: [ranges, 2]: its keys, not empty.
    """
    source, piece = _expand(pieces[:, 0], pieces[:, 1])
    sort = np.lexsort((k[source, 0], piece))
    source, piece = source[sort], piece[sort]
    if not len(piece):
        return piece, piece, piece
    stride = int(k.max()) + 2  # sets the pieces so far apart that one running maximum serves all of them
    start, end = k[source, 0] + piece * stride, k[source, 1] + piece * stride
    reach = np.maximum.accumulate(end)
    opens = np.flatnonzero(np.concatenate([[True], start[1:] > reach[:-1]]))
    closes = np.concatenate([opens[1:] - 1, [len(reach) - 1]])
    piece = piece[opens]
    return piece, start[opens] - piece * stride, reach[closes] - piece * stride


def _spread(row: Ints, first: Ints, last: Ints, weight: Ints, rows: int, width: int) -> npt.NDArray[np.int32]:
    """[rows, width]: the weights of all runs of columns first..last-1, summed, by a running sum of their ends."""
    run = first < last
    change = np.zeros((rows, width + 1), dtype=np.int32)
    np.add.at(change, (row[run], first[run]), weight[run])
    np.subtract.at(change, (row[run], last[run]), weight[run])
    return change.cumsum(axis=1, dtype=np.int32)[:, :width]


class _Rectangles:
    """Masks as sums of disjoint rectangles: queries top..bottom-1 x keys left..right-1 of block number ``block``."""

    def __init__(self, block: Ints, top: Ints, bottom: Ints, left: Ints, right: Ints) -> None:
        sort = np.argsort(block, kind="stable")
        self.block, self.top, self.bottom = block[sort], top[sort], bottom[sort]
        word = np.arange(WORDS) * 32
        low, high = (np.clip(x[sort][:, None] - word, 0, 32) for x in (left, right))
        self.words = (np.int64(1) << high) - (np.int64(1) << low)  # bits low..high-1

    def distinct(self, blocks: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """(mask id of every block [blocks], int32 [masks, 128, 4]), masks numbered as they first come."""
        ids = np.empty(blocks, dtype=np.int32)
        known: dict[bytes, int] = {}
        for start in range(0, blocks, MASK_CHUNK):
            end = min(start + MASK_CHUNK, blocks)
            part = slice(*np.searchsorted(self.block, [start, end]))
            # Rectangles of one block share no bit, so sums of words are unions, and a running sum fills the rows.
            change = np.zeros((end - start, BLOCK + 1, WORDS), dtype=np.int64)
            np.add.at(change, (self.block[part] - start, self.top[part]), self.words[part])
            np.subtract.at(change, (self.block[part] - start, self.bottom[part]), self.words[part])
            masks = change.cumsum(axis=1)[:, :BLOCK].astype(np.uint32)
            for i, mask in enumerate(masks):
                ids[start + i] = known.setdefault(mask.tobytes(), len(known))
        stacked = np.frombuffer(b"".join(known), dtype=np.int32).reshape(-1, BLOCK, WORDS).copy()
        return ids, stacked
