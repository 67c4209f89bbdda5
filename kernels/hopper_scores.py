"""What both softmaxes of the Hopper attention kernel begin with: where blocks are listed, QK, and masks."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma


class Work(NamedTuple):
    """What there is to do: the block map's tensors, the rows of a map and the number of items."""

    counts: Any
    starts: Any
    columns: Any
    mask_ids: Any
    mask_bits: Any
    order: Any
    map_rows: Any
    items: Any


class Item(NamedTuple):
    """A group's queries of a work item in shared memory, and the blocks they meet: columns[start : start + n_all].

    ``turn`` is the item's number among those of its program: the use of the ring of queries.
    """

    q_tile: Any
    turn: Any
    start: Any
    n_full: Any
    n_all: Any


class Scales(NamedTuple):
    """``scores`` multiplies S: softmax's scale times log2(e); q's of rows or blocks, k's and v's of blocks.

    Of an item q's is in ``scores``, a number per row with int8 q, and k and v are those of its head.
    """

    scores: Any
    q: Any
    k: Any
    v: Any


@gluon.jit
def start_qk(q_tile, k_ring, stage, sizes: gl.constexpr):
    """Issue QK."""
    zero = gl.full([sizes.rows, sizes.block], 0, sizes.s_type, layout=sizes.s_layout)
    return warpgroup_mma(q_tile, k_ring.tiles.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def hide(s, work, at, first, sizes: gl.constexpr):
    """-inf where a partial block's bits are 0; ``first`` is the group's first query in the block.

    Which word a column is in is known when this is compiled: a thread loads 8 words and exchanges none.
    """
    WORDS: gl.constexpr = sizes.block // 32
    row = gl.arange(0, sizes.rows, layout=sizes.s_row)
    column = gl.arange(0, sizes.block, layout=gl.SliceLayout(0, sizes.s_layout))
    words = work.mask_bits + gl.load(work.mask_ids + at).to(gl.int64) * (sizes.block * WORDS) + (first + row) * WORDS
    bits = gl.full([sizes.rows, sizes.block], 0, gl.int32, layout=sizes.s_layout)
    for word in gl.static_range(WORDS):
        bits = gl.where((column // 32 == word)[None, :], gl.load(words + word)[:, None], bits)
    return gl.where(((bits >> (column % 32)[None, :]) & 1) != 0, s, -float("inf"))
