"""An exact block map from ranges of queries and keys, on the host.

The compiled module ``happyhorse_fast._C`` (csrc/host/) makes it where there is one, else Python: the same tensors bit
for bit, of 186,641 tokens in 2 to 4 ms rather than 40 to 380.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from happyhorse_fast import ambient
from happyhorse_fast.arguments import require_whole
from happyhorse_fast.block_map.assemble import Fields, assemble
from happyhorse_fast.block_map.bits import BLOCK, WORDS
from happyhorse_fast.optional import said

logger = logging.getLogger(__name__)

Ranges: TypeAlias = Sequence[Sequence[int]] | torch.Tensor
"""Rows of (start, end), half open: a list of pairs or an integer tensor [rows, 2]."""
Ints: TypeAlias = npt.NDArray[np.int64]
MOST = 2**31 - 1
"""Tokens, and blocks, that int32 numbers."""


@ambient.makes_tensors
def from_ranges(q_ranges: Ranges, k_ranges: Ranges, queries: int, keys: int) -> Fields:
    """See :meth:`BlockMap.from_ranges`."""
    queries, keys = require_whole("queries", queries, 0), require_whole("keys", keys, 0)
    for name, size in (("queries", queries), ("keys", keys)):
        if size > MOST:
            raise ValueError(f"{name} must be at most {MOST}, got {size}")
    q, k = checked_ranges("q_ranges", q_ranges, queries), checked_ranges("k_ranges", k_ranges, keys)
    if len(q) != len(k):
        raise ValueError(f"q_ranges and k_ranges must have as many rows, got {len(q)} and {len(k)}")
    obstacle = host_module_obstacle()
    if obstacle is not None:
        _say_once(obstacle)
        return in_python(q, k, queries, keys)
    from happyhorse_fast import _C as host

    counts, starts, columns, mask_ids, mask_bits, order = map(torch.from_numpy, host.from_ranges(q, k, queries, keys))
    return counts, starts, columns, mask_ids, mask_bits, order, queries, keys


@functools.cache
def host_module_obstacle() -> str | None:
    """Why block maps are made in Python; None where the compiled module makes them."""
    try:
        from happyhorse_fast import _C  # noqa: F401
    except Exception as error:  # built for another Python, or broken
        if isinstance(error, ImportError) and Path(error.path or "").suffix not in (".so", ".pyd"):
            return "happyhorse_fast._C is not compiled: the package was installed without a C++ compiler"
        return f"happyhorse_fast._C cannot be loaded: {said(error)}"
    return None


@functools.cache
def _say_once(obstacle: str) -> None:
    logger.warning("block maps are made in Python, at 1080p and 15 s in up to 0.4 s rather than 2 ms: %s", obstacle)


def in_python(q: Ints, k: Ints, queries: int, keys: int) -> Fields:
    """The map of checked ranges, without the compiled module.

    A row of blocks at a time; rows that the same ranges cut in the same places, as most of a frame's, are made once.

    Raises:
        ValueError: There are more blocks, used or not, than int32 numbers.
    """
    rows, width = -(-queries // BLOCK), -(-keys // BLOCK)
    if rows * width > MOST:
        raise ValueError(f"queries x keys must be at most {MOST} blocks in Python, got {rows} x {width}")
    used = (q[:, 0] < q[:, 1]) & (k[:, 0] < k[:, 1])
    q, k = q[used], k[used]
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

    Keys are cut where a range or a block starts or ends, so that a query sees all keys of a piece, or none.

    Args:
        q: [ranges, 2]: the row's queries that each range has, not empty.
        k: [ranges, 2]: its keys, not empty.
        size: Queries of the row.
        width: Blocks of keys S.
        masks: Bits of a mask -> its number.
    """
    borders = np.arange(width + 1) * BLOCK
    cuts = np.unique(np.concatenate([k.ravel(), borders]))
    seen = np.zeros((BLOCK, len(cuts) - 1), dtype=bool)
    for (top, bottom), (left, right) in zip(q, np.searchsorted(cuts, k), strict=True):
        seen[top:bottom, left:right] = True
    first = np.searchsorted(cuts, borders)  # piece of each block
    full = np.logical_and.reduceat(seen[:size].all(axis=0), first[:-1])
    some = np.logical_or.reduceat(seen.any(axis=0), first[:-1])
    ids = np.full(width, -1, dtype=np.int32)
    for block in np.flatnonzero(some & ~full):
        pieces, ends = slice(first[block], first[block + 1]), slice(first[block], first[block + 1] + 1)
        mask = seen[:, pieces].repeat(np.diff(cuts[ends]), axis=1)
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
