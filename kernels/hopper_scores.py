"""Shared by both softmaxes of the Hopper attention kernel: block map, work item, scales, QK, and masks."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

HIDDEN = gl.constexpr(-(2**31))
"""Stands for -inf where scores are int32: no sum of 128 products of codes is as small."""


class Work(NamedTuple):
    """The work of a launch: the block map's tensors, the rows of a map and the number of items."""

    counts: Any
    starts: Any
    columns: Any
    mask_ids: Any
    mask_bits: Any
    order: Any
    map_rows: Any
    items: Any


class Item(NamedTuple):
    """A work item of one group: its queries in shared memory, and their blocks, columns[start : start + n_all].

    The first ``n_full`` blocks have no mask.
    """

    q_tile: Any
    start: Any
    n_full: Any
    n_all: Any


class Scales(NamedTuple):
    """Scales of a launch: ``scores``, the softmax scale times log2(e), and those of q, k and v, None where without.

    In those of an item ``scores`` includes q's scale, one number per row in int8 and one per block in e4m3. ``k`` in
    int8 and ``v`` point at the scales of the item's key/value head.
    """

    scores: Any
    q: Any
    k: Any
    v: Any


@gluon.jit
def start_qk(q_tile, k_ring, stage, sizes: gl.constexpr):
    """Issue QK of one block without waiting for it."""
    zero = gl.full([sizes.rows, sizes.block], 0, sizes.s_type, layout=sizes.s_layout)
    return warpgroup_mma(q_tile, k_ring.tiles.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def hide(s, work, at, first, sizes: gl.constexpr):
    """Set scores to -inf, or HIDDEN, where a partial block's mask bit is 0; ``first`` is the group's first query in it.

    A column's mask word is known at compile time, so a thread loads 8 words and exchanges none.
    """
    WORDS: gl.constexpr = sizes.block // 32
    row = gl.arange(0, sizes.rows, layout=sizes.s_row)
    column = gl.arange(0, sizes.block, layout=gl.SliceLayout(0, sizes.s_layout))
    words = work.mask_bits + gl.load(work.mask_ids + at).to(gl.int64) * (sizes.block * WORDS) + (first + row) * WORDS
    bits = gl.full([sizes.rows, sizes.block], 0, gl.int32, layout=sizes.s_layout)
    for word in gl.static_range(WORDS):
        bits = gl.where((column // 32 == word)[None, :], gl.load(words + word)[:, None], bits)
    seen = ((bits >> (column % 32)[None, :]) & 1) != 0
    if s.dtype == gl.int32:
        return gl.where(seen, s, HIDDEN)
    else:
        return gl.where(seen, s, -float("inf"))
